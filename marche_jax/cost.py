"""Analytic cost of decoding: floating point operations, counted as two per multiply-add.

Matrix products only, as is usual for model FLOPs; norms, activations and softmax are left out.
"""

from __future__ import annotations

import dataclasses

from marche_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Flops:
  """Floating point operations by part."""

  encoder: float
  decoder: float
  head: float

  @property
  def total(self) -> float:
    return self.encoder + self.decoder + self.head

  def __add__(self, other: Flops) -> Flops:
    return Flops(self.encoder + other.encoder, self.decoder + other.decoder, self.head + other.head)


def _block(width: int, mlp_ratio: float, queries: int, keys: int, updated: int) -> float:
  """One block: `queries` tokens attend to `keys`; keys and values of `updated` are computed."""
  projections = updated * 4 * width**2 + queries * 4 * width**2  # k, v; then q, output
  attention = 4 * queries * keys * width
  feed_forward = queries * 4 * mlp_ratio * width**2
  return projections + attention + feed_forward


def encoder_flops(config: ModelConfig, tokens: int) -> float:
  """One pass over buffer tokens and `tokens` image tokens, one image, one guidance half."""
  width, n = config.encoder_embed_dim, config.buffer_size + tokens
  blocks = config.encoder_depth * _block(width, config.mlp_ratio, n, n, n)
  return blocks + 2 * tokens * config.token_dim * width + 2 * n * width * config.decoder_embed_dim


def decoder_flops(config: ModelConfig, predicted: int) -> float:
  """One pass over all positions; the last layer asks for `predicted` tokens only."""
  width, n = config.decoder_embed_dim, config.buffer_size + config.seq_len
  full = _block(width, config.mlp_ratio, n, n, n)
  last = _block(width, config.mlp_ratio, predicted, n, n)
  return (config.decoder_depth - 1) * full + last


def head_flops(config: ModelConfig, predicted: int, steps: int) -> float:
  """`steps` diffusion steps of `predicted` tokens, one guidance half."""
  w, c = config.diffloss_w, config.token_dim
  step = 2 * (config.diffloss_d * 5 * w**2 + 2 * w**2 + 3 * c * w)
  return predicted * (steps * step + 2 * config.decoder_embed_dim * w)
