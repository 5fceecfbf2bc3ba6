"""The baseline: MAR exactly as published, every token recomputed in every iteration."""

from __future__ import annotations

import numpy as np

from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.diffusion import make_process, respaced_timesteps
from marche_jax.plan import (
  DecodePlan,
  Row,
  StepShape,
  group_slots,
  guidance_schedule,
  mask_schedule,
)


def full(config: ModelConfig, sample: SampleConfig, num_known: int) -> DecodePlan:
  """MAR's decoding (arXiv 2406.11838, section 3.4; reference: `MAR.sample_tokens`)."""
  mask_len, predicted = mask_schedule(config.seq_len - num_known, sample.num_iter)
  known = num_known + np.cumsum(predicted) - predicted
  scale = guidance_schedule(sample, config.seq_len, mask_len)
  process = make_process(respaced_timesteps(sample.num_sampling_steps, sample.max_timestep))
  steps = len(process.timesteps)
  halves = 1 if sample.cfg == 1.0 else 2

  slots = group_slots(config, known, predicted, np.full(len(known), steps))
  shapes = [StepShape(encoder, predict, halves, steps) for encoder, predict in slots]
  distinct = tuple(dict.fromkeys(shapes))
  rows = tuple(
    Row(distinct.index(shapes[k]), int(known[k]), int(predicted[k]), int(mask_len[k]),
        float(scale[k]), 0)
    for k in range(sample.num_iter)
  )  # fmt: skip
  return DecodePlan(config, distinct, rows, (process,), sample.temperature)
