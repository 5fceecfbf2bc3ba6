"""The diffusion head: a small denoising MLP, conditioned per token (MAR, section 3.2).

Reference: `models/diffloss.py` of MAR, class SimpleMLPAdaLN.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from marche_jax.config import ModelConfig

FREQUENCY_WIDTH = 256
LAYER_NORM_EPSILON = 1e-6


def timestep_features(t: jax.Array) -> jax.Array:
  """Sinusoidal features [cos, sin] of timesteps [n] -> float32 [n, 256]."""
  half = FREQUENCY_WIDTH // 2
  frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
  angles = t.astype(jnp.float32)[:, None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """Adaptive layer norm's affine part: x * (1 + scale) + shift."""
  return x * (1 + scale) + shift


def normalize(x: jax.Array) -> jax.Array:
  """Layer norm without parameters over the last axis, computed in float32."""
  wide = x.astype(jnp.float32)
  centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
  variance = jnp.mean(centred**2, axis=-1, keepdims=True)
  return (centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)).astype(x.dtype)


class ResBlock(nn.Module):
  """x + gate * MLP(modulated LayerNorm(x)); [n, w] -> [n, w]."""

  width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> tuple[jax.Array, None]:
    xavier = nn.initializers.xavier_uniform()
    modulation = nn.Dense(
      3 * self.width, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="modulation"
    )(nn.silu(y))
    shift, scale, gate = jnp.split(modulation, 3, axis=-1)
    norm = nn.LayerNorm(
      epsilon=LAYER_NORM_EPSILON, use_fast_variance=False, dtype=self.dtype, name="norm"
    )
    h = modulate(norm(x), shift, scale)
    h = nn.silu(nn.Dense(self.width, dtype=self.dtype, kernel_init=xavier, name="fc1")(h))
    h = nn.Dense(self.width, dtype=self.dtype, kernel_init=xavier, name="fc2")(h)
    return x + gate * h, None  # a scan's (carry, output)


class Head(nn.Module):
  """(x_t, t, z) -> [eps, variance coefficient]; blocks are stacked along a leading axis."""

  config: ModelConfig
  dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    width, c = self.config.diffloss_w, self.config.token_dim
    xavier, normal = nn.initializers.xavier_uniform(), nn.initializers.normal(0.02)
    zeros = nn.initializers.zeros
    self.time_embed_0 = nn.Dense(width, kernel_init=normal)
    self.time_embed_2 = nn.Dense(width, kernel_init=normal)
    self.cond_embed = nn.Dense(width, dtype=self.dtype, kernel_init=xavier)
    self.input_proj = nn.Dense(width, dtype=self.dtype, kernel_init=xavier)
    self.blocks = nn.scan(
      ResBlock,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=self.config.diffloss_d,
    )(width, self.dtype)
    self.final_modulation = nn.Dense(2 * width, dtype=self.dtype, kernel_init=zeros)
    self.final_linear = nn.Dense(2 * c, dtype=jnp.float32, kernel_init=zeros)

  def time_embedding(self, t: jax.Array) -> jax.Array:
    """Timesteps [n] of the training process -> float32 [n, w]."""
    return self.time_embed_2(nn.silu(self.time_embed_0(timestep_features(t))))

  def __call__(self, x: jax.Array, t: jax.Array, z: jax.Array) -> jax.Array:
    """Noised tokens [n, C], timesteps [n] and conditions [n, D] -> float32 [n, 2C]."""
    y = self.time_embedding(t).astype(self.dtype) + self.cond_embed(z)
    h, _ = self.blocks(self.input_proj(x), y)
    shift, scale = jnp.split(self.final_modulation(nn.silu(y)), 2, axis=-1)
    return self.final_linear(modulate(normalize(h), shift, scale))
