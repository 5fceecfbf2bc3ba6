"""ReCAP: pairs of a full and a local iteration in the second half (arXiv 2505.19089)."""

from __future__ import annotations

import numpy as np

from marche_jax.planning.draft import Draft, Refresh, guidance_schedule

LOCAL_SHARE = 0.4
"""Share of the diffusion steps that a local iteration takes, but at least two: from the noisiest
timestep to 0."""


def recap(draft: Draft) -> None:
  """First half full, then full and local iterations in turn.

  A local iteration recomputes the buffer tokens, those just decoded and those about to be, and
  reads the keys and values of all others from the full one before it.
  """
  if draft.sample.recap_raster and draft.stages is not None:
    raise ValueError("sample.recap_raster=True: contradicts the order of gtr and turbo")
  buffer = draft.config.buffer_size
  for k in range(len(draft.iterations) // 2 + 1, len(draft.iterations), 2):
    iteration = draft.iterations[k]
    forced = buffer + iteration.num_previous
    iteration.encoder = Refresh(forced, buffer=True)
    iteration.decoder = Refresh(forced + iteration.num_predict, buffer=True)
    count = max(2, round(LOCAL_SHARE * len(iteration.timesteps)))
    iteration.timesteps = draft.timesteps(count, max_timestep=iteration.timesteps[-1])
    if draft.sample.recap_raster:
      draft.raster_groups.append(
        (draft.iterations[k - 1].num_known, iteration.num_known + iteration.num_predict)
      )
    if k == len(draft.iterations) - 1:  # its guidance counts no token as still masked
      iteration.mask_len = 0
      iteration.cfg = float(guidance_schedule(draft.sample, draft.config.seq_len, np.zeros(1))[0])
