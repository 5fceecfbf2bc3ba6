"""Writing aside, directories that can be written, paths as users type them."""

from __future__ import annotations

import errno
import os
import pathlib
import stat

import numpy as np
import pytest

from marche_jax import files


def test_atomic_write_replaces_the_file_at_the_end_of_the_block(tmp_path):
  path = tmp_path / "result.npz"
  path.write_bytes(b"old")
  with files.atomic_write(path) as aside:
    assert aside.parent == tmp_path and aside.suffix == ".npz" and aside != path
    np.savez(aside, x=np.arange(3))  # appends .npz to any other name
    assert path.read_bytes() == b"old"
  with np.load(path) as file:
    np.testing.assert_array_equal(file["x"], np.arange(3))
  assert os.listdir(tmp_path) == ["result.npz"]


def test_atomic_write_gives_the_permissions_of_an_ordinary_file(tmp_path):
  (tmp_path / "ordinary").write_bytes(b"")
  with files.atomic_write(tmp_path / "x.json") as aside:
    aside.write_text("{}")
  modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "x.json")]
  assert modes[0] == modes[1]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_atomic_write_leaves_the_old_file_where_the_block_fails(tmp_path, failure):
  path = tmp_path / "report.json"
  path.write_text("old")
  with pytest.raises(failure), files.atomic_write(path) as aside:
    aside.write_text("half of")
    raise failure
  assert path.read_text() == "old" and os.listdir(tmp_path) == ["report.json"]


def test_atomic_write_that_wrote_nothing_is_an_error(tmp_path):
  with pytest.raises(FileNotFoundError), files.atomic_write(tmp_path / "x.json"):
    pass
  assert os.listdir(tmp_path) == []


def test_check_writable_creates_the_directory_and_leaves_no_trace(tmp_path):
  path = tmp_path / "a" / "b"
  assert files.check_writable(str(path)) == path
  assert path.is_dir() and os.listdir(path) == []
  (path / "kept").write_text("x")
  files.check_writable(path)
  assert os.listdir(path) == ["kept"]


@pytest.mark.parametrize("below", ["", "sub"])
def test_check_writable_refuses_a_file(tmp_path, below):
  (tmp_path / "file").write_text("x")
  path = tmp_path / "file" / below
  with pytest.raises(ValueError, match=r"file.*expected a directory that can be written"):
    files.check_writable(path)
  assert (tmp_path / "file").read_text() == "x"


def test_check_writable_names_a_directory_without_permission(tmp_path, monkeypatch):
  def refuse(*args, **kwargs):
    raise PermissionError(13, "Permission denied")

  # For root, who runs many a container, no permission bits refuse anything.
  monkeypatch.setattr(files.tempfile, "NamedTemporaryFile", refuse)
  with pytest.raises(ValueError, match=f"{tmp_path.name}.*Permission denied"):
    files.check_writable(tmp_path)
  monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
  with pytest.raises(ValueError, match=r"new.*Permission denied"):
    files.check_writable(tmp_path / "new")


def test_user_path_expands_the_home_directory(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert files.user_path("~/models/a", "--checkpoint") == tmp_path / "models" / "a"
  assert files.user_path(pathlib.Path("~"), "directory") == tmp_path
  for text in ("relative/~/x", "/a/b", "."):
    assert files.user_path(text, "--out") == pathlib.Path(text)


def test_user_path_refuses_no_path_and_no_home_by_the_flag():
  with pytest.raises(ValueError, match=r"--out: expected a path, found an empty text"):
    files.user_path("", "--out")
  with pytest.raises(ValueError, match=r"--src=~nobody-at-all/x: .*home directory"):
    files.user_path("~nobody-at-all/x", "--src")


def test_atomic_write_names_the_file_where_the_system_names_none(tmp_path):
  """A full disk: OSError of a write knows no path, and that of the file aside one that is gone."""
  path = tmp_path / "report.json"
  with pytest.raises(OSError, match=f"No space left on device: '{path}'") as error:
    with files.atomic_write(path):
      raise OSError(errno.ENOSPC, "No space left on device")
  assert error.value.errno == errno.ENOSPC
  with pytest.raises(FileNotFoundError, match=rf"'{tmp_path}/absent/x\.json'"):
    with files.atomic_write(tmp_path / "absent" / "x.json") as aside:
      aside.write_text("x")
  with pytest.raises(NotADirectoryError, match=rf"'{path}/x\.json'"):
    path.write_text("a file")
    with files.atomic_write(path / "x.json") as aside:
      aside.write_text("x")
  with pytest.raises(FileNotFoundError, match="'elsewhere'"):  # of another file
    with files.atomic_write(path):
      raise FileNotFoundError(errno.ENOENT, "No such file", "elsewhere")


def test_check_file_writable(tmp_path):
  path = tmp_path / "new" / "report.json"
  assert files.check_file_writable(str(path), "--out") == path
  assert path.parent.is_dir() and not path.exists()
  path.write_text("old")
  files.check_file_writable(path, "--out")
  assert path.read_text() == "old"
  with pytest.raises(ValueError, match=f"--out={tmp_path}: expected a file, found a directory"):
    files.check_file_writable(tmp_path, "--out")
  with pytest.raises(ValueError, match=rf"--out={path}/x: .*expected a directory that can be"):
    files.check_file_writable(path / "x", "--out")
