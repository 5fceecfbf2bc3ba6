"""`python -m marche_jax.evaluate`: what it prints and refuses."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from marche_jax import evaluate
from marche_jax.evaluation import quality


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, "-m", "marche_jax.evaluate", *arguments],
    capture_output=True, text=True, timeout=120,
  )  # fmt: skip


def test_report_is_printed_and_saved(tmp_path: pathlib.Path) -> None:
  images = np.random.default_rng(0).integers(0, 256, (40, 28, 28, 1), np.uint8)
  labels = np.arange(40, dtype=np.int32) % 9
  np.savez(tmp_path / "samples.npz", images, labels)
  done = command(f"--samples={tmp_path / 'samples.npz'}", f"--out={tmp_path / 'report.json'}")
  assert done.returncode == 0, done.stderr
  report = json.loads((tmp_path / "report.json").read_text())
  assert report["num_images"] == 40 and report["recognised_per_class"][9] is None
  assert report["recognised"] == quality.evaluate_samples(images, labels)["recognised"]
  assert done.stdout == evaluate.table(report) + "\n"


def test_what_is_no_sample_file(tmp_path: pathlib.Path) -> None:
  (tmp_path / "text.npz").write_text("not an archive")
  np.savez(tmp_path / "other.npz", images=np.zeros(3))
  with pytest.raises(ValueError, match=r"text\.npz: expected a samples\.npz"):
    evaluate.read_samples(tmp_path / "text.npz")
  np.save(tmp_path / "array.npy", np.zeros(3))
  with pytest.raises(ValueError, match=r"array\.npy: expected a samples\.npz"):
    evaluate.read_samples(tmp_path / "array.npy")
  with pytest.raises(ValueError, match="no array arr_0"):
    evaluate.read_samples(tmp_path / "other.npz")
  done = command(f"--samples={tmp_path / 'absent.npz'}")
  assert done.returncode == 1 and "absent.npz" in done.stderr and "Traceback" not in done.stderr
