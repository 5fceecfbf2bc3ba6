"""DiSA: diffusion steps annealed over the iterations (arXiv 2505.20297)."""

from __future__ import annotations

from marche_jax.diffusion import respaced_timesteps
from marche_jax.draft import Draft

FIRST, LAST, MAX_TIMESTEP = 50, 5, 950


def disa_timesteps(iteration: int, num_iter: int, max_timestep: int) -> tuple[int, ...]:
  """Kept timesteps of an iteration: 50 steps at the first, 5 at the last, clipped at 950.

  T_k = 5 + floor(45 (N - 1 - k) / (N - 1)); 50 where there is one iteration only.
  """
  span = FIRST - LAST
  left = num_iter - 1 - iteration
  steps = FIRST if num_iter == 1 else LAST + span * left // (num_iter - 1)
  return tuple(respaced_timesteps(steps, min(max_timestep, MAX_TIMESTEP)).tolist())


def disa(draft: Draft) -> None:
  """Later tokens are nearly determined by the known ones, and need fewer diffusion steps."""
  for k, step in enumerate(draft.steps):
    step.timesteps = disa_timesteps(k, len(draft.steps), draft.sample.max_timestep)
    step.num_detail = 0
