"""What a token is to one iteration of a stack."""

from __future__ import annotations

import enum


class Activity(enum.IntEnum):
  """Codes of `recording.Trace.activity`."""

  UNSEEN = 0  # the stack does not see it: in the encoder, a token that is not known
  CACHED = 1  # only its keys and values are read, from the cache
  REFRESHED = 2  # recomputed
  PREVIOUS = 3  # recomputed because it was generated in the iteration before
  NOW = 4  # generated now


UNSEEN, CACHED, REFRESHED, PREVIOUS, NOW = Activity
