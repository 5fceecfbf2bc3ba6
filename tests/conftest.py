"""Two things of every run: programs are compiled once, and large runs use all cores."""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

FEW_FILES = 5  # so many or fewer are run before processes for them have started
MOST_PROCESSES = 8

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers and subprocesses inherit it
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="marche_jax_tests_")
# Before jax is imported.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
  """What `-n auto` means: a process per core, none beside this one for a few files."""
  paths = [pathlib.Path(arg.split("::")[0]) for arg in config.args]
  files = {
    file for path in paths for file in (path.rglob("test_*.py") if path.is_dir() else [path])
  }
  if len(files) <= FEW_FILES:
    return 0
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  return min(cores, MOST_PROCESSES)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
  """Of slow tests a file is one process's: what it compiles in the background is for all of it."""
  return LoadFileScheduling(config, log) if config.option.markexpr == "slow" else None


def pytest_unconfigure() -> None:
  if "PYTEST_XDIST_WORKER" not in os.environ:
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
