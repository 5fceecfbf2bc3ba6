"""Which diffusion steps the head computes in full where it caches (LazyMAR, arXiv 2503.12450)."""

from __future__ import annotations

import dataclasses
import functools

INTERVAL = 7
RECOMPUTE_ABOVE = 0.9
"""Above this share of the diffusion steps (the noisiest tenth) the kept blocks run in cached
ones too."""


@dataclasses.dataclass(frozen=True)
class CachedSteps:
  """The head's schedule over T diffusion steps, indexed as the tables: 0 is the last executed.

  The first executed one and every multiple of 7 are full. The others run the conditional half
  alone: the difference of the halves' eps is that of the last full one; the residual of the inner
  blocks is stored; the first and the last block (`kept`) add their stored output under a fresh
  gate, and are computed anew above 90% of T.
  """

  starts: tuple[int, ...]  # indices of the full ones, descending
  lengths: tuple[int, ...]  # cached ones that follow each
  recomputed: tuple[bool, ...]  # by index: a cached one that runs the kept blocks
  kept: tuple[int, ...]  # the first and the last block

  @classmethod
  @functools.cache
  def of(cls, diffusion_steps: int, depth: int) -> CachedSteps:
    """The schedule of a table of diffusion steps and a head of `depth` blocks."""
    full = sorted({diffusion_steps - 1, *range(0, diffusion_steps, INTERVAL)}, reverse=True)
    ends = [*full[1:], -1]
    above = RECOMPUTE_ABOVE * diffusion_steps
    recomputed = tuple(i not in full and i > above for i in range(diffusion_steps))
    lengths = tuple(start - end - 1 for start, end in zip(full, ends))
    return cls(tuple(full), lengths, recomputed, tuple(sorted({0, depth - 1})))

  @property
  def num_full(self) -> int:
    return len(self.starts)

  @property
  def num_recomputed(self) -> int:
    return sum(self.recomputed)
