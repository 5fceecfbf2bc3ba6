"""ReCAP: pairs of a full and a local iteration in the second half (arXiv 2505.19089)."""

from __future__ import annotations

import numpy as np

from marche_jax.planning.draft import Draft, Refresh, guidance_schedule

LOCAL_STEPS = 0.4
"""Share of the diffusion steps that a local iteration takes."""


def recap(draft: Draft) -> None:
  """First half full, then full and local iterations in turn.

  A local iteration recomputes the buffer tokens, those just decoded and those about to be, and
  reads the keys and values of all others from the full one before it.
  """
  if draft.sample.recap_raster and draft.stages is not None:
    raise ValueError("sample.recap_raster=True: contradicts the order of gtr and turbo")
  buffer = draft.config.buffer_size
  for k in range(len(draft.steps) // 2 + 1, len(draft.steps), 2):
    step = draft.steps[k]
    forced = buffer + step.num_previous
    step.encoder = Refresh(forced, buffer=True)
    step.decoder = Refresh(forced + step.num_predict, buffer=True)
    count = max(1, round(LOCAL_STEPS * len(step.timesteps)))
    step.timesteps = draft.timesteps(count, max_timestep=step.timesteps[-1])
    if draft.sample.recap_raster:
      draft.raster_groups.append((draft.steps[k - 1].num_known, step.num_known + step.num_predict))
    if k == len(draft.steps) - 1:  # its guidance counts no token as still masked
      step.mask_len = 0
      step.cfg = float(guidance_schedule(draft.sample, draft.config.seq_len, np.zeros(1))[0])
