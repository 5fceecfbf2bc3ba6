"""The library call: labels in, latents out."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from marche_jax.config import ModelConfig, SampleConfig, VAEConfig
from marche_jax.decoding import sampler
from marche_jax.decoding import state as state_lib
from marche_jax.decoding.state import DecodeState, Inputs, Noise
from marche_jax.images import to_uint8
from marche_jax.models import vae
from marche_jax.models.mar import Params, unpatchify
from marche_jax.planning.plan import DecodePlan
from marche_jax.planning.policies import make_plan
from marche_jax.weights.checkpoint import Model

Tree = TypeVar("Tree")
VAE_BATCH = 8
"""Images that the autoencoder decodes at a time."""


class NonFiniteLatentsError(ValueError):
  """An iteration sampled NaN or infinite tokens."""


class PlanRunner:
  """A plan made ready to run, in pieces of a few iterations that report progress in between.

  Attributes:
    plan: what it runs.
    chunk: iterations per call of the compiled program.
  """

  def __init__(
    self,
    plan: DecodePlan,
    *,
    dtype: Any = jnp.float32,
    head_dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    chunk: int | None = None,
  ) -> None:
    """Args: plan; dtypes as in `sampler.decode`; mesh: shard images over its `data` axis."""
    self.plan = plan
    self.chunk = len(plan.rows) if chunk is None else min(chunk, len(plan.rows))
    self._mesh = mesh
    self._rows, self._tables = state_lib.plan_rows(plan)
    self._dtype = dtype
    dtypes = {"dtype": dtype, "head_dtype": head_dtype}
    # Without a mesh the jitted function is shared, and its programs with it.
    self._decode: Any = sampler.jitted_decode
    self._static: dict[str, Any] = {
      "config": plan.config,
      "step_shapes": plan.step_shapes,
      **dtypes,
    }
    if mesh is not None:
      self._decode, self._static = sampler.sharded_decode(mesh, plan, **dtypes), {}

  def place(self, params: Tree) -> Tree:
    """Parameters where the program reads them: on every device of the mesh."""
    if self._mesh is None:
      return params
    return jax.device_put(params, NamedSharding(self._mesh, PartitionSpec()))

  def start(self, keys: jax.Array, order: Any = None, known: Any = None) -> DecodeState:
    """The state before the first iteration; see `initial_state`. Caches lie where they are used."""
    state = initial_state(self.plan, keys, order, known)
    create: Any = functools.partial(state_lib.empty_state, self.plan, dtype=self._dtype)
    if self._mesh is None or not self.plan.cache_halves:
      return create(state.tokens, state.by_rank)
    specs = state_lib.state_specs(self.plan, "data")
    shardings = jax.tree.map(lambda spec: NamedSharding(self._mesh, spec), specs)  # type: ignore[arg-type]
    return jax.jit(create, out_shardings=shardings)(state.tokens, state.by_rank)

  def compile(self, params: Params, batch_size: int) -> float:
    """Compiles for a batch size ahead of the first call; returns the seconds it took."""

    def start_of_batch() -> tuple[DecodeState, Inputs]:
      keys = state_lib.image_keys(jax.random.key(0), jnp.arange(batch_size))
      return self.start(keys), Inputs(jnp.zeros(batch_size, jnp.int32), keys)

    start = time.perf_counter()
    state, inputs = jax.eval_shape(start_of_batch)
    _, rows = next(state_lib.chunks(self._rows, self.chunk))
    self._decode = self._decode.lower(
      params, state, rows, self._tables, inputs, **self._static
    ).compile()
    self._static = {}
    return time.perf_counter() - start

  def __call__(
    self,
    params: Params,
    state: DecodeState,
    inputs: Inputs,
    progress: Callable[[int], Any] | None = None,
  ) -> jax.Array:
    """Runs the plan; `progress` is told how many iterations were just done.

    Returns:
      tokens, float32 [B, S, C].

    Raises:
      NonFiniteLatentsError: names the iteration and the images (by place in the batch).
    """
    done, noise = 0, inputs.noise
    for end, rows in state_lib.chunks(self._rows, self.chunk):
      if noise is not None:
        part = jax.tree.map(self._chunk_of(done, end), noise)
        inputs = dataclasses.replace(inputs, noise=part)
      state, finite, _ = self._decode(params, state, rows, self._tables, inputs, **self._static)
      bad = ~np.asarray(finite)[: end - done]
      if bad.any():
        k = int(bad.any(axis=1).argmax())
        images = ", ".join(map(str, np.flatnonzero(bad[k])))
        raise NonFiniteLatentsError(
          f"non-finite latents at iteration {done + k} of {len(self.plan.rows)}, in images "
          f"{images} of the batch (from 0). At timestep 999 the cosine schedule multiplies errors "
          "of the head by 2e4, which an undertrained head does not survive: try "
          "sample.max_timestep=950, float32, or a lower sample.cfg."
        )
      if progress is not None:
        progress(end - done)
      done = end
    return state.tokens

  def _chunk_of(self, start: int, end: int) -> Callable[[np.ndarray], np.ndarray]:
    """Cuts [R, ...] to the iterations of one call, padded as `state_lib.chunks` pads rows."""

    def cut(x: np.ndarray) -> np.ndarray:
      pad = self.chunk - (end - start)
      return np.pad(x[start:end], ((0, pad),) + ((0, 0),) * (x.ndim - 1))

    return cut


def generate(
  model: Model,
  labels: Any,
  key: jax.Array,
  sample_config: SampleConfig | None = None,
  *,
  image_ids: Any = None,
  order: Any = None,
  noise: tuple[Any, Any] | None = None,
  known: tuple[Any, Any] | None = None,
) -> jax.Array:
  """Samples one image per label.

  Image i depends on (key, image_ids[i], labels[i]) alone, not on the batch it is in. This plans on
  the host and compiles what it runs: it cannot be jitted itself, `sampler.decode` can.

  Args:
    model: of `marche_jax.load_model`.
    labels: int [B], in [0, class_num).
    key: of the run, `jax.random.key(seed)`.
    sample_config: default: the model's own, else `SampleConfig()`.
    image_ids: int [B], the images' numbers; default 0 to B - 1.
    order: int [B, S], a permutation of the tokens per image, revealed from its end; default random.
    noise: replays recorded noise: (initial [num_iter, B, S, C], steps [num_iter, T, B, S, C]),
      index 0 of T being the first executed step; num_iter as in the plan (GtR takes fewer), T the
      largest number of diffusion steps in it.
    known: (tokens [B, S, C], mask [B, S], 1 where unknown): tokens to keep, for inpainting; the
      same number of them in every image. They come last in the order.

  Returns:
    Scaled latents, float32 [B, channels, h, w]; `to_images` turns them into pixels.

  Raises:
    ValueError: for an argument of the wrong shape or range; names it.
    NonFiniteLatentsError: (a ValueError) names the iteration.
  """
  config = model.config
  sample_config = sample_config or model.sample_config or SampleConfig()
  labels = check_labels(labels, config)
  batch = len(labels)
  if (
    not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)) or key.ndim
  ):
    raise ValueError("key: expected one typed key, jax.random.key(seed)")
  ids = np.arange(batch) if image_ids is None else _array("image_ids", image_ids, (batch,), "iu")
  if ((ids < 0) | (ids >= 2**32)).any():
    raise ValueError(f"image_ids: found {ids.min()} to {ids.max()}, expected 0 to 2**32 - 1")
  keys = state_lib.image_keys(key, jnp.asarray(ids, jnp.uint32))
  plan = make_plan(config, sample_config, count_known(config, batch, known))
  recorded = None
  if noise is not None:
    steps = max(len(process.timesteps) for process in plan.processes)
    shape = (len(plan.rows), batch, config.seq_len, config.token_dim)
    recorded = Noise(
      _array("noise[0]", noise[0], shape, "f"),
      _array("noise[1]", noise[1], (shape[0], steps, *shape[1:]), "f"),
    )
  decoder = PlanRunner(plan)
  state = decoder.start(keys, order, known)
  tokens = decoder(model.params, state, Inputs(labels, keys, recorded))
  return unpatchify(tokens, config)


def count_known(config: ModelConfig, batch: int, known: tuple[Any, Any] | None) -> int:
  """How many tokens of every image are given by `known`; errors as in `generate`."""
  if known is None:
    return 0
  mask = _array("known[1]", known[1], (batch, config.seq_len), "iufb") != 0
  counts = (~mask).sum(axis=1)
  if not (counts == counts[0]).all() or counts[0] == config.seq_len:
    raise ValueError(
      f"known[1]: found {sorted(set(counts.tolist()))} known tokens, expected the same number, "
      f"below {config.seq_len}, in every image"
    )
  return int(counts[0])


def initial_state(
  plan: DecodePlan, keys: jax.Array, order: Any = None, known: tuple[Any, Any] | None = None
) -> DecodeState:
  """Tokens and positions by rank before the first iteration, without caches.

  Arguments and errors as in `generate`; keys [B] of `state_lib.image_keys`. An order that was
  given is taken as it is, but for known tokens; others follow the plan's rule.
  """
  config = plan.config
  batch, s, c = keys.shape[0], config.seq_len, config.token_dim
  tokens = jnp.zeros((batch, s, c))
  given = order is not None
  if given:
    order = _array("order", order, (batch, s), "iu")
    if not (np.sort(order, axis=1) == np.arange(s)).all():
      raise ValueError(f"order: expected a permutation of 0 to {s - 1} in every row")
  order = jnp.asarray(order, jnp.int32) if given else state_lib.random_order(keys, s)
  by_rank = order[:, ::-1]
  if known is not None:
    count_known(config, batch, known)
    values = _array("known[0]", known[0], (batch, s, c), "f")
    mask = _array("known[1]", known[1], (batch, s), "iufb") != 0
    unknown = jnp.take_along_axis(jnp.asarray(mask), by_rank, axis=1)
    first = jnp.argsort(unknown, axis=1, stable=True)  # known tokens have the first ranks
    by_rank = jnp.take_along_axis(by_rank, first, axis=1)
    tokens = jnp.where(jnp.asarray(mask)[..., None], 0.0, jnp.asarray(values, jnp.float32))
  return DecodeState(tokens, by_rank if given else state_lib.arrange(plan, by_rank))


def check_labels(labels: Any, config: ModelConfig) -> np.ndarray:
  """Labels as int32 [B]; ValueError where one is out of range."""
  labels = np.asarray(labels)
  if labels.ndim != 1 or labels.size == 0 or labels.dtype.kind not in "iu":
    raise ValueError(f"labels={labels!r}: expected a non-empty list of integers")
  wrong = labels[(labels < 0) | (labels >= config.class_num)]
  if wrong.size:
    raise ValueError(f"labels: found {wrong[0]}, expected 0 to {config.class_num - 1}")
  return labels.astype(np.int32)


def require_decodable(model: Model) -> None:
  """Raises ValueError where the model needs an autoencoder and the checkpoint holds none."""
  if model.config.vae_stride > 1 and model.vae_config is None:
    raise ValueError(
      "the checkpoint holds no autoencoder: add it with tools/convert_weights.py --kind=vae "
      "--src=FILE --dst=DIR, DIR being the checkpoint's directory"
    )


def to_images(model: Model, latents: jax.Array, mesh: Mesh | None = None) -> np.ndarray:
  """Scaled latents [B, channels, h, w] -> images uint8 [B, H, W, channels].

  The autoencoder decodes `VAE_BATCH` images at a time, on every device of a mesh (whose size then
  divides B).

  Raises:
    ValueError: where the model needs an autoencoder and the checkpoint holds none.
  """
  require_decodable(model)
  values = np.asarray(latents) / np.float32(model.config.latent_scale)
  if model.vae_config is None or model.config.vae_stride == 1:
    return to_uint8(values.transpose(0, 2, 3, 1))
  size = _vae_batch(len(values), mesh)
  program = _image_program(model.vae_config, (size, *values.shape[1:]), mesh)
  values = np.pad(values, ((0, -len(values) % size),) + ((0, 0),) * 3, mode="edge")
  parts = (values[i : i + size] for i in range(0, len(values), size))
  decoded = [to_uint8(np.asarray(program(model.vae_params, part))) for part in parts]
  return np.concatenate(decoded)[: len(latents)]


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
def _image_program(config: VAEConfig, shape: tuple[int, ...], mesh: Mesh | None) -> Any:
  """The compiled `vae.decode` (params, latents of this shape) -> images."""
  shardings: dict[str, Any] = {}
  if mesh is not None:
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings["in_shardings"] = (replicated, NamedSharding(mesh, PartitionSpec("data")))
  decode = jax.jit(functools.partial(vae.decode, config), **shardings)
  latents = jax.ShapeDtypeStruct(shape, jnp.float32)
  return decode.lower(vae.abstract_params(config), latents).compile()


def _array(name: str, value: Any, shape: tuple[int, ...], kinds: str) -> np.ndarray:
  array = np.asarray(value)
  if array.shape != shape or array.dtype.kind not in kinds:
    wanted = "integers" if "f" not in kinds else "numbers"
    raise ValueError(
      f"{name}: found {array.dtype} {list(array.shape)}, expected {wanted} of shape {list(shape)}"
    )
  if array.dtype.kind == "f" and not np.isfinite(array).all():
    raise ValueError(f"{name}: found NaN or infinity, expected finite numbers")
  return array
