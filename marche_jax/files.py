"""Files: writing aside, directories that can be written, and paths as users type them.

Everything that writes a file goes through `atomic_write`, so that a reader (or a run that was
killed) finds either the whole file or none.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Gives a path to write to, which becomes `path` only where the block succeeds.

  The temporary file lies in the same directory (a rename is atomic only within a file system) and
  ends as `path` does (`np.savez` appends `.npz` to other names). Where the block raises, it is
  removed and `path` stays what it was.

  Raises:
    OSError: where the directory is missing or cannot be written, or the block wrote nothing; names
      `path`.
  """
  target = pathlib.Path(path)
  aside = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.tmp{target.suffix}")
  try:
    with naming(target, aside):
      yield aside
      aside.replace(target)
  finally:
    with contextlib.suppress(OSError):  # of a missing directory that is a file, for one
      aside.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(target: pathlib.Path, aside: pathlib.Path) -> Iterator[None]:
  """Names `target` in an OSError that names nothing (a full disk), or `aside`, where it is made."""
  try:
    yield
  except OSError as error:
    if error.errno is None or error.filename not in (None, str(aside), aside):
      raise
    raise OSError(error.errno, error.strerror, str(target)) from error


def check_writable(directory: str | os.PathLike[str]) -> pathlib.Path:
  """Creates a directory where it is missing, and tries to write in it.

  For command lines: better to refuse an output directory now than after an hour of sampling.

  Returns:
    the directory.

  Raises:
    ValueError: where it cannot be created or written; names it and says why.
  """
  directory = pathlib.Path(directory)
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".probe."):
      pass
  except OSError as error:
    reason = error.strerror or str(error)
    raise ValueError(f"{directory}: expected a directory that can be written: {reason}") from error
  return directory


def check_file_writable(path: str | os.PathLike[str], flag: str) -> pathlib.Path:
  """As `check_writable`, for a file: creates the directory that it is to lie in.

  Args:
    path: of the file, which may be there already.
    flag: what it was given for, as messages name it.

  Returns:
    the path.

  Raises:
    ValueError: where it is a directory, or cannot be written; names flag and path.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    raise ValueError(f"{flag}={path}: expected a file, found a directory")
  try:
    check_writable(path.absolute().parent)
  except ValueError as error:
    raise ValueError(f"{flag}={path}: {error}") from error
  return path


def user_path(text: str | os.PathLike[str], flag: str) -> pathlib.Path:
  """The path that a user typed: `~` is the home directory, as in a shell.

  A shell expands `~` in `--out ~/x` but not in `--out=~/x`, and no program does for a library's
  caller; without this a directory named `~` appears.

  Args:
    text: what was typed.
    flag: what it was given for, as messages name it: `--out`, or an argument's name.

  Raises:
    ValueError: for an empty text, or a home directory that is not known; names the flag.
  """
  if not os.fspath(text):
    raise ValueError(f"{flag}: expected a path, found an empty text")
  try:
    return pathlib.Path(text).expanduser()
  except RuntimeError as error:  # `~nobody`, or a user id without an entry and without HOME
    raise ValueError(f"{flag}={os.fspath(text)}: {error}") from error
