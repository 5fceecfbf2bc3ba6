"""What the command lines share: `--config`, the compilation cache, and errors of one line.

flags.define_config("configs/mar_base.py")

def main() -> None:
  config = flags.parsed_config()
  ...

if __name__ == "__main__":
  flags.run(main)
"""

from __future__ import annotations

import contextlib
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from marche_jax import config as config_lib
from marche_jax.config import Config


def define_config(default: str | None = None) -> None:
  """Defines `--config=FILE` and `--config.field=value`.

  FILE is Python; its `get_config()` returns `marche_jax.config.mutable(Config(...))`.

  Args:
    default: path of the file where the flag is not given; None where a command needs none.
  """
  with _one_line_errors(sys.argv):  # a default file takes its overrides here already
    config_flags.DEFINE_config_file(
      "config", default, "File with a get_config(); override with --config.sample.num_iter=32 etc."
    )


def parsed_config() -> Config:
  """The configuration that the command line asks for, validated and frozen.

  Raises:
    ValueError: no file was given, the file gives something else, or a field is out of range.
  """
  config = flags.FLAGS.config
  try:
    frozen_class = getattr(config, "frozen_class", None)
  except OSError as error:  # ml_collections reports a file that it could not read at first use
    raise ValueError(_unreadable(error)) from error
  if config is None:
    raise ValueError("--config: expected a file such as configs/mar_base.py, found none")
  if frozen_class is not Config:
    raise ValueError(
      "--config: expected get_config() to return marche_jax.config.mutable(Config(...)), "
      f"found {type(config).__name__}"
    )
  return config_lib.freeze(config)


def define_compilation_cache() -> None:
  """Defines `--compilation_cache=DIR`."""
  flags.DEFINE_string(
    "compilation_cache",
    str(pathlib.Path.home() / ".cache" / "marche_jax"),
    "Where compiled programs are kept for the next start; '' keeps none.",
  )


def enable_compilation_cache() -> None:
  """Makes jax keep compiled programs where `--compilation_cache` says."""
  directory = flags.FLAGS.compilation_cache
  if directory:
    jax.config.update("jax_compilation_cache_dir", directory)
    # The default, a second, would keep none of the small programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def run(main: Callable[[], None]) -> NoReturn:
  """Parses the flags, calls `main` and exits; a mistake of the user is one line and exit code 1.

  What counts as such are ValueError, OSError and ImportError; --verbosity=1 shows their traceback.
  """

  def checked(rest: list[str]) -> None:
    if len(rest) > 1:
      _fail(f"unexpected argument {rest[1]!r}: flags look like --name=value")
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # app.run sets INFO, and Orbax is talkative
    try:
      main()
    except (ValueError, OSError, ImportError) as error:
      if logging.vlog_is_on(1):
        raise
      _fail(error)

  app.run(checked, flags_parser=_parse)
  raise AssertionError("app.run exits")


def _parse(argv: list[str]) -> list[str]:
  with _one_line_errors(argv):
    return flags.FLAGS(argv)
  raise AssertionError("_one_line_errors exits")


@contextlib.contextmanager
def _one_line_errors(argv: list[str]) -> Iterator[None]:
  """Ends the program with one line where a flag cannot be read."""
  try:
    yield
    # ml_collections raises KeyError, AttributeError or TypeError for a field that is not there.
  except (KeyError, AttributeError, TypeError) as error:
    unknown = re.search(r"Field (\w+) not found|>\.(\w+) does not exist", str(error))
    if unknown is None:
      raise
    field = unknown[1] or unknown[2]
    given = [a.split("=")[0] for a in argv if re.match(rf"--?config\.(\w+\.)*{field}\b", a)]
    _fail(f"unknown configuration field: {given[0] if given else field}")
  except OSError as error:
    _fail(_unreadable(error))
  except flags.Error as error:
    _fail(error)


def _unreadable(error: OSError) -> str:
  """ml_collections' message about a file has several lines; the last one is the reason."""
  return f"--config: {str(error).splitlines()[-1]}"


def _fail(message: object) -> NoReturn:
  print("error: " + " ".join(str(message).split()), file=sys.stderr)
  sys.exit(1)
