"""Step shapes: what is static of an iteration, and so compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class StackShape:
  """Which tokens of a stack an iteration recomputes; see `stack.py` for the words."""

  slots: int  # for image tokens that the stack sees, besides the buffer
  active: int | None = None  # slots for tokens that are recomputed; None: all
  forced: int = 0  # slots for image tokens that are always recomputed
  buffer: bool = False  # the buffer tokens are always recomputed too
  source: str = "none"  # of the scores of refresh tokens: none, scout, carried or lower
  score: str = "attention"  # attention or value
  layer: int = 0  # from 1; where the scores are taken
  carried: int = 0  # slots for tokens whose attention is carried to the next iteration


@dataclasses.dataclass(frozen=True)
class HeadShape:
  """How an iteration samples tokens given z."""

  slots: int  # for the tokens predicted now
  diffusion_steps: int | None  # of every row of this shape; None: row data
  fewest: int = 1  # diffusion steps in any of its rows
  solver: str = "ddpm"
  detail: int = 0  # slots for tokens that get diffusion steps of their own
  detail_diffusion_steps: int = 0
  cached: bool = False  # most diffusion steps reuse what the head computed before (LazyMAR)


@dataclasses.dataclass(frozen=True)
class StepShape:
  """The static part of a row: one compiled iteration."""

  encoder: StackShape
  decoder: StackShape
  head: HeadShape
  guided: bool  # z has an unconditional half
  halves: int  # guidance halves that the transformer computes: 2, or 1 (conditional only)
  difference: int = 0  # slots for tokens whose unconditional minus conditional output is stored


def count_slots(shapes: Sequence[StepShape], buffer: int) -> tuple[int, int]:
  """Slots in some step shapes for (tokens that the encoder recomputes, tokens predicted)."""
  encoder = sum(s.encoder.active or buffer + s.encoder.slots for s in shapes)
  return encoder, sum(s.head.slots for s in shapes)


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
    f", {shape.head.detail} with {shape.head.detail_diffusion_steps} diffusion steps"
    if shape.head.detail
    else ""
  )
  return (
    f"encoder {stack(shape.encoder)}; decoder {stack(shape.decoder)}; head {shape.head.slots} "
    f"tokens{detail}, {shape.head.solver}{', cached' if shape.head.cached else ''}{halves}"
  )
