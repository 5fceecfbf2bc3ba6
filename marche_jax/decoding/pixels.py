"""Latents to pixels: where a model has an autoencoder, its program; else the latents themselves."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import ArrayLike

from marche_jax.config import VAEConfig
from marche_jax.images import to_uint8
from marche_jax.models import vae
from marche_jax.weights.checkpoint import Model

VAE_BATCH = 8
"""Images that the autoencoder decodes at a time."""


def require_decodable(model: Model) -> None:
  """Raises ValueError where the model needs an autoencoder and the checkpoint holds none."""
  if model.config.vae_stride > 1 and model.vae_config is None:
    raise ValueError(
      "the checkpoint holds no autoencoder: add it with tools/convert_weights.py --kind=vae "
      "--src=FILE --dst=DIR, DIR being the checkpoint's directory"
    )


def to_images(model: Model, latents: ArrayLike, mesh: Mesh | None = None) -> np.ndarray:
  """Scaled latents [B, channels, h, w] -> images uint8 [B, H, W, channels].

  The autoencoder decodes `VAE_BATCH` images at a time, on every device of a mesh (whose size then
  divides B).

  Raises:
    ValueError: where the model needs an autoencoder and the checkpoint holds none, or for latents
      of another shape, of integers, or of no image.
  """
  require_decodable(model)
  found, shape = np.asarray(latents), model.config.latent_shape
  is_float = jnp.issubdtype(found.dtype, jnp.floating)  # bfloat16 too
  if found.ndim != 4 or found.shape[1:] != shape or not is_float or not len(found):
    raise ValueError(
      f"latents: found {found.dtype} {list(found.shape)}, expected floats of shape "
      f"[B, {', '.join(map(str, shape))}]"
    )
  values = found.astype(np.float32) / np.float32(model.config.latent_scale)
  if model.vae_config is None or model.config.vae_stride == 1:
    return to_uint8(values.transpose(0, 2, 3, 1))
  count, size = len(values), _vae_batch(len(values), mesh)
  program = _image_program(model.vae_config, (size, *values.shape[1:]), mesh)
  values = np.pad(values, ((0, -count % size),) + ((0, 0),) * 3, mode="edge")
  parts = (values[i : i + size] for i in range(0, len(values), size))
  decoded = [to_uint8(np.asarray(program(model.vae_params, part))) for part in parts]
  return np.concatenate(decoded)[:count]


def compile_to_images(model: Model, batch_size: int, mesh: Mesh | None = None) -> float:
  """Compiles what `to_images` runs for a batch size; returns the seconds it took."""
  start = time.perf_counter()
  if model.vae_config is not None and model.config.vae_stride > 1:
    shape = (_vae_batch(batch_size, mesh), *model.config.latent_shape)
    _image_program(model.vae_config, shape, mesh)
  return time.perf_counter() - start


def _vae_batch(batch_size: int, mesh: Mesh | None) -> int:
  return min(batch_size, VAE_BATCH * (1 if mesh is None else mesh.size))


@functools.lru_cache(maxsize=8)
def _image_program(
  config: VAEConfig, shape: tuple[int, ...], mesh: Mesh | None
) -> jax.stages.Compiled:
  """The compiled `vae.decode` (params, latents of this shape) -> images."""
  decode = functools.partial(vae.decode, config)
  if mesh is None:
    program = jax.jit(decode)
  else:
    everywhere = NamedSharding(mesh, PartitionSpec())
    program = jax.jit(decode, in_shardings=(everywhere, NamedSharding(mesh, PartitionSpec("data"))))
  latents = jax.ShapeDtypeStruct(shape, jnp.float32)
  return program.lower(vae.abstract_params(config), latents).compile()
