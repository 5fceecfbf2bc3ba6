"""Versions of what runs, for reports and for what images depend on."""

from __future__ import annotations

import pathlib
import tomllib
from importlib import metadata

_SOURCE = pathlib.Path(__file__).parents[1]


def versions() -> dict[str, str]:
  """The versions of what decodes; a package that is not installed says so in place of one."""
  return {name: _version(name) for name in ("marche_jax", "jax", "jaxlib", "flax")}


def _version(package: str) -> str:
  """The installed version; of a source tree that is not installed, what its pyproject.toml says."""
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    pass
  try:
    project = tomllib.loads((_SOURCE / "pyproject.toml").read_text())["project"]
    if project["name"] == package:
      return f"{project['version']} (not installed)"
  except (OSError, ValueError, KeyError):  # a copied package without its pyproject.toml
    pass
  return "not installed"
