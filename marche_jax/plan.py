"""The DecodePlan: everything about a decoding run that is decided on the host.

A plan is a list of rows, one per iteration, and a few distinct **step shapes**, the static part of
a row. It is numpy in float64; nothing here is traced. Policies (`marche_jax.policies`) edit a
`Draft`, a list of `Step`s without any padding; `build` groups the steps into shapes. The sampler
folds the rows over a `DecodeState` and branches on step shapes, never on a policy's name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from marche_jax import cost
from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.diffusion import Process, make_process

MAX_PADDING = 1.2
"""Padded over exact work in encoder and head above which a plan gets another step shape."""

MAX_STEP_SHAPES = 8


@dataclasses.dataclass(frozen=True)
class StackShape:
  """Which tokens of a stack a step recomputes; see `stack.py` for the words."""

  slots: int  # places for image tokens that the stack sees, besides the buffer
  active: int | None = None  # places for tokens that are recomputed; None: all
  forced: int = 0  # places for image tokens that are always recomputed
  buffer: bool = False  # the buffer tokens are always recomputed too
  source: str = "none"  # of the scores of refresh tokens: none, scout, carried or lower
  score: str = "attention"  # attention or value
  layer: int = 0  # from 1; where the scores are taken
  record: int = 0  # places for tokens whose attention is carried to the next iteration


@dataclasses.dataclass(frozen=True)
class HeadShape:
  """How a step samples tokens given z."""

  slots: int  # places for the tokens predicted now
  steps: int | None  # diffusion steps of every row of this shape; None: row data
  solver: str = "ddpm"
  detail: int = 0  # places for tokens that get diffusion steps of their own
  detail_steps: int = 0
  cached: bool = False  # most steps reuse what the head computed before (LazyMAR)


@dataclasses.dataclass(frozen=True)
class StepShape:
  """The static part of a row: one compiled step."""

  encoder: StackShape
  decoder: StackShape
  head: HeadShape
  guided: bool  # z has an unconditional half
  halves: int  # guidance halves that the transformer computes: 2, or 1 (conditional only)
  difference: int = 0  # places for tokens whose unconditional minus conditional output is stored


@dataclasses.dataclass(frozen=True)
class Row:
  """One iteration."""

  shape: int  # index into the plan's step shapes
  num_known: int  # tokens known before this iteration
  num_previous: int  # of them, those generated in the previous iteration
  num_predict: int  # tokens predicted now
  mask_len: int  # tokens still masked afterwards, as the guidance schedule counts them
  cfg: float  # guidance scale
  process: int  # index into the plan's diffusion processes
  encoder_active: int  # tokens recomputed; of all that there are in a full step
  decoder_active: int
  num_detail: int = 0  # tokens with diffusion steps of their own
  detail_process: int = 0  # index of those


@dataclasses.dataclass(frozen=True)
class Refresh:
  """What a selective step recomputes in one stack: `count` tokens, chosen as `StackShape` says."""

  count: int
  source: str = "none"
  score: str = "attention"
  layer: int = 0
  buffer: bool = False


@dataclasses.dataclass
class Step:
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
  num_detail: int = 0  # tokens of the highest frequency, with steps of their own
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
  steps: list[Step]
  solver: str = "ddpm"
  stages: np.ndarray | None = None  # int [S] by position: lower stages are revealed first
  raster_groups: list[tuple[int, int]] = dataclasses.field(default_factory=list)

  @property
  def guided(self) -> bool:
    return self.sample.cfg != 1.0

  def positions(self) -> int:
    """Tokens that the decoder sees."""
    return self.config.buffer_size + self.config.seq_len


@dataclasses.dataclass(frozen=True, eq=False)
class DecodePlan:
  """What `sampler.decode` runs."""

  config: ModelConfig
  shapes: tuple[StepShape, ...]
  rows: tuple[Row, ...]
  processes: tuple[Process, ...]
  temperature: float
  stages: np.ndarray | None = None  # int [S] by position: lower stages are revealed first
  raster_groups: tuple[tuple[int, int], ...] = ()  # ranks [start, end) put into raster order

  @property
  def guided(self) -> bool:
    return self.shapes[0].guided

  @property
  def cache_halves(self) -> int:
    """Guidance halves of which keys and values are kept: 0 where no step is selective."""
    selective = [s.halves for s in self.shapes if s.encoder.active or s.decoder.active]
    return max(selective, default=0)

  @property
  def carries_scores(self) -> bool:
    return any(s.decoder.record or s.encoder.record for s in self.shapes)

  @property
  def stores_difference(self) -> bool:
    return any(s.difference for s in self.shapes)

  @property
  def cache_bytes_per_image(self) -> int:
    """Keys, values, decoder input, stored difference and scores of one image, in float32."""
    c = self.config
    if not self.cache_halves:
      return 0
    positions = c.buffer_size + c.seq_len
    kv = 2 * (c.encoder_depth * c.encoder_embed_dim + c.decoder_depth * c.decoder_embed_dim)
    values = self.cache_halves * positions * (kv + c.decoder_embed_dim)
    values += self.stores_difference * c.seq_len * c.decoder_embed_dim
    values += self.carries_scores * 2 * self.cache_halves * positions
    return 4 * values

  def steps(self, row: Row) -> int:
    """Diffusion steps of a row."""
    return len(self.processes[row.process].timesteps)

  def flops(self, padded: bool = True) -> cost.Flops:
    """Of one image; `padded=False` counts only slots that hold a token."""
    total = cost.Flops(0.0, 0.0, 0.0)
    for row in self.rows:
      shape = self.shapes[row.shape]
      total += cost.step_flops(self.config, shape if padded else self._exact(row), self.steps(row))
    return total

  def _exact(self, row: Row) -> StepShape:
    """The shape of a row if nothing were padded."""
    shape = self.shapes[row.shape]

    def stack(s: StackShape, slots: int, active: int, forced: int) -> StackShape:
      if s.active is None:
        return dataclasses.replace(s, slots=slots)
      return dataclasses.replace(s, slots=slots, active=active, forced=forced)

    return dataclasses.replace(
      shape,
      encoder=stack(shape.encoder, row.num_known, row.encoder_active, row.num_previous),
      decoder=stack(
        shape.decoder, shape.decoder.slots, row.decoder_active, row.num_previous + row.num_predict
      ),
      head=dataclasses.replace(shape.head, slots=row.num_predict, detail=row.num_detail),
    )

  def padding(self) -> tuple[float, float]:
    """Padded over exact tokens: (recomputed in the encoder, predicted)."""
    buffer = self.config.buffer_size
    shapes = [self.shapes[row.shape] for row in self.rows]
    encoder = sum(s.encoder.active or buffer + s.encoder.slots for s in shapes)
    head = sum(s.head.slots for s in shapes)
    exact = sum(row.encoder_active for row in self.rows)
    return encoder / exact, head / sum(row.num_predict for row in self.rows)

  def table(self, baseline: DecodePlan | None = None) -> str:
    """The plan as text: a line per iteration, the step shapes, and the totals below.

    Args:
      baseline: a plan to predict the speed-up over, from the floating point operations.
    """
    lines = [
      "iter  shape  known  predict  masked    cfg  steps  active: encoder  decoder",
    ]
    for k, row in enumerate(self.rows):
      shape = self.shapes[row.shape]
      active = ("all" if s.active is None else str(n) for s, n in (
        (shape.encoder, row.encoder_active), (shape.decoder, row.decoder_active)))  # fmt: skip
      steps = f"{self.steps(row):5d}" + ("c" if shape.head.cached else " ")
      lines.append(
        f"{k:4d}  {row.shape:5d}  {row.num_known:5d}  {row.num_predict:7d}  {row.mask_len:6d}  "
        f"{row.cfg:5.2f}  {steps} {next(active):>15s}  {next(active):>7s}"
      )
    flops, (encoder, head) = self.flops(), self.padding()
    lines.append("")
    lines.extend(f"shape {i}: {describe(shape)}" for i, shape in enumerate(self.shapes))
    lines.append(
      f"{len(self.shapes)} step shapes; {flops.total / 1e9:.1f} GFLOP per image: encoder "
      f"{flops.encoder / flops.total:.0%}, decoder {flops.decoder / flops.total:.0%}, head "
      f"{flops.head / flops.total:.0%}; padded over exact tokens: encoder {encoder:.2f}, head "
      f"{head:.2f}"
    )
    lines.append(f"cache: {self.cache_bytes_per_image / 2**20:.1f} MiB per image in float32")
    if baseline is not None:
      lines.append(
        f"predicted speed-up over {baseline.flops().total / 1e9:.1f} GFLOP of full: "
        f"{self.speedup(baseline):.2f}"
      )
    return "\n".join(lines)

  def speedup(self, baseline: DecodePlan) -> float:
    """Predicted speed-up over another plan, by their floating point operations."""
    return baseline.flops().total / self.flops().total


def describe(shape: StepShape) -> str:
  """A step shape in a line."""

  def stack(s: StackShape) -> str:
    if s.active is None:
      return f"all of {s.slots} image tokens and the buffer"
    forced = f"{s.forced} forced" + (" and the buffer" if s.buffer else "")
    if s.source == "none":
      return f"{s.active} of {s.slots} image tokens and the buffer ({forced})"
    where = {"scout": "a scout pass to", "carried": "the previous iteration at", "lower": "all in"}
    return (
      f"{s.active} of {s.slots} image tokens and the buffer ({forced}; the others by {s.score}, "
      f"{where[s.source]} layer {s.layer})"
    )

  halves = "" if shape.halves == 2 or not shape.guided else "; conditional half only"
  detail = (
    f", {shape.head.detail} with {shape.head.detail_steps} steps" if shape.head.detail else ""
  )
  return (
    f"encoder {stack(shape.encoder)}; decoder {stack(shape.decoder)}; head {shape.head.slots} "
    f"tokens{detail}, {shape.head.solver}{', cached' if shape.head.cached else ''}{halves}"
  )


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


def full_steps(
  config: ModelConfig, sample: SampleConfig, num_known: int, timesteps: Sequence[int]
) -> list[Step]:
  """The iterations of MAR as published, every token recomputed (reference: `MAR.sample_tokens`)."""
  mask_len, predicted = mask_schedule(config.seq_len - num_known, sample.num_iter)
  return make_steps(config, sample, num_known, mask_len, predicted, timesteps)


def make_steps(
  config: ModelConfig,
  sample: SampleConfig,
  num_known: int,
  mask_len: np.ndarray,
  predicted: np.ndarray,
  timesteps: Sequence[int],
) -> list[Step]:
  """Full iterations with given counts.

  Args:
    config, sample: of the run.
    num_known: image tokens that are given.
    mask_len: tokens still masked after each iteration, as guidance counts them, int [R].
    predicted: tokens predicted in each, int [R].
    timesteps: of the diffusion, ascending.
  """
  scale = guidance_schedule(sample, config.seq_len, mask_len)
  known = num_known + np.cumsum(predicted) - predicted
  before = np.concatenate([[0], predicted[:-1]])
  return [
    Step(
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


def build(draft: Draft) -> DecodePlan:
  """Groups the steps of a draft into step shapes.

  Raises:
    ValueError: where a step would need what no step before it leaves behind.
  """
  steps = draft.steps
  differences = _differences(draft)
  exact = [_exact_shape(draft, k, differences[k]) for k in range(len(steps))]
  shapes = group_shapes(draft.config, exact, [len(s.timesteps) for s in steps])
  distinct = tuple(dict.fromkeys(shapes))
  tables = dict.fromkeys(s.timesteps for s in steps)
  tables |= dict.fromkeys(s.detail_timesteps for s in steps if s.num_detail)
  names = list(tables)
  buffer = draft.config.buffer_size
  rows = tuple(
    Row(
      shape=distinct.index(shapes[k]),
      num_known=s.num_known,
      num_previous=s.num_previous,
      num_predict=s.num_predict,
      mask_len=s.mask_len,
      cfg=s.cfg,
      process=names.index(s.timesteps),
      encoder_active=exact[k].encoder.active or buffer + s.num_known,
      decoder_active=exact[k].decoder.active or draft.positions(),
      num_detail=s.num_detail,
      detail_process=names.index(s.detail_timesteps) if s.num_detail else 0,
    )
    for k, s in enumerate(steps)
  )
  processes = tuple(make_process(np.asarray(t, np.int64)) for t in names)
  return DecodePlan(
    draft.config, distinct, rows, processes, draft.sample.temperature, draft.stages,
    tuple(draft.raster_groups),
  )  # fmt: skip


def _differences(draft: Draft) -> list[int]:
  """For each step, of how many tokens (from its own on) it stores the difference of the halves."""
  reach = [0] * len(draft.steps)
  owner = None
  for k, step in enumerate(draft.steps):
    if step.halves == 2 or not draft.guided:
      owner = k if step.full else None
    elif owner is None:
      raise ValueError(f"iteration {k} computes the conditional half alone; no full one before it")
    else:
      reach[owner] = step.num_known + step.num_predict - draft.steps[owner].num_known
  return reach


def _exact_shape(draft: Draft, k: int, difference: int) -> StepShape:
  """The unpadded shape of a step."""
  config, step = draft.config, draft.steps[k]
  sources = {r.source: r.layer for s in draft.steps for r in (s.encoder, s.decoder) if r}

  def stack(refresh: Refresh | None, slots: int, forced: int, fresh: int) -> StackShape:
    seen = config.buffer_size + slots
    record = max(1, fresh) if "carried" in sources else 0
    if refresh is None or (refresh.source != "lower" and refresh.count >= seen):
      return StackShape(slots, layer=sources.get("carried", 0), record=record)
    return StackShape(
      slots,
      active=min(refresh.count, seen),
      forced=forced,
      buffer=refresh.buffer,
      source=refresh.source,
      score=refresh.score,
      layer=refresh.layer,
      record=record,
    )

  return StepShape(
    encoder=stack(step.encoder, step.num_known, step.num_previous, step.num_previous),
    decoder=stack(
      step.decoder, config.seq_len, step.num_previous + step.num_predict, step.num_predict
    ),
    head=HeadShape(
      slots=step.num_predict,
      steps=len(step.timesteps),
      solver=draft.solver,
      detail=step.num_detail,
      detail_steps=len(step.detail_timesteps) if step.num_detail else 0,
      cached=step.head_cached,
    ),
    guided=draft.guided,
    halves=step.halves,
    difference=difference,
  )


def _kind(shape: StepShape) -> StepShape:
  """What of a shape cannot be padded: a shape with the same kind can take its place."""

  def stack(s: StackShape) -> StackShape:
    return dataclasses.replace(
      s, slots=0, active=None if s.active is None else 0, forced=0, record=min(s.record, 1)
    )

  head = dataclasses.replace(
    shape.head, slots=0, steps=shape.head.steps if shape.head.cached else None,
    detail=min(shape.head.detail, 1),
  )  # fmt: skip
  return dataclasses.replace(
    shape,
    encoder=stack(shape.encoder),
    decoder=stack(shape.decoder),
    head=head,
    difference=min(shape.difference, 1),
  )


def _widest(a: StepShape, b: StepShape) -> StepShape:
  """The smallest shape that takes the rows of two shapes of one kind."""

  def stack(x: StackShape, y: StackShape) -> StackShape:
    active = None if x.active is None else max(x.active, y.active or 0)
    return dataclasses.replace(
      x, slots=max(x.slots, y.slots), active=active, forced=max(x.forced, y.forced),
      record=max(x.record, y.record),
    )  # fmt: skip

  return dataclasses.replace(
    a,
    encoder=stack(a.encoder, b.encoder),
    decoder=stack(a.decoder, b.decoder),
    head=dataclasses.replace(
      a.head,
      slots=max(a.head.slots, b.head.slots),
      steps=a.head.steps if a.head.steps == b.head.steps else None,
      detail=max(a.head.detail, b.head.detail),
    ),
    difference=max(a.difference, b.difference),
  )


def group_shapes(
  config: ModelConfig,
  exact: Sequence[StepShape],
  steps: Sequence[int],
) -> list[StepShape]:
  """Padded shapes of all rows: as few distinct ones as the bounds on padding allow.

  Rows of one kind, in their order, are cut into runs that share a shape. The cut of least work into
  a number of runs is found by dynamic programming; the kind that gains most gets another run until
  encoder and head are padded by at most `MAX_PADDING`, or there are `MAX_STEP_SHAPES`.

  Args:
    config: sizes.
    exact: unpadded shape of every row.
    steps: diffusion steps of every row.
  """
  kinds: dict[StepShape, list[int]] = {}
  for k, shape in enumerate(exact):
    kinds.setdefault(_kind(shape), []).append(k)
  splits = [_splits(config, [exact[k] for k in rows], [steps[k] for k in rows])
            for rows in kinds.values()]  # fmt: skip
  counts = [1] * len(splits)
  while True:
    grouped: list[StepShape] = list(exact)
    for rows, split, count in zip(kinds.values(), splits, counts):
      for k, shape in zip(rows, split[count - 1][1]):
        grouped[k] = shape
    if sum(counts) >= MAX_STEP_SHAPES or _padding(config, grouped, exact) <= MAX_PADDING:
      return grouped
    gains = [
      split[count - 1][0] - split[count][0] if count < len(split) else -1.0
      for split, count in zip(splits, counts)
    ]
    best = int(np.argmax(gains))
    if gains[best] < 0:
      return grouped
    counts[best] += 1


def _padding(
  config: ModelConfig,
  grouped: Sequence[StepShape],
  exact: Sequence[StepShape],
) -> float:
  """The larger of padded over exact tokens, in encoder and head."""

  def tokens(shapes: Sequence[StepShape]) -> tuple[int, int]:
    encoder = sum(s.encoder.active or config.buffer_size + s.encoder.slots for s in shapes)
    return encoder, sum(s.head.slots for s in shapes)

  return max(a / b for a, b in zip(tokens(grouped), tokens(exact)))


def _splits(
  config: ModelConfig, exact: Sequence[StepShape], steps: Sequence[int]
) -> list[tuple[float, list[StepShape]]]:
  """For 1, 2, ... runs: the least work, and the shape of each row (of one kind)."""
  n = len(exact)
  work = np.full((n + 1, n + 1), np.inf)  # work[i, j]: rows i to j - 1 as one run
  shapes: dict[tuple[int, int], StepShape] = {}
  for i in range(n):
    shape, total = exact[i], 0
    for j in range(i + 1, n + 1):
      shape, total = _widest(shape, exact[j - 1]), total + steps[j - 1]
      # Work is linear in the number of diffusion steps.
      work[i, j] = (j - i) * cost.step_flops(config, shape, total / (j - i)).total
      shapes[i, j] = shape
  best, ends = work[0].copy(), [np.zeros(n + 1, int)]
  found = []
  for count in range(1, min(MAX_STEP_SHAPES, n) + 1):
    if count > 1:
      options = best[:, None] + work
      ends.append(options.argmin(axis=0))
      best = options.min(axis=0)
    rows: list[StepShape] = []
    j = n
    for back in reversed(ends[:count]):
      i = int(back[j])
      rows = [shapes[i, j]] * (j - i) + rows
      j = i
    found.append((float(best[n]), rows))
  return found
