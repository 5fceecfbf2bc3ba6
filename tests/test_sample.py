"""`python -m marche_jax.sample`: its files, its resumption, its errors."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from marche_jax import checkpoint, sample
from marche_jax.checkpoint import Model
from marche_jax.models import mar


@pytest.fixture(scope="module")
def model() -> Model:
  params = mar.init_params(tiny.MODEL, jax.random.key(0))
  return Model(tiny.MODEL, params, sample_config=tiny.SAMPLE)


def draw(model: Model, out: pathlib.Path, num: int = 6, batch_size: int = 4, **options) -> dict:
  labels = sample.choose_labels(None, num, tiny.MODEL.class_num)
  return sample.run(
    model, tiny.SAMPLE, labels, out=out, batch_size=batch_size, seed=3, **options
  )  # fmt: skip


def test_files_and_batch_size(model: Model, tmp_path: pathlib.Path) -> None:
  report = draw(model, tmp_path / "a", save_latents=True)
  assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
    "grid.png", "report.json", "samples.npz",
  ]  # fmt: skip
  with np.load(tmp_path / "a" / "samples.npz") as file:
    images, labels, latents = file["arr_0"], file["arr_1"], file["latents"]
  assert images.shape == (6, 8, 8, 1) and images.dtype == np.uint8
  assert labels.tolist() == [0, 0, 1, 2, 2, 3] and labels.dtype == np.int32
  assert latents.shape == (6, 1, 8, 8) and latents.dtype == np.float32
  assert Image.open(tmp_path / "a" / "grid.png").size[0] > 3 * 8
  assert json.loads((tmp_path / "a" / "report.json").read_text()) == report
  assert report["images_drawn"] == 6 and report["run_seconds"] > 0

  draw(model, tmp_path / "b", batch_size=3, save_latents=True)
  with np.load(tmp_path / "b" / "samples.npz") as file:
    np.testing.assert_allclose(file["latents"], latents, atol=1e-3 * latents.std())


def test_profile_splits_the_time(model: Model, tmp_path: pathlib.Path) -> None:
  report = draw(model, tmp_path, profile=True)
  assert set(report["split_seconds"]) == {"transformer", "head"}
  assert min(report["split_seconds"].values()) > 0
  assert json.loads((tmp_path / "report.json").read_text()) == report
  assert "split_seconds" not in draw(model, tmp_path / "without")


def test_an_interrupted_run_goes_on(
  model: Model, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  draw(model, tmp_path / "whole", batch_size=2)
  real, calls = sample._draw, []

  def interrupted(*args) -> None:
    calls.append(args)
    if len(calls) == 2:
      raise KeyboardInterrupt
    real(*args)

  monkeypatch.setattr(sample, "_draw", interrupted)
  with pytest.raises(KeyboardInterrupt):
    draw(model, tmp_path / "cut", batch_size=2)
  assert not (tmp_path / "cut" / "samples.npz").exists()
  report = draw(model, tmp_path / "cut", batch_size=2)
  assert report["images_drawn"] == 4
  with (
    np.load(tmp_path / "whole" / "samples.npz") as a,
    np.load(tmp_path / "cut" / "samples.npz") as b,
  ):
    np.testing.assert_array_equal(a["arr_0"], b["arr_0"])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"batch_size": 0}, "batch_size=0"),
    ({"batch_size": -1}, "batch_size=-1"),
  ],
)
def test_bad_values(model: Model, tmp_path: pathlib.Path, options: dict, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    draw(model, tmp_path, **options)


def test_unwritable_output(model: Model, tmp_path: pathlib.Path) -> None:
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="file"):
    draw(model, tmp_path / "file")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, "-m", "marche_jax.sample", *arguments],
    capture_output=True, text=True, timeout=120,
  )  # fmt: skip


def test_command_line_errors_are_one_line(model: Model, tmp_path: pathlib.Path) -> None:
  stored = tmp_path / "model"
  checkpoint.save_model(
    stored, "mar", tiny.MODEL, model.params, sample_config=tiny.SAMPLE
  )  # fmt: skip
  cases = {
    ("--labels=9",): "labels: found 9, expected 0 to 3",
    ("--labels=cat",): "labels: found 'cat'",
    ("--seed=-1",): "seed=-1",
    ("--num_images=0",): "num_images=0",
    ("--config.sample.num_iter=17",): "num_iter=17",
    ("--config.sample.nun_iter=3",): "nun_iter",
    ("--policy=magic",): "magic",
  }
  for arguments, message in cases.items():
    out = tmp_path / "out"
    result = command(f"--checkpoint={stored}", f"--out={out}", *arguments)
    assert result.returncode != 0, arguments
    assert message in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_plan_is_printed_without_drawing(model: Model, tmp_path: pathlib.Path) -> None:
  stored = tmp_path / "model"
  checkpoint.save_model(stored, "mar", tiny.MODEL, model.params, sample_config=tiny.SAMPLE)
  result = command(f"--checkpoint={stored}", "--print_plan", f"--out={tmp_path / 'out'}")
  assert result.returncode == 0 and "step shapes" in result.stdout
  assert not (tmp_path / "out").exists()
