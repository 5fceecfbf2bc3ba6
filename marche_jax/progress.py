"""Progress bars of images drawn."""

from __future__ import annotations

from tqdm import tqdm


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
    "{rate_fmt}{postfix}]",
  )  # fmt: skip
