"""`python -m marche_jax`, and the public names that are imported when they are first used."""

from __future__ import annotations

import importlib
import pathlib
import subprocess
import sys

import pytest

import marche_jax
from marche_jax import __main__ as listing

ROOT = pathlib.Path(__file__).parents[1]
GUARD = '\n\n\nif __name__ == "__main__":'


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
  """Runs the command where importing jax is an error."""
  code = (
    f"import runpy, sys; sys.modules['jax'] = None; sys.argv[1:] = {list(arguments)}; "
    "runpy.run_module('marche_jax', run_name='__main__', alter_sys=True)"
  )
  return subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
  )


def test_every_module_that_runs_is_listed():
  modules = {p.stem for p in (ROOT / "marche_jax").rglob("*.py") if GUARD in p.read_text()}
  expected = {f"python -m marche_jax.{name}" for name in modules - {"__main__"}}
  assert set(listing.commands()) == expected
  assert {"sample", "train", "benchmark", "evaluate"} <= modules
  scripts = {f"python tools/{p.name}" for p in (ROOT / "tools").glob("*.py")}
  assert set(listing.tools()) == scripts and scripts


def test_purposes_are_the_first_sentences_of_the_docstrings():
  for name, purpose in (listing.commands() | listing.tools()).items():
    assert purpose.endswith(".") and purpose[0].isupper() and len(purpose) < 150, (name, purpose)
  for name, purpose in listing.commands().items():
    docstring = importlib.import_module(name.removeprefix("python -m ")).__doc__
    assert f"`: {purpose[0].lower()}{purpose[1:]}" in " ".join(docstring.split())


def test_lists_without_jax():
  done = _run()
  assert (done.returncode, done.stderr) == (0, "")
  for name, purpose in (listing.commands() | listing.tools()).items():
    assert f"{name}\n    {purpose[:60]}" in done.stdout
  assert _run("--help").stdout == done.stdout


@pytest.mark.parametrize(
  ("argument", "hint"),
  [
    ("sample", "run python -m marche_jax.sample"),
    ("--out=x", "python -m marche_jax lists the commands"),
  ],
)
def test_other_arguments_are_one_line(argument, hint):
  done = _run(argument)
  assert (done.returncode, done.stdout) == (1, "")
  assert done.stderr == f"error: unexpected argument {argument!r}: {hint}\n"


def test_installed_without_the_repository_it_says_where_the_tools_are(monkeypatch, tmp_path):
  (tmp_path / "tools").mkdir()
  (tmp_path / "tools" / "other.py").write_text('"""Some other package\'s."""')
  monkeypatch.setattr(listing, "ROOT", tmp_path)
  assert "other" not in listing.listing()
  assert listing.listing().endswith("are in the repository.")


def test_public_names_are_imported_when_they_are_used():
  assert set(marche_jax.__all__) == {
    "Model", "ModelConfig", "SampleConfig", "generate", "load_model", "save_model", "to_images",
  }  # fmt: skip
  for name in marche_jax.__all__:
    assert getattr(marche_jax, name).__name__ == name
    assert name in dir(marche_jax)
  with pytest.raises(AttributeError, match="no attribute 'draw'"):
    marche_jax.draw  # noqa: B018
