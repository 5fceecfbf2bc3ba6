"""What the documents say is there: functions, files, links, and code that runs."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pathlib
import re

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md",
             "docs/measurements.md", "docs/policies.md")  # fmt: skip
MODULES = {p.stem for p in (ROOT / "marche_jax").iterdir() if p.suffix in ("", ".py")}


def ticked(document: str) -> set[str]:
  """What stands between backticks, outside of blocks of code."""
  text = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(), flags=re.DOTALL | re.MULTILINE)
  return set(re.findall(r"`([^`\n]+)`", text))


def resolve(name: str) -> object:
  """The object `module.function` or `module.Class.method`, relative to the package."""
  parts = ["marche_jax", *name.split(".")]
  for end in range(len(parts), 1, -1):
    try:
      found = importlib.util.find_spec(".".join(parts[:end]))
    except ModuleNotFoundError:  # a parent is no package
      continue
    if found:
      module = importlib.import_module(".".join(parts[:end]))
      return functools.reduce(getattr, parts[end:], module)
  raise AttributeError(name)


def names(document: str) -> list[str]:
  """The dotted names of a document that start with a module of the package."""
  dotted = (t for t in ticked(document) if re.fullmatch(r"[a-z_]+(\.\w+)+", t))
  return sorted(t for t in dotted if t.split(".")[0] in MODULES and not t.endswith(".py"))


def test_every_name_of_the_architecture_is_there():
  found = names("docs/architecture.md")
  assert len(found) > 60
  for name in found:
    assert resolve(name) is not None, name


def test_a_name_that_is_gone_is_found():
  for name in ("decoding.sampler.decoed", "decoding.sampler_.decode", "planning.draft.Draft.stop"):
    with pytest.raises(AttributeError):
      resolve(name)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_of_a_document_is_there(document):
  text = (ROOT / document).read_text()
  links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
  for link in links:
    if not link.startswith("http"):
      assert ((ROOT / document).parent / link).exists(), link
  paths = [t for t in ticked(document) if re.match(r"(marche_jax|tests|tools|docs|configs)/", t)]
  for path in paths:
    assert (ROOT / path).exists() or "NAME" in path, path


def test_every_anchor_is_a_heading():
  for document in DOCUMENTS:
    path = ROOT / document
    for link, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", path.read_text()):
      target = path.parent / link if link else path
      headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
      slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
      assert anchor in slugs, (document, link, anchor)


def test_every_module_that_a_document_runs_is_there():
  for document in DOCUMENTS:
    for name in re.findall(r"python -m (marche_jax[\w.]*)", (ROOT / document).read_text()):
      assert importlib.util.find_spec(name.rstrip(".")), (document, name)


def test_the_example_of_the_readme_runs():
  (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
  found: dict = {}
  exec(compile(code, "README.md", "exec"), found)
  assert found["images"].shape == (2, 28, 28, 1) and found["images"].dtype == np.uint8
