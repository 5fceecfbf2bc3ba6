"""Versions, of what is installed and of what is not."""

from __future__ import annotations

import importlib.metadata
import pathlib
import shutil
import subprocess
import sys

import jax

import marche_jax
from marche_jax import versions


def test_versions_of_what_decodes():
  found = versions.versions()
  assert list(found) == ["marche_jax", "jax", "jaxlib", "flax"]
  assert found["jax"] == jax.__version__


def test_a_source_tree_that_is_not_installed_has_a_version_too(tmp_path, monkeypatch):
  installed = importlib.metadata.version

  def version(package: str) -> str:
    if package == "marche_jax":
      raise importlib.metadata.PackageNotFoundError(package)
    return installed(package)

  monkeypatch.setattr(versions.metadata, "version", version)
  (tmp_path / "pyproject.toml").write_text('[project]\nname = "marche_jax"\nversion = "7.8.9"\n')
  monkeypatch.setattr(versions, "_SOURCE", tmp_path)
  assert versions.versions()["marche_jax"] == "7.8.9 (not installed)"
  (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\nversion = "1"\n')
  assert versions.versions()["marche_jax"] == "not installed"  # of a copy in another's tree
  (tmp_path / "pyproject.toml").write_text("not = [toml")
  assert versions.versions()["marche_jax"] == "not installed"
  (tmp_path / "pyproject.toml").unlink()
  assert versions.versions()["marche_jax"] == "not installed"
  assert versions.versions()["jax"] == jax.__version__


def test_versions_of_a_copied_file_without_any_installed_package(tmp_path):
  """As the command would fail: a process in which no distribution is to be found."""
  source = pathlib.Path(marche_jax.__file__).parent
  (tmp_path / "marche_jax").mkdir()
  shutil.copy(source / "versions.py", tmp_path / "marche_jax")
  code = "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
  code += "from marche_jax.versions import versions; print(versions()['marche_jax'])"
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
  )
  assert (done.stdout, done.stderr) == ("not installed\n", "")
