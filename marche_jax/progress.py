"""Progress bars on stderr: of images drawn, and of updates of training."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tqdm import tqdm

LOG_SECONDS = 30.0
"""Between two lines of a bar where stderr is no terminal: a log keeps every one."""


def _seconds_between() -> float:
  return 0.1 if sys.stderr.isatty() else LOG_SECONDS


def image_bar(total: int, what: str, done: int = 0) -> tqdm:
  """A bar of `total` images on stderr, a context manager; its `update` takes fractions of one.

  Args:
    total: images in all.
    what: is done with them.
    done: images that an earlier run has done, which do not count for the speed shown.
  """
  return tqdm(
    total=total, desc=what, initial=done, unit="image",
    bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, "
    "{rate_fmt}{postfix}]", mininterval=_seconds_between(),
  )  # fmt: skip


def update_bar(updates: Iterable[int], what: str, done: int, total: int) -> tqdm:
  """A bar around the updates `done`, `done + 1`, ... of `total`."""
  return tqdm(
    updates, initial=done, total=total, desc=what, unit="update",
    mininterval=_seconds_between(),
  )  # fmt: skip
