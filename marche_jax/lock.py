"""One run at a time in a directory: a file that says who writes there."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import secrets
import socket
from collections.abc import Iterator

NAME = "run.lock"


@contextlib.contextmanager
def only_run(directory: pathlib.Path) -> Iterator[None]:
  """Keeps other runs out of a directory, which exists, while the block runs.

  The lock of a process of this host that is gone (killed, out of memory) is taken over. Whether one
  of another host is gone cannot be seen from here: it has to be removed by hand.

  Raises:
    ValueError: where another run holds the directory; names host, process and file.
    OSError: where the directory cannot be written.
  """
  path, own = directory / NAME, json.dumps(_this_process()) + "\n"
  for _ in range(2):
    try:
      _create(path, own)
      break
    except FileExistsError:
      _remove_stale(path)
  else:
    raise ValueError(f"{directory}: another run has just started to write there")
  try:
    yield
  finally:
    with contextlib.suppress(OSError):
      if path.read_text() == own:
        path.unlink()


def _this_process() -> dict[str, object]:
  now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
  return {"host": socket.gethostname(), "pid": os.getpid(), "since": now,
          "process_started": _start_of(os.getpid())}  # fmt: skip


def _start_of(pid: int) -> str | None:
  """When a process started, in clock ticks since the machine did; None where Linux does not say.

  Tells a process from a later one of the same number (in containers numbers are soon used again).
  """
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
  except (OSError, IndexError):
    return None


def _create(path: pathlib.Path, content: str) -> None:
  file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
  try:
    with os.fdopen(file, "wb") as opened:
      opened.write(content.encode())
  except OSError:  # a full disk: an empty lock would be taken over by nobody
    path.unlink(missing_ok=True)
    raise


def _remove_stale(path: pathlib.Path) -> None:
  """Removes the lock of a run that is over; ValueError where it is not known to be."""
  try:
    content = path.read_text()
  except FileNotFoundError:  # given up in this moment
    return
  try:
    holder = json.loads(content)
    host, pid, since = holder["host"], int(holder["pid"]), holder["since"]
    gone = host == socket.gethostname() and not _runs(pid, holder["process_started"])
    who = f"process {pid} on {host} writes there since {since}"
  except (ValueError, KeyError, TypeError):
    gone, who = False, "another run writes there"
  if not gone:
    raise ValueError(
      f"{path.parent}: {who}; take another directory, or remove {path} where that run is over"
    )
  aside = path.with_name(f".{NAME}.{secrets.token_hex(4)}")
  with contextlib.suppress(FileNotFoundError):  # another run takes it over in this moment
    path.rename(aside)
    if aside.read_text() != content:  # it already has, and this was its own lock
      with contextlib.suppress(FileExistsError):
        os.link(aside, path)
    aside.unlink()


def _runs(pid: int, started: str | None) -> bool:
  """Whether the process that had this number, and started then, still runs on this host."""
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except OSError:  # somebody else's
    pass
  now = _start_of(pid)
  return now is None or started is None or now == started
