"""`python -m marche_jax.sample`: its files, its resumption, its errors."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import golden
import jax
import numpy as np
import pytest
import tiny
from golden import quick_programs as quick_programs
from PIL import Image

from marche_jax import sample
from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.planning.policies import make_plan
from marche_jax.weights import checkpoint
from marche_jax.weights.checkpoint import Model

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model() -> Model:
  return Model(tiny.MODEL, golden.random_params(tiny.MODEL), sample_config=tiny.SAMPLE)


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


def draw_one_batch(model: Model, out: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Draws batches of two and is interrupted in the second."""
  real, calls = sample._draw, []

  def interrupted(*args) -> None:
    calls.append(args)
    if len(calls) == 2:
      raise KeyboardInterrupt
    real(*args)

  with monkeypatch.context() as patch:
    patch.setattr(sample, "_draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
      draw(model, out, batch_size=2)


def test_an_interrupted_run_goes_on(
  model: Model, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  draw(model, tmp_path / "whole", batch_size=2)
  draw_one_batch(model, tmp_path / "cut", monkeypatch)
  assert not (tmp_path / "cut" / "samples.npz").exists()
  report = draw(model, tmp_path / "cut", batch_size=2)
  assert report["images_drawn"] == 4
  with (
    np.load(tmp_path / "whole" / "samples.npz") as a,
    np.load(tmp_path / "cut" / "samples.npz") as b,
  ):
    np.testing.assert_array_equal(a["arr_0"], b["arr_0"])


def test_batches_of_another_run_are_kept(
  model: Model, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  draw_one_batch(model, tmp_path, monkeypatch)
  draw(model, tmp_path, num=2, batch_size=2)  # other settings, the same directory
  assert draw(model, tmp_path, batch_size=2)["images_drawn"] == 4
  assert not (tmp_path / "partial").exists()


def test_other_weights_do_not_go_on_with_the_old_batches(
  model: Model, tmp_path: pathlib.Path
) -> None:
  draw(model, tmp_path / "a", num=2)
  last = jax.tree.map(np.array, model.params["mask_token"])
  last[..., -1] += 1.0
  other = dataclasses.replace(model, params={**model.params, "mask_token": last})
  (tmp_path / "b").mkdir()
  names = []
  for one in (model, other):
    with pytest.raises(RuntimeError, match="stopped"):
      with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "_draw", _stop)
        draw(one, tmp_path / "b", num=2)
    names.append(sorted(p.name for p in (tmp_path / "b" / "partial").iterdir()))
  assert len(names[1]) == 2 and names[0] != names[1]


def _stop(*args) -> None:
  raise RuntimeError("stopped")


def test_two_devices_draw_the_same(model: Model, tmp_path: pathlib.Path) -> None:
  """Also with a number of images that the devices do not divide, and several calls per batch."""
  stored = tmp_path / "model"
  checkpoint.save_model(stored, "mar", tiny.MODEL, model.params, sample_config=tiny.SAMPLE)
  count, latents = "--xla_force_host_platform_device_count", []
  for devices in (1, 2):
    done = subprocess.run(
      [sys.executable, "-m", "marche_jax.sample", f"--checkpoint={stored}", "--num_images=5",
       "--batch_size=3", "--save_latents", f"--out={tmp_path / str(devices)}", "--profile",
       "--compilation_cache="],
      env={**os.environ, "XLA_FLAGS": f"{golden.QUICK_FLAGS} {count}={devices}"},
      capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / str(devices) / "report.json").read_text())
    assert report["device"].startswith(f"{devices} x") and report["batch_size"] == 2 + devices
    with np.load(tmp_path / str(devices) / "samples.npz") as file:
      latents.append(file["latents"])
  np.testing.assert_allclose(latents[1], latents[0], atol=1e-3 * latents[0].std())


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


def test_plan_of_a_configuration_needs_no_checkpoint(tmp_path: pathlib.Path) -> None:
  """Neither does the embedded model have anything to do with it."""
  wanted = make_plan(ModelConfig(), SampleConfig(policy="gtr", num_iter=16, cfg=3.0))
  result = command(
    f"--config={ROOT / 'configs' / 'mar_base.py'}", "--policy=gtr", "--config.sample.num_iter=16",
    "--config.sample.cfg=3.0", "--print_plan",
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  assert result.stdout.splitlines()[:-1] == wanted.table().splitlines()
