"""The DecodePlan: everything about a decoding run that is decided on the host.

A plan is a list of rows, one per iteration, and a few distinct **step shapes**, the static part of
a row. It is numpy in float64; nothing here is traced. A policy (`marche_jax.policies`) fills it
from the sampling configuration; the sampler folds its rows over a `DecodeState` and branches on
step shapes, never on a policy's name.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from marche_jax import cost
from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.diffusion import Process

MAX_PADDING = 1.2
"""Padded over exact work in encoder and head above which a plan gets another step shape."""

MAX_STEP_SHAPES = 8


@dataclasses.dataclass(frozen=True)
class StepShape:
  """The static part of a row: one compiled step."""

  encoder_slots: int  # places for known image tokens in the encoder
  predict_slots: int  # places for the tokens predicted now
  guidance_halves: int  # 2: conditional and unconditional; 1: conditional only
  diffusion_steps: int | None  # of every row of this shape; None: row data


@dataclasses.dataclass(frozen=True)
class Row:
  """One iteration."""

  shape: int  # index into the plan's step shapes
  num_known: int  # tokens known before this iteration
  num_predict: int  # tokens predicted now
  mask_len: int  # tokens still masked afterwards, as the guidance schedule counts them
  cfg: float  # guidance scale
  process: int  # index into the plan's diffusion processes


@dataclasses.dataclass(frozen=True, eq=False)
class DecodePlan:
  """What `sampler.decode` runs."""

  config: ModelConfig
  shapes: tuple[StepShape, ...]
  rows: tuple[Row, ...]
  processes: tuple[Process, ...]
  temperature: float

  def flops(self, padded: bool = True) -> cost.Flops:
    """Of one image; `padded=False` counts only slots that hold a token."""
    total = cost.Flops(0.0, 0.0, 0.0)
    for row in self.rows:
      shape = self.shapes[row.shape]
      known = shape.encoder_slots if padded else row.num_known
      predict = shape.predict_slots if padded else row.num_predict
      steps = len(self.processes[row.process].timesteps)
      step = cost.Flops(
        cost.encoder_flops(self.config, known),
        cost.decoder_flops(self.config, predict),
        cost.head_flops(self.config, predict, steps),
      )
      halves = shape.guidance_halves
      total += cost.Flops(step.encoder * halves, step.decoder * halves, step.head * halves)
    return total

  def padding(self) -> tuple[float, float]:
    """Padded over exact tokens: (buffer and known ones in the encoder, predicted ones)."""
    buffer = self.config.buffer_size
    encoder = sum(buffer + self.shapes[r.shape].encoder_slots for r in self.rows)
    exact_encoder = sum(buffer + r.num_known for r in self.rows)
    head = sum(self.shapes[r.shape].predict_slots for r in self.rows)
    return encoder / exact_encoder, head / sum(r.num_predict for r in self.rows)

  def table(self) -> str:
    """The plan as text, a line per iteration and the totals below."""
    lines = ["iter  shape  known  predict  masked    cfg  steps  encoder slots  predict slots"]
    for k, row in enumerate(self.rows):
      shape = self.shapes[row.shape]
      steps = len(self.processes[row.process].timesteps)
      lines.append(
        f"{k:4d}  {row.shape:5d}  {row.num_known:5d}  {row.num_predict:7d}  {row.mask_len:6d}  "
        f"{row.cfg:5.2f}  {steps:5d}  {shape.encoder_slots:13d}  {shape.predict_slots:13d}"
      )
    flops, (encoder, head) = self.flops(), self.padding()
    lines.append(
      f"{len(self.shapes)} step shapes; {flops.total / 1e9:.1f} GFLOP per image: encoder "
      f"{flops.encoder / flops.total:.0%}, decoder {flops.decoder / flops.total:.0%}, head "
      f"{flops.head / flops.total:.0%}; padded over exact tokens: encoder {encoder:.2f}, head "
      f"{head:.2f}"
    )
    return "\n".join(lines)


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


def group_slots(
  config: ModelConfig, known: np.ndarray, predicted: np.ndarray, steps: np.ndarray
) -> list[tuple[int, int]]:
  """Slot sizes (encoder, prediction) of every row, from as few distinct pairs as padding allows.

  Consecutive rows share a size. For a number of groups the split of least work is found by
  dynamic programming; groups are added until encoder and head are padded by at most
  `MAX_PADDING`, or there are `MAX_STEP_SHAPES`.
  """
  n = len(known)
  work = np.full((n + 1, n + 1), np.inf)  # work[i, j]: rows i to j - 1 as one group
  encoder_flops = [cost.encoder_flops(config, slots) for slots in range(config.seq_len + 1)]
  for i in range(n):
    slots, predict, head = 0, 0, 0.0
    for j in range(i + 1, n + 1):
      slots, predict = max(slots, int(known[j - 1])), max(predict, int(predicted[j - 1]))
      head += cost.head_flops(config, 1, int(steps[j - 1]))  # of one predicted token
      work[i, j] = (j - i) * encoder_flops[slots] + predict * head
  best, ends = work[0].copy(), [np.zeros(n + 1, int)]
  groups: list[tuple[int, int]] = []
  for count in range(1, min(MAX_STEP_SHAPES, n) + 1):
    if count > 1:
      options = best[:, None] + work
      ends.append(options.argmin(axis=0))
      best = options.min(axis=0)
    groups, j = [], n
    for back in reversed(ends[:count]):
      i = int(back[j])
      groups = [(int(known[i:j].max()), int(predicted[i:j].max()))] * (j - i) + groups
      j = i
    encoder = sum(config.buffer_size + g[0] for g in groups) / (config.buffer_size + known).sum()
    head = sum(g[1] for g in groups) / predicted.sum()
    if max(encoder, head) <= MAX_PADDING:
      break
  return groups
