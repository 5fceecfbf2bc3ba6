"""The `--config` flag: overrides by field, and mistakes answered by one line and exit code 1."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

PROGRAM = """
from marche_jax import flags
flags.define_config()
def main():
  config = flags.parsed_config()
  hash(config)  # frozen
  print(config.sample.num_iter, config.model.mlp_ratio, config.vae, config.train.remat)
flags.run(main)
"""
CONFIG = """
from marche_jax.config import Config, mutable
def get_config():
  return mutable(Config())
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  path = tmp_path_factory.mktemp("flags")
  (path / "program.py").write_text(PROGRAM)
  (path / "config.py").write_text(CONFIG)
  (path / "wrong.py").write_text("def get_config():\n  return 3\n")
  return path


def run(directory: pathlib.Path, *flags: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, "program.py", *flags], cwd=directory, env={"PYTHONPATH": str(ROOT)},
    capture_output=True, text=True, check=False,
  )  # fmt: skip


def test_fields_are_overridden_and_typed(directory):
  done = run(
    directory, "--config=config.py", "--config.sample.num_iter=32", "--config.model.mlp_ratio=2",
    "--config.vae=None", "--config.train.remat=True",
  )  # fmt: skip
  assert (done.returncode, done.stdout, done.stderr) == (0, "32 2.0 None True\n", "")


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--config.sample.nun_iter=3"], "unknown configuration field: --config.sample.nun_iter"),
    (["--config.smaple.num_iter=3"], "unknown configuration field: --config.smaple.num_iter"),
    (["--config.sample.num_iter=1.5"], "flag --config.sample.num_iter=1.5: invalid literal"),
    (["--config.train.remat=perhaps"], "flag --config.train.remat=perhaps: "),
    (["--config.sample.num_iter=0"], "sample.num_iter=0: expected an integer of at least 1"),
    (["--config.sample.cfg=-1"], "sample.cfg=-1.0: expected a number in [0.0, 10000.0]"),
    (["--nun_iter=3"], "Unknown command line flag 'nun_iter'"),
    (["stray"], "unexpected argument 'stray'"),
    (["--config=absent.py"], "--config: [Errno 2] No such file or directory: 'absent.py'"),
    (["--config=wrong.py"], "--config: expected get_config() to return"),
    (["--config="], "--config: "),
  ],
)
def test_mistakes_are_one_line(flags, message, directory):
  done = run(directory, "--config=config.py", *flags)
  assert done.returncode == 1
  assert done.stdout == ""
  assert done.stderr.startswith(f"error: {message}")
  assert done.stderr.count("\n") == 1


def test_a_config_is_asked_for_where_there_is_no_default(directory):
  done = run(directory)
  assert done.returncode == 1
  assert done.stderr == (
    "error: --config: expected a file such as configs/mar_base.py, found none\n"
  )


def test_the_traceback_is_shown_on_request(directory):
  done = run(directory, "--config=config.py", "--config.sample.num_iter=0", "--verbosity=1")
  assert done.returncode == 1
  assert "Traceback" in done.stderr and "ValueError: sample.num_iter=0" in done.stderr
