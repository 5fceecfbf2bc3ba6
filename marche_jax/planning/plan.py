"""The DecodePlan: everything about a decoding run that is decided on the host.

A plan is a list of rows, one per iteration, and a few distinct **step shapes**, the static part of
a row. It is numpy in float64; nothing here is traced. Policies (`policies/`) edit a `draft.Draft`,
which knows no padding; `draft.build` groups its iterations into shapes. The sampler folds the rows
over a `DecodeState` and branches on step shapes, never on a policy's name.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from marche_jax.config import ModelConfig
from marche_jax.models.diffusion import Process
from marche_jax.planning import cost
from marche_jax.planning.shapes import StackShape, StepShape, count_slots, describe


@dataclasses.dataclass(frozen=True)
class Row:
  """One iteration."""

  shape_id: int  # index into the plan's step shapes
  num_known: int  # tokens known before this iteration
  num_previous: int  # of them, those generated in the previous iteration
  num_predict: int  # tokens predicted now
  mask_len: int  # tokens still masked afterwards, as the guidance schedule counts them
  cfg: float  # guidance scale
  process: int  # index into the plan's diffusion processes
  encoder_active: int  # tokens recomputed; in a full iteration all that the stack sees
  decoder_active: int
  num_detail: int = 0  # tokens with diffusion steps of their own
  detail_process: int = 0  # index of those


@dataclasses.dataclass(frozen=True, eq=False)
class DecodePlan:
  """What `sampler.decode` runs."""

  config: ModelConfig
  step_shapes: tuple[StepShape, ...]
  rows: tuple[Row, ...]
  processes: tuple[Process, ...]
  temperature: float
  stages: np.ndarray | None = None  # int [S] by position: lower stages are revealed first
  raster_groups: tuple[tuple[int, int], ...] = ()  # ranks of image tokens, see `Draft`

  @property
  def guided(self) -> bool:
    return self.step_shapes[0].guided

  @property
  def cache_halves(self) -> int:
    """Guidance halves of which keys and values are kept: 0 where no iteration is selective."""
    selective = [s.halves for s in self.step_shapes if s.encoder.active or s.decoder.active]
    return max(selective, default=0)

  @property
  def carries_scores(self) -> bool:
    return any(s.decoder.carried or s.encoder.carried for s in self.step_shapes)

  @property
  def stores_difference(self) -> bool:
    return any(s.difference for s in self.step_shapes)

  @property
  def cache_bytes_per_image(self) -> int:
    """Keys, values, decoder input, stored difference and scores of one image, in float32."""
    c = self.config
    if not self.cache_halves:
      return 0
    kv = 2 * (c.encoder_depth * c.encoder_embed_dim + c.decoder_depth * c.decoder_embed_dim)
    values = self.cache_halves * c.num_tokens * (kv + c.decoder_embed_dim)
    values += self.stores_difference * c.seq_len * c.decoder_embed_dim
    values += self.carries_scores * 2 * self.cache_halves * c.num_tokens
    return 4 * values

  def diffusion_steps(self, row: Row) -> int:
    """Diffusion steps of a row."""
    return len(self.processes[row.process].timesteps)

  def flops(self, padded: bool = True) -> cost.Flops:
    """Of one image; with `padded=False`, only of slots that hold a token.

    Slots of stored differences and carried attention, which are small, are counted as they are.
    """
    total = cost.Flops(0.0, 0.0, 0.0)
    for row in self.rows:
      shape = self.step_shapes[row.shape_id]
      total += cost.iteration_flops(
        self.config, shape if padded else self._exact(row), self.diffusion_steps(row)
      )
    return total

  def _exact(self, row: Row) -> StepShape:
    """The shape of a row if nothing were padded."""
    shape = self.step_shapes[row.shape_id]

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
    shapes = [self.step_shapes[row.shape_id] for row in self.rows]
    encoder, head = count_slots(shapes, self.config.buffer_size)
    exact = sum(row.encoder_active for row in self.rows)
    return encoder / exact, head / sum(row.num_predict for row in self.rows)

  def table(self, baseline: DecodePlan | None = None) -> str:
    """The plan as text: a line per iteration, the step shapes, and the totals below.

    Args:
      baseline: a plan to predict the speed-up over, from the floating point operations.
    """
    lines = [
      "iter  shape  known  predict  mask_len    cfg  diffusion  active: encoder  decoder",
    ]
    for k, row in enumerate(self.rows):
      shape = self.step_shapes[row.shape_id]
      active = ("all" if s.active is None else str(n) for s, n in (
        (shape.encoder, row.encoder_active), (shape.decoder, row.decoder_active)))  # fmt: skip
      diffusion = f"{self.diffusion_steps(row):9d}" + ("c" if shape.head.cached else " ")
      lines.append(
        f"{k:4d}  {row.shape_id:5d}  {row.num_known:5d}  {row.num_predict:7d}  {row.mask_len:8d}  "
        f"{row.cfg:5.2f}  {diffusion} {next(active):>15s}  {next(active):>7s}"
      )
    flops, (encoder, head) = self.flops(), self.padding()
    lines.append("")
    lines.extend(f"shape {i}: {describe(shape)}" for i, shape in enumerate(self.step_shapes))
    lines.append(
      f"{len(self.step_shapes)} step shapes; {flops.total / 1e9:.1f} GFLOP per image: encoder "
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
