"""Analytic cost of decoding: floating point operations, counted as two per multiply-add.

Matrix products only, as is usual for model FLOPs; norms, activations and softmax are left out.
Everything is of one image and of both guidance halves where there are two. Where the diffusion
steps are row data (DiSA, GtR), the head takes modulations for up to `HeadShape.fewest` - 1 of them
more than a row has: how many depends on the batch, and they are left out too.
"""

from __future__ import annotations

import dataclasses

from marche_jax.config import ModelConfig
from marche_jax.planning.head_schedule import CachedSteps
from marche_jax.planning.shapes import HeadShape, StackShape, StepShape


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


def _attention(width: int, queries: int, keys: int, updated: int) -> float:
  """`queries` tokens attend to `keys`; keys and values of `updated` are computed."""
  projections = updated * 4 * width**2 + queries * 4 * width**2  # k, v; then q, output
  return projections + 4 * queries * keys * width


def _feed_forward(width: int, mlp_ratio: float, tokens: int) -> float:
  return tokens * 4 * mlp_ratio * width**2


def _block(width: int, mlp_ratio: float, queries: int, keys: int, updated: int) -> float:
  return _attention(width, queries, keys, updated) + _feed_forward(width, mlp_ratio, queries)


def _stack(width: int, mlp_ratio: float, depth: int, shape: StackShape, buffer: int) -> float:
  """`depth` layers of one guidance half: what `stack.run_stack` computes."""
  seen = buffer + shape.slots
  active = seen if shape.active is None else shape.active
  flops = shape.carried * 2.0 * seen * width
  if shape.active is not None and shape.source == "lower":
    flops += (shape.layer - 1) * _block(width, mlp_ratio, seen, seen, seen)
    flops += _attention(width, seen, seen, seen) + _feed_forward(width, mlp_ratio, active)
    return flops + (depth - shape.layer) * _block(width, mlp_ratio, active, seen, active)
  if shape.active is not None and shape.source == "scout":
    forced = shape.forced + (buffer if shape.buffer else 0)
    flops += (shape.layer - 1) * _block(width, mlp_ratio, forced, seen + forced, forced)
    flops += forced * 4 * width**2 + 2 * forced * (seen + forced) * width
  return flops + depth * _block(width, mlp_ratio, active, seen, active)


def encoder_flops(config: ModelConfig, shape: StackShape, halves: int) -> float:
  """One pass of the encoder and the projection of its output to the decoder."""
  width, buffer = config.encoder_embed_dim, config.buffer_size
  active = buffer + shape.slots if shape.active is None else shape.active
  blocks = _stack(width, config.mlp_ratio, config.encoder_depth, shape, buffer)
  inputs = 2 * shape.slots * config.token_dim * width
  return halves * (blocks + inputs + 2 * active * width * config.decoder_embed_dim)


def decoder_flops(config: ModelConfig, shape: StackShape, halves: int, asked: int) -> float:
  """One pass of the decoder; its last layer asks for `asked` tokens only."""
  width, buffer = config.decoder_embed_dim, config.buffer_size
  seen = buffer + shape.slots
  active = seen if shape.active is None else shape.active
  blocks = _stack(width, config.mlp_ratio, config.decoder_depth - 1, shape, buffer)
  return halves * (blocks + _block(width, config.mlp_ratio, asked, seen, active))


def head_flops(
  config: ModelConfig, shape: HeadShape, guided: bool, diffusion_steps: float
) -> float:
  """Sampling the tokens of an iteration with `diffusion_steps` diffusion steps."""
  halves = 2 if guided else 1
  w, c, d = config.diffloss_w, config.token_dim, config.diffloss_d
  condition = halves * 2 * config.decoder_embed_dim * w
  enter, leave = 2 * c * w, 4 * c * w  # both halves see the same x_t
  full = enter + halves * (2 * (3 * d + 2) * w**2 + 4 * d * w**2 + leave)
  flops = float(shape.slots * condition)
  if shape.cached:
    assert shape.diffusion_steps is not None
    schedule = CachedSteps.of(shape.diffusion_steps, d)
    kept = len(schedule.kept)  # blocks that a cached diffusion step still runs
    # After every full one the modulations of as many cached ones are taken.
    modulated = schedule.num_full * max(schedule.lengths)
    cheap = (shape.diffusion_steps - schedule.num_full) * (enter + leave)
    cheap += modulated * 2 * (3 * kept + 2) * w**2 + schedule.num_recomputed * 4 * kept * w**2
    flops += shape.slots * (schedule.num_full * full + cheap)
  else:
    flops += shape.slots * diffusion_steps * full
  return flops + shape.detail * (condition + shape.detail_diffusion_steps * full)


def iteration_flops(config: ModelConfig, shape: StepShape, diffusion_steps: float) -> Flops:
  """One iteration of a step shape, with `diffusion_steps` diffusion steps."""
  asked = max(shape.head.slots, shape.difference)
  return Flops(
    encoder_flops(config, shape.encoder, shape.halves),
    decoder_flops(config, shape.decoder, shape.halves, asked),
    head_flops(config, shape.head, shape.guided, diffusion_steps),
  )
