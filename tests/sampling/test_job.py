"""A job of sampling: its files, its resumption, its errors."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import golden
import jax
import numpy as np
import pytest
import tiny
from golden import quick_programs as quick_programs
from PIL import Image

from marche_jax.decoding.generation import RunSettings
from marche_jax.sampling import job
from marche_jax.weights.checkpoint import Model


@pytest.fixture(scope="module")
def model() -> Model:
  return Model(tiny.MODEL, golden.random_params(tiny.MODEL), sample_config=tiny.SAMPLE)


def draw(
  model: Model,
  out: pathlib.Path,
  num: int = 6,
  batch_size: int = 4,
  save_latents: bool = False,
  **options: bool,
) -> job.Report:
  labels = job.choose_labels(None, num, tiny.MODEL.class_num)
  settings = RunSettings(batch_size=batch_size, seed=3)
  drawing = job.Job(model, tiny.SAMPLE, labels, settings, out, save_latents=save_latents)
  return job.run(drawing, **options)


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


def draw_one_batch(model: Model, out: pathlib.Path) -> None:
  """Draws batches of two and is interrupted in the midst of the second."""
  labels = job.choose_labels(None, 6, tiny.MODEL.class_num)
  drawn = 0.0

  def interrupt(images: float) -> None:
    nonlocal drawn
    drawn += images
    if drawn > 2:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    job.Job(model, tiny.SAMPLE, labels, RunSettings(batch_size=2, seed=3), out).draw(interrupt)
  assert 2 < drawn < 4


def test_an_interrupted_run_goes_on(model: Model, tmp_path: pathlib.Path) -> None:
  draw(model, tmp_path / "whole", batch_size=2)
  draw_one_batch(model, tmp_path / "cut")
  assert not (tmp_path / "cut" / "samples.npz").exists()
  report = draw(model, tmp_path / "cut", batch_size=2)
  assert report["images_drawn"] == 4
  with (
    np.load(tmp_path / "whole" / "samples.npz") as a,
    np.load(tmp_path / "cut" / "samples.npz") as b,
  ):
    np.testing.assert_array_equal(a["arr_0"], b["arr_0"])


def test_batches_of_another_run_are_kept(model: Model, tmp_path: pathlib.Path) -> None:
  draw_one_batch(model, tmp_path)
  draw(model, tmp_path, num=2, batch_size=2)  # other settings, the same directory
  assert draw(model, tmp_path, batch_size=2)["images_drawn"] == 4
  assert not (tmp_path / "partial").exists()


def test_other_weights_do_not_go_on_with_the_old_batches(
  model: Model, tmp_path: pathlib.Path
) -> None:
  last = jax.tree.map(np.array, model.params["mask_token"])
  last[..., -1] += 1.0
  other = dataclasses.replace(model, params={**model.params, "mask_token": last})
  draw_one_batch(model, tmp_path)
  settings = RunSettings(batch_size=2, seed=3)
  labels = job.choose_labels(None, 6, tiny.MODEL.class_num)
  jobs = [job.Job(m, tiny.SAMPLE, labels, settings, tmp_path) for m in (model, other)]
  assert [j.num_missing() for j in jobs] == [4, 6]
  assert len({j.partial for j in jobs}) == 2
  assert jobs[1].others() == [jobs[0].partial] and jobs[0].others() == []


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
