"""One run at a time in a directory."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from marche_jax import lock


def test_a_second_run_is_refused_and_the_first_is_not_disturbed(tmp_path: pathlib.Path) -> None:
  with lock.only_run(tmp_path):
    held = (tmp_path / lock.NAME).read_text()
    with (
      pytest.raises(ValueError, match=rf"process {os.getpid()} on .* remove .*{lock.NAME}"),
      lock.only_run(tmp_path),
    ):
      raise AssertionError
    assert (tmp_path / lock.NAME).read_text() == held
  assert list(tmp_path.iterdir()) == []


def test_it_is_given_back_where_the_run_fails(tmp_path: pathlib.Path) -> None:
  with pytest.raises(KeyboardInterrupt), lock.only_run(tmp_path):
    raise KeyboardInterrupt
  assert list(tmp_path.iterdir()) == []


def holder(**changes: object) -> str:
  return json.dumps({**lock._this_process(), **changes})


def test_that_of_a_process_which_is_gone_is_taken_over(tmp_path: pathlib.Path) -> None:
  gone = subprocess.Popen([sys.executable, "-c", ""])
  gone.wait()
  contents = [holder(pid=gone.pid)]
  if lock._start_of(os.getpid()) is not None:  # another process had this number before
    contents.append(holder(process_started="1"))
  for content in contents:
    (tmp_path / lock.NAME).write_text(content)
    with lock.only_run(tmp_path):
      assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  "content",
  [holder(host="elsewhere", pid=1), "", "[]", "{}"],
  ids=["another host", "empty", "no object", "no fields"],
)
def test_one_that_cannot_be_judged_is_respected(tmp_path: pathlib.Path, content: str) -> None:
  (tmp_path / lock.NAME).write_text(content)
  with pytest.raises(ValueError, match="where that run is over"), lock.only_run(tmp_path):
    raise AssertionError
  assert (tmp_path / lock.NAME).read_text() == content


FULL = """
import pathlib, resource, signal, sys
from marche_jax import lock
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
  with lock.only_run(pathlib.Path(sys.argv[1])):
    raise AssertionError
except OSError as error:
  print(error)
"""


def test_a_full_disk_leaves_no_lock(tmp_path: pathlib.Path) -> None:
  done = subprocess.run(
    [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True
  )
  assert "large" in done.stdout and list(tmp_path.iterdir()) == []
