"""MAR's training loss and its random draws (MAR, sections 3.2 to 3.4; reference: `MAR.forward`)."""

from __future__ import annotations

import math

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from marche_jax.config import NUM_TRAIN_TIMESTEPS, ModelConfig
from marche_jax.models import diffusion
from marche_jax.models.mar import MAR
from marche_jax.models.params import Params

MASK_RATIO_STD = 0.25


@flax.struct.dataclass
class Draws:
  """Everything random in one evaluation of the loss, but for dropout.

  M = diffusion_batch_mul is the outer axis of the rows: row r * B * S + b * S + s belongs to
  repeat r of token s of image b.
  """

  mask: jax.Array  # float32 [B, S], 1 = unknown
  dropped: jax.Array  # bool [B]: class label replaced by the unconditional embedding
  timesteps: jax.Array  # int32 [M * B * S]
  noise: jax.Array  # float32 [M * B * S, C]


def max_visible(config: ModelConfig) -> int:
  """The most tokens that training ever leaves visible, at the smallest mask ratio."""
  return config.seq_len - math.ceil(config.seq_len * config.mask_ratio_min)


def draw(key: jax.Array, config: ModelConfig, batch_size: int) -> Draws:
  """Draws masks (ONE ratio per batch), dropped labels, timesteps and noise."""
  keys = jax.random.split(key, 5)
  s = config.seq_len
  low = (config.mask_ratio_min - 1.0) / MASK_RATIO_STD
  ratio = 1.0 + MASK_RATIO_STD * jax.random.truncated_normal(keys[0], low, 0.0)
  num_masked = jnp.clip(jnp.ceil(s * ratio), s - max_visible(config), s)
  rank = jnp.argsort(jax.random.uniform(keys[1], (batch_size, s)), axis=1)
  rows = config.diffusion_batch_mul * batch_size * s
  return Draws(
    mask=(rank < num_masked).astype(jnp.float32),
    dropped=jax.random.bernoulli(keys[2], config.label_drop_prob, (batch_size,)),
    timesteps=jax.random.randint(keys[3], (rows,), 0, NUM_TRAIN_TIMESTEPS),
    noise=jax.random.normal(keys[4], (rows, config.token_dim)),
  )


def training_loss(
  params: Params,
  config: ModelConfig,
  tokens: jax.Array,
  labels: jax.Array,
  draws: Draws,
  *,
  dropout_key: jax.Array | None = None,
  dtype: DTypeLike = jnp.float32,
  remat: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Loss per masked token: mean squared error of eps plus the variational bound.

  Args:
    params: of `MAR`, float32.
    config: sizes.
    tokens: scaled latents, float32 [B, S, C].
    labels: int [B].
    draws: what `draw` returns.
    dropout_key: None switches dropout off.
    dtype: of activations.
    remat: see `MAR`.

  Returns:
    The loss (float32 scalar) and its two terms as {'mse', 'vb'}.
  """
  model = MAR(config, dtype=dtype, remat=remat)
  z = model.apply(
    {"params": params},
    tokens,
    draws.mask,
    labels,
    draws.dropped,
    slots=max_visible(config),
    deterministic=dropout_key is None,
    rngs=None if dropout_key is None else {"dropout": dropout_key},
  )
  repeats = config.diffusion_batch_mul
  x0 = jnp.tile(tokens.reshape(-1, config.token_dim), (repeats, 1))
  rows_z = jnp.tile(z.reshape(-1, z.shape[-1]), (repeats, 1))
  weight = jnp.tile(draws.mask.reshape(-1), repeats)

  c = diffusion.make_process().coefficients().at(draws.timesteps)
  xt = diffusion.add_noise(c, x0, draws.noise)
  out = model.apply({"params": params}, xt, draws.timesteps, rows_z, method="denoise")
  mse, vb = diffusion.training_terms(c, x0, xt, draws.noise, out)
  total = jnp.sum(weight)
  terms = {"mse": jnp.sum(mse * weight) / total, "vb": jnp.sum(vb * weight) / total}
  return terms["mse"] + terms["vb"], terms
