"""`python -m marche_jax`: lists the commands and what each is for.

The purposes are the first sentences of the modules' docstrings, read without importing the modules,
so that the list is there at once, without jax.
"""

from __future__ import annotations

import ast
import pathlib
import re
import sys
import textwrap
from typing import NoReturn

PACKAGE = pathlib.Path(__file__).parent
ROOT = PACKAGE.parent  # of the repository, or the folder that a wheel was installed into


def commands() -> dict[str, str]:
  """The purpose of every `python -m marche_jax.NAME`, in the order of their names.

  A command is a module of the package whose docstring starts with the command itself.
  """
  found = {}
  for path in sorted(PACKAGE.glob("*.py")):
    command = rf"`python -m marche_jax\.{path.stem}\b[^`]*`: "
    if match := re.match(command, summary := _summary(path)):
      purpose = summary[match.end() :]
      found[f"python -m marche_jax.{path.stem}"] = purpose[:1].upper() + purpose[1:]
  return found


def tools() -> dict[str, str]:
  """The purpose of every script in `tools/`; none where the package was installed from a wheel."""
  if not (ROOT / "pyproject.toml").exists():  # some other project's folder of this name
    return {}
  return {f"python tools/{path.name}": _summary(path) for path in sorted(ROOT.glob("tools/*.py"))}


def _summary(path: pathlib.Path) -> str:
  """The first sentence of a module's docstring, on one line; "" where it has none."""
  docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
  paragraph = " ".join(docstring.split("\n\n")[0].split())
  return re.split(r"(?<=\.) ", paragraph)[0]


def listing() -> str:
  """What the command prints."""
  lines = ["MAR in JAX. Every command has --help.", ""]
  for name, purpose in (commands() | tools()).items():
    lines += [name, *textwrap.wrap(purpose, 96, initial_indent="    ", subsequent_indent="    ")]
  if not tools():
    lines += ["", "The configurations (configs/) and the tools (tools/) are in the repository."]
  return "\n".join(lines)


def main(arguments: list[str]) -> None:
  """Prints the list; anything but a call for help is an error."""
  others = [a for a in arguments if a not in ("-h", "-help", "--help")]
  if others:
    _fail(others[0])
  print(listing())


def _fail(argument: str) -> NoReturn:
  command = f"python -m marche_jax.{argument}"
  hint = f"run {command}" if command in commands() else "python -m marche_jax lists the commands"
  print(f"error: unexpected argument {argument!r}: {hint}", file=sys.stderr)
  sys.exit(1)


if __name__ == "__main__":
  main(sys.argv[1:])
