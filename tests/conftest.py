"""Programs that several tests or their subprocesses compile are compiled once per run."""

from __future__ import annotations

import os
import shutil
import tempfile

_CACHE = tempfile.mkdtemp(prefix="marche_jax_tests_")
# Before jax is imported; subprocesses inherit it.
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"


def pytest_unconfigure() -> None:
  shutil.rmtree(_CACHE, ignore_errors=True)
