"""`sample --trace`: what the pictures show, and the files."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys

import golden
import numpy as np
import pytest
import tiny
from golden import quick_programs as quick_programs
from PIL import Image

from marche_jax import sample
from marche_jax.decoding.activity import CACHED, NOW, PREVIOUS, REFRESHED, UNSEEN
from marche_jax.decoding.generation import RunSettings
from marche_jax.planning.plan import DecodePlan
from marche_jax.planning.policies import make_plan
from marche_jax.planning.shapes import StackShape
from marche_jax.visualization import frames, trace
from marche_jax.weights import checkpoint
from marche_jax.weights.checkpoint import Model

PAPER = (255, 255, 255)
MARCHE = dataclasses.replace(
  tiny.SAMPLE, policy="marche", num_iter=6, num_sampling_steps=2, refresh_iterations=(0,),
  active_size=9, encoder_active_size=6,
)  # fmt: skip
LABELS = np.asarray([0, 1, 2, 3, 0, 1])


# --- drawing


def test_cells_hold_the_tokens_in_raster_order() -> None:
  position = np.asarray([2, 0, 3, 1])  # the first token revealed lies at the lower left
  np.testing.assert_array_equal(
    frames.cell_ranks(position, buffer=3), [[0, 2, -1, 4, 6], [1, -1, -1, 3, 5]]
  )
  grid = frames.cell_ranks(np.random.default_rng(0).permutation(49), buffer=8)
  assert grid.shape == (7, 2 + 1 + 7)
  assert sorted(grid[grid >= 0]) == list(range(57))
  assert (grid[:4, :2] >= 0).all() and (grid[4:, :3] == -1).all()


def test_status_colours_are_distinct_and_at_their_cells() -> None:
  position = np.asarray([3, 0, 1, 2])
  activity = np.asarray([REFRESHED, CACHED, PREVIOUS, NOW, REFRESHED, CACHED])
  masked = np.asarray([False, False, False, False, True, True])
  colours = frames.status_colours(activity, masked)
  cells = frames.cell_ranks(position, buffer=2)
  cell = 20
  drawn = frames.token_map(colours, cells, masked, np.zeros(6, bool), cell)
  assert drawn.shape == (2 * cell, (1 + 1 + 2) * cell, 3)
  of = lambda row, column: drawn[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
  expected = {
    (0, 0): frames.COLOURS[REFRESHED], (1, 0): frames.COLOURS[CACHED], (0, 1): PAPER,
    (0, 2): frames.COLOURS[NOW], (0, 3): frames.COLOURS[REFRESHED], (1, 2): frames.MASKED,
    (1, 3): frames.COLOURS[PREVIOUS],
  }  # fmt: skip
  hatched = {(0, 3), (1, 2)}
  for at, colour in expected.items():
    inside = of(*at)[:-1, :-1].reshape(-1, 3)
    found = {tuple(c) for c in inside.tolist()}
    assert found == {tuple(np.asarray(colour).tolist())} | (
      {frames.STRIPE} if at in hatched else set()
    )
  assert (of(0, 0)[-1] == PAPER).all()
  assert len({tuple(c) for c in [*frames.COLOURS.tolist(), frames.MASKED.tolist()]}) == 6


def test_colours_differ_to_colour_blind_readers() -> None:
  """Every two statuses differ in luminance or in blue against yellow, which all of them see."""
  rgb = (np.concatenate([frames.COLOURS, [frames.MASKED]]) / 255) ** 2.2
  light = rgb @ [0.2126, 0.7152, 0.0722]
  seen = np.stack([light ** (1 / 2.2), rgb[:, 2] ** (1 / 2.2)], axis=1)
  distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
  assert distance[~np.eye(6, dtype=bool)].min() > 0.15


def test_score_colours_compare_candidates_alone() -> None:
  activity = np.asarray([CACHED, REFRESHED, NOW, PREVIOUS, UNSEEN, CACHED])
  scores = np.asarray([0.1, 0.5, 9.0, 0.0, 0.0, 0.2], np.float32)
  colours = frames.score_colours(scores, activity)
  np.testing.assert_array_equal(colours[0], frames.HEAT[0])
  np.testing.assert_array_equal(colours[1], frames.HEAT[-1])
  np.testing.assert_array_equal(colours[2:5], frames.COLOURS[[NOW, PREVIOUS, UNSEEN]])
  assert colours[0].sum() > colours[5].sum() > colours[1].sum()
  nothing = frames.score_colours(np.zeros(6, np.float32), activity)
  np.testing.assert_array_equal(nothing[[0, 1, 5]], frames.COLOURS[[UNSEEN] * 3])


@pytest.mark.parametrize("channels", [1, 3])
def test_the_image_so_far(channels: int) -> None:
  """Known tokens as they are, enlarged; unknown ones hatched; a frame around new ones."""
  image = np.random.default_rng(0).integers(0, 100, (8, 8, channels), dtype=np.uint8)
  known = np.asarray([[True, False], [False, True]])
  now = np.asarray([[False, False], [False, True]])
  drawn = frames.filling_in(image, known, now, scale=10)
  assert drawn.shape == (80, 80, 3)
  np.testing.assert_array_equal(
    drawn[:40, :40], np.broadcast_to(image, (8, 8, 3))[:4, :4].repeat(10, 0).repeat(10, 1)
  )
  unknown = {tuple(c) for c in drawn[:40, 40:].reshape(-1, 3).tolist()}
  assert unknown == {tuple(frames.MASKED.tolist()), frames.STRIPE}
  assert (drawn[40, 40:] == frames.COLOURS[NOW]).all()
  np.testing.assert_array_equal(drawn[60, 60], np.broadcast_to(image[6, 6], 3))


def test_palette_keeps_the_colours_of_the_maps() -> None:
  image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
  colours = Image.fromarray(np.stack([frames.COLOURS] * 4).repeat(4, 0).repeat(4, 1))
  coded = colours.quantize(palette=frames.palette(image), dither=Image.Dither.NONE)
  np.testing.assert_array_equal(np.asarray(coded.convert("RGB")), np.asarray(colours))


# --- what is drawn


def test_pictured_iterations() -> None:
  assert trace.pictured(5) == [0, 1, 2, 3, 4]
  assert trace.pictured(1) == [0] and trace.pictured(9, 4) == [0, 4, 8]
  assert trace.pictured(10, 4) == [0, 4, 8, 9]
  for iterations in (12, 13, 32, 64, 256):
    shown = trace.pictured(iterations)
    assert len(shown) == trace.PICTURES and shown[0] == 0 and shown[-1] == iterations - 1
    assert {k % 3 for k in shown} == {0, 1, 2}, "full iterations of marche, and others"
  with pytest.raises(ValueError, match="trace_every=0"):
    trace.pictured(5, 0)


def test_image_numbers() -> None:
  assert trace.parse_images(None, 2) == [0, 1] and trace.parse_images(None, 9) == [0, 1, 2]
  assert trace.parse_images(["4", "0", "4"], 5) == [4, 0]
  for wrong in ("5", "-1", "cat", "1.5", ""):
    with pytest.raises(ValueError, match=f"trace_images: found '{wrong}'.*0 to 4"):
      trace.parse_images(["0", wrong], 5)
  with pytest.raises(ValueError, match="empty"):
    trace.parse_images([], 5)


def test_how_a_stack_chose() -> None:
  shape = StackShape(16, active=8, source="scout", layer=2)
  assert trace.chosen_by(shape) == "attention at layer 2 (scout pass)"
  assert "all recomputed" in trace.chosen_by(StackShape(16))
  assert "forced tokens only" in trace.chosen_by(StackShape(16, active=8))
  value = dataclasses.replace(shape, source="lower", score="value")
  assert trace.chosen_by(value) == "change of values at layer 2 (all tokens)"
  scores = np.asarray([-1.0, -0.5])
  assert trace.scale_of(value, scores) == "1 - cosine: 0 (light) to 0.5 (dark)"


# --- a run


@pytest.fixture(scope="module")
def model() -> Model:
  return Model(tiny.MODEL, golden.random_params(tiny.MODEL), sample_config=tiny.SAMPLE)


@pytest.fixture(scope="module")
def plan() -> DecodePlan:
  return make_plan(tiny.MODEL, MARCHE)


@pytest.fixture(scope="module")
def recordings(model: Model, plan: DecodePlan) -> list[trace.Recording]:
  """Of two images, for all tests here."""
  ids = [4, 1]
  return trace.record(model.params, plan, ids, LABELS[ids], RunSettings(batch_size=2, seed=3))


def test_recording_follows_the_plan(plan: DecodePlan, recordings: list[trace.Recording]) -> None:
  buffer, size = tiny.MODEL.buffer_size, tiny.MODEL.seq_len
  for recording in recordings:
    assert sorted(recording.position) == list(range(size))
    for k, row in enumerate(plan.rows):
      known = np.zeros(size, bool)
      known[recording.position[: row.num_known + row.num_predict]] = True
      np.testing.assert_array_equal((recording.tokens[k] != 0).any(axis=-1), known)
      told = trace.counts(plan, recording, k)
      assert told["masked"] == (~known).sum() and told["encoder"]["now"] == 0
      for name, active in (("encoder", row.encoder_active), ("decoder", row.decoder_active)):
        count = told[name]
        assert count["now"] + count["previous"] + count["refreshed"] == active
        assert count["previous"] == row.num_previous
        assert sum(count.values()) == buffer + size
      assert told["decoder"]["now"] == row.num_predict
      assert told["encoder"]["unseen"] == size - row.num_known


def test_recorded_scores_chose_the_refresh(
  plan: DecodePlan, recordings: list[trace.Recording]
) -> None:
  compared = 0
  for recording in recordings:
    for k, row in enumerate(plan.rows):
      for stack, name in enumerate(trace.STACKS):
        scores, activity = recording.scores[k, stack], recording.activity[k, stack]
        if getattr(plan.step_shapes[row.shape_id], name).active is None:
          assert (scores == 0).all()
          continue
        assert (scores[activity == UNSEEN] == 0).all()
        chosen, cached = scores[activity == REFRESHED], scores[activity == CACHED]
        if chosen.size and cached.size:
          assert chosen.min() >= cached.max() > 0
          compared += 1
  assert compared > 2


def test_frame_shows_full_and_selective_iterations(
  plan: DecodePlan, recordings: list[trace.Recording]
) -> None:
  image = np.full((8, 8, 1), 128, np.uint8)
  pictures = [trace.frame(plan, recordings[0], k, image, "marche") for k in range(2)]
  assert pictures[0].size == pictures[1].size

  def has(picture: Image.Image, code: int) -> bool:
    legend = picture.height - frames.MARGIN - frames.SWATCH
    return bool((np.asarray(picture)[:legend] == frames.COLOURS[code]).all(axis=-1).any())

  full, selective = pictures
  assert has(full, NOW) and has(full, REFRESHED) and not has(full, CACHED)
  assert has(selective, NOW) and has(selective, CACHED) and has(selective, PREVIOUS)


def test_files(model: Model, plan: DecodePlan, tmp_path: pathlib.Path) -> None:
  """Also: an image is the same as in the run, and pictures of another run do not stay."""
  directory = tmp_path / "trace"
  (directory / "image_00004").mkdir(parents=True)
  (directory / "image_00004" / "iteration_063.png").touch()
  (directory / "image_00004" / "mine.png").touch()
  settings = RunSettings(batch_size=2, seed=3)
  trace.run(model, MARCHE, LABELS, [4, 1, 0], settings, directory, every=4)
  names = ["image_00000", "image_00001", "image_00004"]
  assert sorted(p.name for p in directory.iterdir()) == sorted(
    [*names, *(f"{name}.gif" for name in names), "trace.json"]
  )
  shown = ["iteration_000.png", "iteration_004.png", "iteration_005.png"]
  assert sorted(p.name for p in (directory / names[1]).iterdir()) == shown
  assert sorted(p.name for p in (directory / names[2]).iterdir()) == [*shown, "mine.png"]
  with Image.open(directory / f"{names[0]}.gif") as moving:
    assert moving.n_frames == len(plan.rows)  # type: ignore[attr-defined]
    durations = []
    for k in range(len(plan.rows)):
      moving.seek(k)
      durations.append(moving.info["duration"])
    with Image.open(directory / names[0] / shown[0]) as first:
      assert first.size == moving.size
  assert durations == [trace.FRAME_MS] * (len(plan.rows) - 1) + [trace.LAST_FRAME_MS]
  told = json.loads((directory / "trace.json").read_text())
  assert [image["image"] for image in told["images"]] == [4, 1, 0]
  assert [image["label"] for image in told["images"]] == [0, 1, 0]
  assert [i["iteration"] for i in told["images"][0]["iterations"]] == list(range(6))


# --- the command


def test_bad_flags(tmp_path: pathlib.Path) -> None:
  for flags, message in (
    ((None, ["0"], None), "--trace_images: expected --trace=DIR"),
    ((None, None, 2), "--trace_every: expected --trace=DIR"),
    ((tmp_path, ["6"], None), "trace_images: found '6', .* 0 to 5"),
    ((tmp_path, None, 0), "trace_every=0"),
  ):
    with pytest.raises(ValueError, match=message):
      sample.traced_images(*flags, num_images=6)
  assert sample.traced_images(None, None, None, 6) == []
  assert sample.traced_images(tmp_path / "new", None, 1, 6) == [0, 1, 2]


def test_command(model: Model, tmp_path: pathlib.Path) -> None:
  """Its usual files are written too, and a mistake is told before anything is compiled."""
  stored, out, directory = tmp_path / "model", tmp_path / "out", tmp_path / "trace"
  checkpoint.save_model(stored, "mar", tiny.MODEL, model.params, sample_config=tiny.SAMPLE)

  def command(images: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
      [sys.executable, "-m", "marche_jax.sample", f"--checkpoint={stored}", "--num_images=2",
       "--policy=marche", "--config.sample.num_iter=2", f"--out={out}", f"--trace={directory}",
       f"--trace_images={images}", "--compilation_cache="],
      env=golden.quick_environment(),
      capture_output=True, text=True, timeout=240,
    )  # fmt: skip

  failed = command("2")
  assert failed.returncode == 1 and failed.stderr.startswith("error: trace_images: found '2'")
  assert len(failed.stderr.splitlines()) == 1 and not out.exists()

  done = command("1")
  assert done.returncode == 0, done.stderr
  assert (out / "samples.npz").exists() and (directory / "image_00001.gif").exists()
  with np.load(out / "samples.npz") as file:
    drawn = int(file["arr_0"][1, 4, 4, 0])
  with Image.open(directory / "image_00001" / "iteration_001.png") as picture:
    pixels = np.asarray(picture)
  # The pixel in the middle of the image, where a frame around a token does not reach.
  side = round(trace.SIDE / 8) * 8
  top = frames.MARGIN + frames.TITLE + frames.TEXT + 16 + frames.HEADING
  shown = pixels[top + side // 2 + 28, frames.MARGIN + side // 2 + 28]
  assert abs(shown.astype(int) - drawn).max() <= 2
