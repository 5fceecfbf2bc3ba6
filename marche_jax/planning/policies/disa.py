"""DiSA: diffusion steps annealed over the iterations (arXiv 2505.20297)."""

from __future__ import annotations

from marche_jax.planning.draft import Draft

FIRST, LAST, MAX_TIMESTEP = 50, 5, 950


def disa_diffusion_steps(iteration: int, num_iter: int) -> int:
  """Diffusion steps of an iteration: 50 at the first, 5 at the last.

  T_k = 5 + floor(45 (N - 1 - k) / (N - 1)); 50 where there is one iteration only.
  """
  if num_iter == 1:
    return FIRST
  return LAST + (FIRST - LAST) * (num_iter - 1 - iteration) // (num_iter - 1)


def disa(draft: Draft) -> None:
  """Later tokens are nearly determined by the known ones, and need fewer diffusion steps.

  The noisiest timesteps are clipped at 950.
  """
  for k, iteration in enumerate(draft.iterations):
    count = disa_diffusion_steps(k, len(draft.iterations))
    iteration.timesteps = draft.timesteps(count, MAX_TIMESTEP)
    iteration.num_detail = 0
