"""Training as a process: resumption after SIGKILL, non-finite losses, its files."""

from __future__ import annotations

import csv
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny

from marche_jax import checkpoint, trainer

SCRIPT = """
import pathlib, sys
import tiny
from marche_jax import trainer
work = pathlib.Path(sys.argv[1])
trainer.train(tiny.config(work / "data"), work / "run")
"""


def start(work: pathlib.Path) -> subprocess.Popen[bytes]:
  here = pathlib.Path(__file__).parent
  env = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
  return subprocess.Popen(
    [sys.executable, "-c", SCRIPT, str(work)],
    env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
  )  # fmt: skip


def make_data(work: pathlib.Path) -> None:
  (work / "data").mkdir(parents=True)
  tiny.write_idx(work / "data")


def test_killed_and_resumed_equals_uninterrupted(tmp_path: pathlib.Path) -> None:
  whole = tmp_path / "whole"
  make_data(whole)
  expected = trainer.train(tiny.config(whole / "data"), whole / "run")
  assert int(expected.step) == 15

  killed = tmp_path / "killed"
  make_data(killed)
  process = start(killed)
  metrics = killed / "run" / "metrics.csv"
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline:  # until it is past a checkpoint, in the second epoch
    if metrics.exists() and len(metrics.read_text().splitlines()) > 7:
      break
    assert process.poll() is None, process.stderr and process.stderr.read()
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()
  process = start(killed)
  _, stderr = process.communicate(timeout=240)
  assert process.returncode == 0, stderr

  ema, step = trainer.load_ema(killed / "run", tiny.config(killed / "data"))
  assert step == 15
  for a, b in zip(jax.tree.leaves(ema), jax.tree.leaves(expected.ema), strict=True):
    np.testing.assert_array_equal(a, np.asarray(b))
  with metrics.open(newline="") as file:
    steps = [int(row["step"]) for row in csv.DictReader(file)]
  assert steps == list(range(1, 16))


def test_a_non_finite_loss_names_update_and_checkpoint(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  make_data(tmp_path)
  real = trainer.update

  def poisoned(state, batch, **options):
    state, metrics = real(state, batch, **options)
    return state, {**metrics, "loss": metrics["loss"] + jax.numpy.where(state.step == 5, np.nan, 0)}

  monkeypatch.setattr(trainer, "update", poisoned)
  with pytest.raises(trainer.NonFiniteLossError, match=r"update 5.*checkpoints/3"):
    trainer.train(tiny.config(tmp_path / "data"), tmp_path / "run")


def test_bfloat16_and_remat_train(tmp_path: pathlib.Path) -> None:
  make_data(tmp_path)
  config = tiny.config(tmp_path / "data", epochs=1, dtype="bfloat16", remat=True)
  state = trainer.train(config, tmp_path / "run")
  assert all(x.dtype == np.float32 for x in jax.tree.leaves(state.params))
  assert all(bool(np.isfinite(x).all()) for x in jax.tree.leaves(state.ema))


def test_the_export_is_a_model(tmp_path: pathlib.Path) -> None:
  make_data(tmp_path)
  config = tiny.config(tmp_path / "data", epochs=1)
  state = trainer.train(config, tmp_path / "run")
  ema, _ = trainer.load_ema(tmp_path / "run", config)
  checkpoint.save_model(tmp_path / "model", "mar", config.model, ema, sample_config=config.sample)
  model = checkpoint.load_model(tmp_path / "model")
  assert model.sample_config == config.sample
  for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(state.ema), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
