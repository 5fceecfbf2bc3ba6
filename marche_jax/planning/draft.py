"""Drafts: what policies edit, exact numbers without padding; and how a draft becomes a plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from marche_jax.config import NUM_TRAIN_TIMESTEPS, ModelConfig, SampleConfig
from marche_jax.models.diffusion import log_snr_timesteps, make_process, respaced_timesteps
from marche_jax.planning.grouping import MAX_PADDING, group_shapes
from marche_jax.planning.plan import DecodePlan, Row
from marche_jax.planning.shapes import HeadShape, StackShape, StepShape


@dataclasses.dataclass(frozen=True)
class Refresh:
  """What a selective iteration recomputes in a stack: `count` tokens, see `StackShape`."""

  count: int
  source: str = "none"
  score: str = "attention"
  layer: int = 0
  buffer: bool = False


@dataclasses.dataclass
class Iteration:
  """One iteration as policies see it: exact numbers, no padding."""

  num_known: int
  num_previous: int
  num_predict: int
  mask_len: int
  cfg: float
  timesteps: tuple[int, ...]  # of the diffusion, ascending
  halves: int
  encoder: Refresh | None = None  # None: every token is recomputed
  decoder: Refresh | None = None
  num_detail: int = 0  # tokens of the highest frequency, with diffusion steps of their own
  detail_timesteps: tuple[int, ...] = ()
  head_cached: bool = False

  @property
  def full(self) -> bool:
    """Both stacks recompute every token."""
    return self.encoder is None and self.decoder is None


@dataclasses.dataclass
class Draft:
  """What policies edit, one after the other."""

  config: ModelConfig
  sample: SampleConfig
  num_known: int  # image tokens that are given
  iterations: list[Iteration]
  num_known_odd: int | None = None  # of them, where row + column is odd; None: their even share
  solver: str = "ddpm"
  stages: np.ndarray | None = None  # int [S] by position: lower stages are revealed first
  # [start, end): image tokens of these ranks are put into raster order.
  raster_groups: list[tuple[int, int]] = dataclasses.field(default_factory=list)

  @property
  def guided(self) -> bool:
    return self.sample.cfg != 1.0

  def timesteps(
    self, diffusion_steps: int, max_timestep: int = NUM_TRAIN_TIMESTEPS - 1
  ) -> tuple[int, ...]:
    """Timesteps of so many diffusion steps, ascending, spaced as the solver wants them.

    Args:
      diffusion_steps: how many, at most: clipped ones may coincide.
      max_timestep: the noisiest, unless `sample.max_timestep` is lower.
    """
    spaced = log_snr_timesteps if self.solver == "dpm++" else respaced_timesteps
    return tuple(spaced(diffusion_steps, min(max_timestep, self.sample.max_timestep)).tolist())


def mask_schedule(unknown: int, num_iter: int) -> tuple[np.ndarray, np.ndarray]:
  """The cosine schedule: (mask_len after, tokens predicted in) each iteration, int [num_iter].

  floor(unknown * cos(pi/2 * (k+1) / num_iter)) in float64, at least one fewer than before and at
  least one; the last iteration predicts all that is left (reference: `MAR.sample_tokens`).

  Raises:
    ValueError: where there are more iterations than tokens to predict.
  """
  if not 1 <= num_iter <= unknown:
    raise ValueError(
      f"sample.num_iter={num_iter}: expected 1 to {unknown}, the number of tokens to predict"
    )
  mask_len, predicted, masked = [], [], unknown
  for k in range(num_iter):
    after = max(
      1, min(masked - 1, math.floor(unknown * math.cos(math.pi / 2 * (k + 1) / num_iter)))
    )
    mask_len.append(after)
    predicted.append(masked if k == num_iter - 1 else masked - after)
    masked = after
  return np.asarray(mask_len), np.asarray(predicted)


def guidance_schedule(sample: SampleConfig, seq_len: int, mask_len: np.ndarray) -> np.ndarray:
  """Guidance scale of each iteration, float64 [num_iter] (reference: `MAR.sample_tokens`)."""
  if sample.cfg_schedule == "constant":
    return np.full(len(mask_len), sample.cfg)
  return 1 + (sample.cfg - 1) * (seq_len - mask_len) / seq_len


def full_iterations(
  config: ModelConfig, sample: SampleConfig, num_known: int, timesteps: Sequence[int]
) -> list[Iteration]:
  """The iterations of MAR as published, every token recomputed (reference: `MAR.sample_tokens`)."""
  mask_len, predicted = mask_schedule(config.seq_len - num_known, sample.num_iter)
  return make_iterations(config, sample, num_known, mask_len, predicted, timesteps)


def make_iterations(
  config: ModelConfig,
  sample: SampleConfig,
  num_known: int,
  mask_len: np.ndarray,
  predicted: np.ndarray,
  timesteps: Sequence[int] = (),
) -> list[Iteration]:
  """Full iterations with given counts.

  Args:
    config, sample: of the run.
    num_known: image tokens that are given.
    mask_len: tokens still masked after each iteration, as guidance counts them, int [R].
    predicted: tokens predicted in each, int [R].
    timesteps: of the diffusion, ascending; none: left to the caller.
  """
  scale = guidance_schedule(sample, config.seq_len, mask_len)
  known = num_known + np.cumsum(predicted) - predicted
  before = np.concatenate([[0], predicted[:-1]])
  return [
    Iteration(
      num_known=int(known[k]),
      num_previous=int(before[k]),
      num_predict=int(predicted[k]),
      mask_len=int(mask_len[k]),
      cfg=float(scale[k]),
      timesteps=tuple(int(t) for t in timesteps),
      halves=1 if sample.cfg == 1.0 else 2,
    )
    for k in range(len(predicted))
  ]


def build(draft: Draft, max_padding: float = MAX_PADDING) -> DecodePlan:
  """Groups the iterations of a draft into step shapes.

  Args:
    draft: as policies left it.
    max_padding: see `grouping.group_shapes`.

  Raises:
    ValueError: where an iteration would need what none before it leaves behind.
  """
  iterations = draft.iterations
  sources = {r.source: r.layer for i in iterations for r in (i.encoder, i.decoder) if r}
  carried_layer = sources.get("carried", 0)
  exact = [
    _exact_shape(draft, iteration, difference, carried_layer)
    for iteration, difference in zip(iterations, _differences(draft))
  ]
  shapes = group_shapes(draft.config, exact, [len(i.timesteps) for i in iterations], max_padding)
  distinct = tuple(dict.fromkeys(shapes))
  tables = dict.fromkeys(i.timesteps for i in iterations)
  tables |= dict.fromkeys(i.detail_timesteps for i in iterations if i.num_detail)
  names = list(tables)
  buffer = draft.config.buffer_size
  rows = tuple(
    Row(
      shape_id=distinct.index(shapes[k]),
      num_known=i.num_known,
      num_previous=i.num_previous,
      num_predict=i.num_predict,
      mask_len=i.mask_len,
      cfg=i.cfg,
      process=names.index(i.timesteps),
      encoder_active=exact[k].encoder.active or buffer + i.num_known,
      decoder_active=exact[k].decoder.active or draft.config.num_tokens,
      num_detail=i.num_detail,
      detail_process=names.index(i.detail_timesteps) if i.num_detail else 0,
    )
    for k, i in enumerate(iterations)
  )
  processes = tuple(make_process(np.asarray(t, np.int64)) for t in names)
  return DecodePlan(
    draft.config, distinct, rows, processes, draft.sample.temperature, draft.stages,
    tuple(draft.raster_groups),
  )  # fmt: skip


def _differences(draft: Draft) -> list[int]:
  """Of how many tokens, from its own on, each iteration stores the difference of the halves."""
  reach = [0] * len(draft.iterations)
  owner = None
  for k, iteration in enumerate(draft.iterations):
    if iteration.halves == 2 or not draft.guided:
      owner = k if iteration.full else None
    elif owner is None:
      raise ValueError(f"iteration {k} computes the conditional half alone; no full one before it")
    else:
      reach[owner] = iteration.num_known + iteration.num_predict - draft.iterations[owner].num_known
  return reach


def _exact_shape(
  draft: Draft, iteration: Iteration, difference: int, carried_layer: int
) -> StepShape:
  """The unpadded shape of an iteration.

  Args:
    draft: what the iteration is of.
    iteration: the iteration.
    difference: of how many tokens it stores the difference of the halves.
    carried_layer: whose attention is carried to the next iteration; 0: nothing is carried.
  """
  config = draft.config

  def stack(refresh: Refresh | None, slots: int, forced: int, fresh: int) -> StackShape:
    seen = config.buffer_size + slots
    carried = max(1, fresh) if carried_layer else 0
    if refresh is None or (refresh.source != "lower" and refresh.count >= seen):
      return StackShape(slots, layer=carried_layer, carried=carried)
    return StackShape(
      slots,
      active=min(refresh.count, seen),
      forced=forced,
      buffer=refresh.buffer,
      source=refresh.source,
      score=refresh.score,
      layer=refresh.layer,
      carried=carried,
    )

  return StepShape(
    encoder=stack(
      iteration.encoder, iteration.num_known, iteration.num_previous, iteration.num_previous
    ),
    decoder=stack(
      iteration.decoder,
      config.seq_len,
      iteration.num_previous + iteration.num_predict,
      iteration.num_predict,
    ),
    head=HeadShape(
      slots=iteration.num_predict,
      diffusion_steps=len(iteration.timesteps),
      fewest=len(iteration.timesteps),
      solver=draft.solver,
      detail=iteration.num_detail,
      detail_diffusion_steps=len(iteration.detail_timesteps) if iteration.num_detail else 0,
      cached=iteration.head_cached,
    ),
    guided=draft.guided,
    halves=iteration.halves,
    difference=difference,
  )
