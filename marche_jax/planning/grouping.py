"""Padding: which rows of a plan share a step shape.

Every distinct step shape is compiled, so a plan has few; a row computes all slots of its shape,
filled or not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from marche_jax.config import ModelConfig
from marche_jax.planning import cost
from marche_jax.planning.shapes import StackShape, StepShape, count_slots

MAX_PADDING = 1.2
"""Padded over exact tokens in encoder and head above which a plan gets another step shape."""

MAX_STEP_SHAPES = 8
"""Of a plan, where no more kinds of rows are in it."""


def group_shapes(
  config: ModelConfig,
  exact: Sequence[StepShape],
  diffusion_steps: Sequence[int],
  max_padding: float = MAX_PADDING,
) -> list[StepShape]:
  """Padded shapes of all rows: as few distinct ones as the bounds on padding allow.

  Rows of one kind, in their order, are cut into runs that share a shape. The cut of least work into
  a number of runs is found by dynamic programming; the kind that gains most gets another run until
  encoder and head are padded by at most `max_padding`, or there are `MAX_STEP_SHAPES`.

  Args:
    config: sizes.
    exact: unpadded shape of every row.
    diffusion_steps: of every row.
    max_padding: padded over exact tokens, in encoder and head.
  """
  kinds: dict[StepShape, list[int]] = {}
  for k, shape in enumerate(exact):
    kinds.setdefault(_kind(shape), []).append(k)
  splits = [_splits(config, [exact[k] for k in rows], [diffusion_steps[k] for k in rows])
            for rows in kinds.values()]  # fmt: skip
  counts = [1] * len(splits)
  while True:
    grouped: list[StepShape] = list(exact)
    for rows, split, count in zip(kinds.values(), splits, counts):
      for k, shape in zip(rows, split[count - 1][1]):
        grouped[k] = shape
    if sum(counts) >= MAX_STEP_SHAPES or _padding(config, grouped, exact) <= max_padding:
      return grouped
    gains = [
      split[count - 1][0] - split[count][0] if count < len(split) else -1.0
      for split, count in zip(splits, counts)
    ]
    best = int(np.argmax(gains))
    if gains[best] < 0:
      return grouped
    counts[best] += 1


def _kind(shape: StepShape) -> StepShape:
  """What of a shape cannot be padded: a shape with the same kind can take its place."""

  def stack(s: StackShape) -> StackShape:
    return dataclasses.replace(
      s, slots=0, active=None if s.active is None else 0, forced=0, carried=min(s.carried, 1)
    )

  head = dataclasses.replace(
    shape.head,
    slots=0,
    diffusion_steps=shape.head.diffusion_steps if shape.head.cached else None,
    fewest=1,
    detail=min(shape.head.detail, 1),
  )
  return dataclasses.replace(
    shape,
    encoder=stack(shape.encoder),
    decoder=stack(shape.decoder),
    head=head,
    difference=min(shape.difference, 1),
  )


def widest(a: StepShape, b: StepShape) -> StepShape:
  """The smallest shape that takes the rows of two shapes of one kind."""

  def stack(x: StackShape, y: StackShape) -> StackShape:
    active = None if x.active is None else max(x.active, y.active or 0)
    return dataclasses.replace(
      x, slots=max(x.slots, y.slots), active=active, forced=max(x.forced, y.forced),
      carried=max(x.carried, y.carried),
    )  # fmt: skip

  return dataclasses.replace(
    a,
    encoder=stack(a.encoder, b.encoder),
    decoder=stack(a.decoder, b.decoder),
    head=dataclasses.replace(
      a.head,
      slots=max(a.head.slots, b.head.slots),
      diffusion_steps=a.head.diffusion_steps
      if a.head.diffusion_steps == b.head.diffusion_steps
      else None,
      fewest=min(a.head.fewest, b.head.fewest),
      detail=max(a.head.detail, b.head.detail),
    ),
    difference=max(a.difference, b.difference),
  )


def _padding(
  config: ModelConfig,
  grouped: Sequence[StepShape],
  exact: Sequence[StepShape],
) -> float:
  """The larger of padded over exact tokens, in encoder and head."""
  both = (count_slots(shapes, config.buffer_size) for shapes in (grouped, exact))
  return max(padded / unpadded for padded, unpadded in zip(*both))


def _splits(
  config: ModelConfig, exact: Sequence[StepShape], diffusion_steps: Sequence[int]
) -> list[tuple[float, list[StepShape]]]:
  """For 1, 2, ... runs: the least work, and the shape of each row (of one kind)."""
  n = len(exact)
  # Runs are many (33,000 of 256 rows) and their shapes few, so each shape is made and costed once.
  numbers: dict[StepShape, int] = {}
  shapes: list[StepShape] = []
  costs: list[tuple[float, float]] = []  # work is linear in the number of diffusion steps
  wider: dict[tuple[int, int], int] = {}  # number of the shape that takes the rows of two

  def number(shape: StepShape) -> int:
    if shape not in numbers:
      numbers[shape] = len(shapes)
      shapes.append(shape)
      fixed, with_one = (cost.iteration_flops(config, shape, steps).total for steps in (0, 1))
      costs.append((fixed, with_one - fixed))
    return numbers[shape]

  alone = [number(shape) for shape in exact]
  work = np.full((n + 1, n + 1), np.inf)  # work[i, j]: rows i to j - 1 as one run
  shape_of: dict[tuple[int, int], int] = {}
  for i in range(n):
    run, total = alone[i], 0
    for j in range(i + 1, n + 1):
      pair = run, alone[j - 1]
      if pair not in wider:
        wider[pair] = number(widest(shapes[run], exact[j - 1]))
      run, total = wider[pair], total + diffusion_steps[j - 1]
      fixed, per_step = costs[run]
      work[i, j] = (j - i) * fixed + total * per_step
      shape_of[i, j] = run
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
      rows = [shapes[shape_of[i, j]]] * (j - i) + rows
      j = i
    found.append((float(best[n]), rows))
  return found
