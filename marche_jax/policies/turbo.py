"""Turbo: the fastest combination whose quality stays with `full` on the embedded model."""

from __future__ import annotations

from marche_jax.plan import Draft


def turbo(draft: Draft) -> None:
  """To be decided by measurement."""
