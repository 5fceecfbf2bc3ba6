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
  (["--config=syntax.py"], "--config=syntax.py: line 2: SyntaxError: "),
  (["--config=nothing.py"], "--config=nothing.py: expected a function get_config() in it"),
  (["--config=imports.py"], "--config=imports.py: line 1: ModuleNotFoundError: No module named"),
  (["--config=raises.py"], "--config=raises.py: line 2: KeyError: 'boom'"),
  (["--config=field.py"], "--config=field.py: line 3: TypeError: "),
  (["--config=/"], "--config: [Errno 21] Is a directory: '/'"),
]
FILES = {
  "wrong.py": "def get_config():\n  return 3\n",
  "syntax.py": "x = 1\ndef get_config(:\n",
  "nothing.py": "x = 1\n",
  "imports.py": "import absent_module\n",
  "raises.py": "def get_config():\n  raise KeyError('boom')\n",
  "field.py": "from marche_jax import config\ndef get_config():\n  config.ModelConfig(sizze=3)\n",
}
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
  for name, content in FILES.items():
    (path / name).write_text(content)
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


ENDED = """
import os, signal, sys
from marche_jax import flags
def main():
  try:
    os.kill(os.getpid(), getattr(signal, signal_name))
    signal.pause()
  except KeyboardInterrupt as interrupt:
    if note:
      interrupt.add_note("all is kept")
    raise
signal_name, *note = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
del sys.argv[1:]
flags.run(main)
"""


@pytest.mark.parametrize(
  ("argv", "code", "line"),
  [
    (["SIGINT"], 130, "interrupted\n"),
    (["SIGINT", "note"], 130, "interrupted: all is kept\n"),
    (["SIGTERM", "note"], 143, "terminated: all is kept\n"),
  ],
)
def test_an_interrupt_is_one_line(argv, code, line):
  done = subprocess.run(
    [sys.executable, "-c", ENDED, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60
  )
  assert (done.returncode, done.stdout, done.stderr) == (code, "", line)


CACHE = """
import jax
from marche_jax import flags
flags.define_compilation_cache()
flags.run(lambda: (flags.enable_compilation_cache(), print(jax.config.jax_compilation_cache_dir)))
"""


def cache_of(home: str | None, *argv: str) -> subprocess.CompletedProcess[str]:
  """Where programs are kept; `home` None: no HOME, and a user id that nobody has."""
  code, env = CACHE, {k: v for k, v in os.environ.items() if "JAX_COMPILATION" not in k}
  env["HOME"] = str(home)
  if home is None:
    del env["HOME"]
    code = "import pwd\ndef unknown(uid):\n  raise KeyError\npwd.getpwuid = unknown\n" + CACHE
  return subprocess.run(
    [sys.executable, "-c", code, *argv], cwd=ROOT, env=env, capture_output=True, text=True,
    timeout=60,
  )  # fmt: skip


def test_programs_are_kept_in_the_home_directory_where_there_is_one(tmp_path):
  (tmp_path / "file").write_text("")
  done = cache_of(str(tmp_path))
  assert (done.stdout, done.stderr) == (f"{tmp_path / '.cache' / 'marche_jax'}\n", "")
  assert cache_of(str(tmp_path), "--compilation_cache=~/x").stdout == f"{tmp_path / 'x'}\n"
  assert [p.name for p in tmp_path.iterdir()] == ["file"]
  for home in (None, str(tmp_path / "file")):
    done = cache_of(home)
    assert (done.returncode, done.stdout) == (0, "None\n")
    assert done.stderr.startswith("compiled programs are not kept: ")
    assert done.stderr.count("\n") == 1
  done = cache_of(None, "--compilation_cache=")
  assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")
  done = cache_of(None, f"--compilation_cache={tmp_path / 'file' / 'x'}")
  assert done.returncode == 1 and done.stderr.startswith("error: --compilation_cache=")
