"""The `--config` flag: overrides by field, and mistakes answered by one line and exit code 1."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Runs every command line of its standard input in a fork, so that modules are imported once.
PROGRAM = """
import json, os, sys, traceback
from marche_jax import flags
flags.define_config()
def main():
  config = flags.parsed_config()
  hash(config)  # frozen
  print(config.sample.num_iter, config.model.mlp_ratio, config.vae, config.train.remat)
for i, argv in enumerate(json.load(sys.stdin)):
  child = os.fork()
  if child == 0:
    for stream in (1, 2):
      os.dup2(os.open(f"{i}.{stream}", os.O_CREAT | os.O_WRONLY), stream)
    sys.argv = ["program.py", *argv]
    code = 1
    try:
      flags.run(main)
    except SystemExit as exit:
      code = exit.code or 0
    except Exception:
      traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)  # without the exit handlers of libraries whose threads a fork has not
  with open(f"{i}.code", "w") as file:
    file.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""
CONFIG = """
from marche_jax.config import Config, mutable
def get_config():
  return mutable(Config())
"""


MISTAKES = [
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
]
GOOD = ["--config.sample.num_iter=32", "--config.model.mlp_ratio=2", "--config.vae=None",
        "--config.train.remat=True"]  # fmt: skip
COMMANDS = {
  "good": ["--config=config.py", *GOOD],
  "none": [],
  "traceback": ["--config=config.py", "--config.sample.num_iter=0", "--verbosity=1"],
} | {message: ["--config=config.py", *flags] for flags, message in MISTAKES}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, tuple[int, str, str]]:
  """Exit code, standard output and standard error of each of COMMANDS."""
  path = tmp_path_factory.mktemp("flags")
  (path / "config.py").write_text(CONFIG)
  (path / "wrong.py").write_text("def get_config():\n  return 3\n")
  subprocess.run(
    [sys.executable, "-c", PROGRAM], cwd=path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    input=json.dumps(list(COMMANDS.values())), text=True, check=True,
  )  # fmt: skip
  return {
    name: (int((path / f"{i}.code").read_text()), *((path / f"{i}.{n}").read_text() for n in "12"))
    for i, name in enumerate(COMMANDS)
  }


def test_fields_are_overridden_and_typed(outcomes):
  assert outcomes["good"] == (0, "32 2.0 None True\n", "")


@pytest.mark.parametrize("message", [message for _, message in MISTAKES])
def test_mistakes_are_one_line(message, outcomes):
  code, out, err = outcomes[message]
  assert (code, out) == (1, "")
  assert err.startswith(f"error: {message}")
  assert err.count("\n") == 1


def test_a_config_is_asked_for_where_there_is_no_default(outcomes):
  message = "error: --config: expected a file such as configs/mar_base.py, found none\n"
  assert outcomes["none"] == (1, "", message)


def test_the_traceback_is_shown_on_request(outcomes):
  code, _, err = outcomes["traceback"]
  assert code == 1
  assert "Traceback" in err and "ValueError: sample.num_iter=0" in err
