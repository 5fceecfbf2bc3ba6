"""Turbo: the fastest combination whose quality stays with `full` on the embedded model.

Ours: GtR's order in fewer iterations still, each of them full, and few diffusion steps of a solver
of second order. `docs/policies.md` has what it was chosen from; caching tokens, which combines with
it as `turbo+marche`, cost more quality there than it gained speed.
"""

from __future__ import annotations

from marche_jax.planning.draft import Draft
from marche_jax.planning.policies.gtr import checkerboard

SHARE = 0.375
"""Of GtR's iterations: 12 where plain MAR takes 64."""

DIFFUSION_STEPS, MAX_TIMESTEP = 9, 950
"""Diffusion steps of every iteration, and the noisiest timestep among them."""


def turbo(draft: Draft) -> None:
  """A checkerboard in few iterations, sampled by SDE-DPM-Solver++ in few diffusion steps."""
  checkerboard(draft, SHARE * draft.sample.num_iter)
  draft.solver = "dpm++"
  for iteration in draft.iterations:
    iteration.timesteps = draft.timesteps(DIFFUSION_STEPS, MAX_TIMESTEP)
