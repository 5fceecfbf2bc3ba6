"""GtR: generation, then reconstruction (arXiv 2510.17171)."""

from __future__ import annotations

import numpy as np

from marche_jax.config import ModelConfig
from marche_jax.planning.draft import Draft, make_iterations

STAGE_ITERATIONS = (24, 6, 2)
"""Of the three stages, where `full` takes 64: with 256 tokens 2.67, 10.67 and 64 in each."""

FIRST, LAST, DETAIL = 50, 20, 50
"""Diffusion steps: falling from FIRST to LAST over the generation; LAST in the reconstruction, but
DETAIL for the DETAIL_SHARE of its tokens with most detail."""

DETAIL_SHARE = 0.1


def checkerboard_stages(config: ModelConfig) -> np.ndarray:
  """Stage of every position, int [S]: 2 where row + column is odd, else 0 and 1 by turns.

  The first two are the generation (spread evenly over the image), the last the reconstruction: each
  of its tokens has only known neighbours.
  """
  row, column = np.divmod(np.arange(config.seq_len), config.grid_size)
  diagonal = row + column
  return np.where(diagonal % 2 == 1, 2, diagonal % 4 // 2)


def stage_iterations(num_iter: float) -> list[int]:
  """Iterations of the three stages where plain MAR takes `num_iter`: half as many in all."""
  return [max(1, round(of_64 * num_iter / 64)) for of_64 in STAGE_ITERATIONS]


def checkerboard(draft: Draft, num_iter: float) -> int:
  """Replaces a draft's iterations by those of the three stages, with no diffusion steps yet.

  Args:
    draft: its order and iterations are set.
    num_iter: iterations of plain MAR that these stand for.

  Returns:
    The first iteration of the reconstruction.
  """
  config = draft.config
  draft.stages = checkerboard_stages(config)
  unknown = config.seq_len - draft.num_known
  first, second, last = np.bincount(draft.stages, minlength=3)
  # Where known tokens are not evenly spread, the reconstruction still begins after the generation.
  even = round((first + second) / config.seq_len * unknown)
  if draft.num_known_odd is not None:
    even = unknown - (int(last) - draft.num_known_odd)
  ends = (round(first / (first + second) * even), even, unknown)
  predicted: list[int] = []
  first_of_last = 0
  for stage, count in enumerate(stage_iterations(num_iter)):
    first_of_last = len(predicted)
    size = ends[stage] - sum(predicted)
    count = min(count, size)  # few tokens may be left where many are known
    predicted += np.diff(np.round(np.linspace(0, size, count + 1)).astype(int)).tolist()
  after = unknown - np.cumsum(predicted)
  mask_len = np.maximum(after, 1)  # the last counts one, as in the reference
  draft.iterations = make_iterations(
    config, draft.sample, draft.num_known, mask_len, np.asarray(predicted)
  )
  return first_of_last


def gtr(draft: Draft) -> None:
  """A checkerboard's one colour slowly, then the other in one or two iterations."""
  sample = draft.sample
  first_of_last = checkerboard(draft, sample.num_iter)
  for k, iteration in enumerate(draft.iterations):
    if k < first_of_last:
      share = k / max(1, first_of_last - 1)
      count = round(FIRST + (LAST - FIRST) * share)
    else:
      count = LAST
      if sample.detail_tokens:
        iteration.num_detail = max(1, round(DETAIL_SHARE * iteration.num_predict))
        iteration.detail_timesteps = draft.timesteps(DETAIL)
    iteration.timesteps = draft.timesteps(count)
