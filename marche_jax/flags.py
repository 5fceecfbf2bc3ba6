"""What the command lines share: `--config`, the compilation cache, and endings of one line.

flags.define_config("configs/mar_base.py")

def main() -> None:
  config = flags.parsed_config()
  ...

if __name__ == "__main__":
  flags.run(main)
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from marche_jax import config as config_lib
from marche_jax.config import Config
from marche_jax.files import user_path

DEFAULT_CACHE = pathlib.Path("~") / ".cache" / "marche_jax"


def define_config(default: str | None = None) -> None:
  """Defines `--config=FILE` and `--config.field=value`.

  FILE is Python; its `get_config()` returns `marche_jax.config.mutable(Config(...))`.

  Args:
    default: path of the file where the flag is not given; None where a command needs none.
  """
  config_flags.DEFINE_config_file(
    "config", None, "File with a get_config(); override with --config.sample.num_iter=32 etc."
  )
  flags.FLAGS["config"].parser = _ConfigFileParser("config")
  with _one_line_errors(sys.argv):  # a default file takes its overrides here already
    flags.FLAGS.set_default("config", default)


class _BadConfigError(flags.Error):
  """A configuration file that does not give a configuration."""


class _ConfigFileParser(ConfigFileFlagParser):
  """Names the file, and the line of it, whatever goes wrong in there."""

  def parse(self, path: str) -> object:
    try:
      config = super().parse(path)
      getattr(config, "frozen_class", None)  # a file that was not read is reported at first use
    except OSError as error:  # ml_collections' message has several lines; the last is the reason
      raise _BadConfigError(f"--config: {str(error.__cause__).splitlines()[-1]}") from error
    except Exception as error:
      raise _BadConfigError(f"--config={path}: {_what_failed(path, error)}") from error
    return config


def _what_failed(path: str, error: BaseException) -> str:
  """An error in a configuration file, in one line, with the number of the file's line."""
  if isinstance(error, AttributeError) and error.name == "get_config":
    return "expected a function get_config() in it"
  if isinstance(error, (TypeError, ValueError)) and error.__context__ is not None:
    error = error.__context__  # ml_collections raises another one, whose text is a traceback
  if isinstance(error, SyntaxError):
    where = "" if error.lineno is None else f"line {error.lineno}: "
    return f"{where}{type(error).__name__}: {error.msg}"
  own = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
  where = f"line {own[-1]}: " if own else ""
  return f"{where}{type(error).__name__}: {error}"


def parsed_config() -> Config:
  """The configuration that the command line asks for, validated and frozen.

  Raises:
    ValueError: no file was given, the file gives something else, or a field is out of range.
  """
  config = flags.FLAGS.config
  if config is None:
    raise ValueError("--config: expected a file such as configs/mar_base.py, found none")
  if getattr(config, "frozen_class", None) is not Config:
    raise ValueError(
      "--config: expected get_config() to return marche_jax.config.mutable(Config(...)), "
      f"found {type(config).__name__}"
    )
  return config_lib.freeze(config)


def define_compilation_cache() -> None:
  """Defines `--compilation_cache=DIR`."""
  flags.DEFINE_string(
    "compilation_cache",
    str(DEFAULT_CACHE),
    "Where compiled programs are kept for the next start; '' keeps none.",
  )


def enable_compilation_cache() -> None:
  """Makes jax keep compiled programs where `--compilation_cache` says.

  Where the default cannot be used (an unknown user id without HOME, a home that cannot be written),
  it says so and none are kept.

  Raises:
    ValueError: for a directory that was asked for and cannot be written.
  """
  directory, asked = flags.FLAGS.compilation_cache, flags.FLAGS["compilation_cache"].present
  if not directory:
    return
  try:
    path = user_path(directory, "--compilation_cache")
    if not _can_be_written(path):
      raise ValueError(f"--compilation_cache={directory}: expected a directory that can be written")
  except ValueError as error:
    if asked:
      raise
    say(f"compiled programs are not kept: {error}")
    return
  jax.config.update("jax_compilation_cache_dir", str(path))
  # The default, a second, would keep none of the small programs.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _can_be_written(directory: pathlib.Path) -> bool:
  """Whether a directory can be written, or made where it is missing; makes nothing."""
  existing = next(path for path in (directory.absolute(), *directory.absolute().parents)
                  if os.path.exists(path))  # fmt: skip
  return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def say(text: str) -> None:
  """Tells the user on stderr what is going on; results go to stdout."""
  print(text, file=sys.stderr, flush=True)


class _Terminated(KeyboardInterrupt):
  """SIGTERM; what a KeyboardInterrupt ends in order, it does too."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
  raise _Terminated


def run(main: Callable[[], None]) -> NoReturn:
  """Parses the flags, calls `main` and exits; whatever ends it early is one line.

  A mistake of the user has exit code 1. What counts as such are ValueError, OSError and
  ImportError; --verbosity=1 shows their traceback. Ctrl-C and SIGTERM have 130 and 143; the line
  holds the notes of the exception (`BaseException.add_note`), which say what is kept.
  """

  def checked(rest: list[str]) -> None:
    if len(rest) > 1:
      _fail(f"unexpected argument {rest[1]!r}: flags look like --name=value")
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # app.run sets INFO, and Orbax is talkative
    signal.signal(signal.SIGTERM, _terminate)
    try:
      main()
    except KeyboardInterrupt as interrupt:
      for number in (signal.SIGINT, signal.SIGTERM):  # no traceback from the exit of libraries
        signal.signal(number, signal.SIG_IGN)
      terminated = isinstance(interrupt, _Terminated)
      ended = "terminated" if terminated else "interrupted"
      say(": ".join([ended, *getattr(interrupt, "__notes__", [])[:1]]))
      sys.exit(128 + (signal.SIGTERM if terminated else signal.SIGINT))
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
  except flags.Error as error:
    _fail(error)


def _fail(message: object) -> NoReturn:
  print("error: " + " ".join(str(message).split()), file=sys.stderr)
  sys.exit(1)
