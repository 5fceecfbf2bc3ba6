"""Quality of policies on the same images: turns, resumption, pairing, and the report."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from golden import quick_programs as quick_programs
from numpy.typing import ArrayLike

import marche_jax
from marche_jax.benchmark import random_params
from marche_jax.benchmarking import comparison, tables
from marche_jax.benchmarking.comparison import Drawn, Settings
from marche_jax.benchmarking.entries import Entry, parse_entries
from marche_jax.decoding.plan_runner import Chunk, NonFiniteLatentsError
from marche_jax.decoding.state import DecodeState, Inputs
from marche_jax.evaluation import quality
from marche_jax.models.mar import Params
from marche_jax.planning.plan import DecodePlan
from marche_jax.weights.checkpoint import Model

SETTINGS = Settings(num_images=6, batch_size=2, seed=3)


@pytest.fixture(scope="module")
def model() -> Model:
  return Model(tiny.MODEL, random_params(tiny.MODEL))


def entries(*names: str) -> list[Entry]:
  return parse_entries(names, tiny.MODEL, tiny.SAMPLE)


class Interrupted(Exception):
  """Stands for a run that was killed."""


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
  """Runners whose tokens depend on plan, key and label; what they compiled and drew, in order.

  The first call of a runner warms it up.
  """
  log: list[str] = []

  class FakeRunner:
    mesh = None

    def __init__(self, plan: DecodePlan, **_: object) -> None:
      self.plan = plan
      # The numbers of iterations and of cached halves tell the plans of these tests apart.
      self.name = f"{len(plan.rows)}/{plan.cache_halves}"
      self.warm = False

    def compile(self, params: Params, batch_size: int) -> float:
      log.append(f"compile {self.name}")
      return 1.5

    def start(self, keys: jax.Array) -> jax.Array:
      return keys

    def run(self, params: Params, keys: jax.Array, inputs: Inputs) -> Iterator[Chunk]:
      if self.warm:
        log.append(self.name)
      self.warm = True
      shape = (tiny.MODEL.seq_len, tiny.MODEL.token_dim)
      noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
      tokens = noise / 2 + inputs.labels[:, None, None] + 0.01 * len(self.plan.rows)
      yield Chunk(0, len(self.plan.rows), DecodeState(tokens, keys), None)

  monkeypatch.setattr(comparison, "PlanRunner", FakeRunner)
  return log


FULL, MARCHE, SHORT = "4/0", "4/2", "2/0"


def contents(out: pathlib.Path) -> dict[str, bytes]:
  return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_policies_take_turns(model: Model, drawn: list[str], tmp_path: pathlib.Path) -> None:
  seconds = comparison.draw(model, entries("full", "marche", "full:num_iter=2"), SETTINGS, tmp_path)
  policies = [FULL, MARCHE, SHORT]
  assert drawn == [*(f"compile {name}" for name in policies), *(3 * policies)]
  assert seconds == {"full": 1.5, "marche": 1.5, "full:num_iter=2": 1.5}


def test_an_interrupted_run_goes_on(model: Model, drawn: list[str], tmp_path: pathlib.Path) -> None:
  """Its batches are kept bit for bit; nothing is drawn or compiled twice; images are the same."""
  both = entries("full", "marche")
  comparison.draw(model, both, SETTINGS, tmp_path / "whole")
  del drawn[:]

  original, count = comparison.PlanRunner.run, 0

  def stop_at_fourth(*args: object) -> Iterator[Chunk]:
    nonlocal count
    count += 1
    if count == 6:  # the fourth batch: both warm up first
      raise Interrupted
    return original(*args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(comparison.PlanRunner, "run", stop_at_fourth)
    with pytest.raises(Interrupted):
      comparison.draw(model, both, SETTINGS, tmp_path / "cut")
  before = contents(tmp_path / "cut")
  assert len(before) == 3 and drawn[2:] == [FULL, MARCHE, FULL]
  with pytest.raises(FileNotFoundError):
    comparison.report(model, both, SETTINGS, tmp_path / "cut")

  del drawn[:]
  comparison.draw(model, both, SETTINGS, tmp_path / "cut")
  assert drawn == [f"compile {FULL}", f"compile {MARCHE}", MARCHE, FULL, MARCHE]
  after = contents(tmp_path / "cut")
  assert len(after) == 6 and after.items() >= before.items()
  del drawn[:]
  assert comparison.draw(model, both, SETTINGS, tmp_path / "cut") == {}
  assert drawn == [] and contents(tmp_path / "cut") == after

  places = [comparison.directories(tmp_path / d, model, both, SETTINGS) for d in ("whole", "cut")]
  for entry in both:
    whole, cut = (comparison.collect(place[entry.name], SETTINGS) for place in places)
    np.testing.assert_array_equal(whole.images, cut.images)
    np.testing.assert_array_equal(whole.latents, cut.latents)


def test_a_later_run_draws_only_what_is_missing(
  model: Model, drawn: list[str], tmp_path: pathlib.Path
) -> None:
  comparison.draw(model, entries("full"), SETTINGS, tmp_path)
  before = contents(tmp_path)
  del drawn[:]
  more = entries("full", "full:num_iter=2")
  comparison.draw(model, more, SETTINGS, tmp_path)  # more policies
  assert drawn == [f"compile {SHORT}", SHORT, SHORT, SHORT]
  del drawn[:]
  fewer = dataclasses.replace(SETTINGS, num_images=3)  # fewer images, in the middle of a batch
  comparison.draw(model, more, fewer, tmp_path)
  assert drawn == []
  place = comparison.directories(tmp_path, model, more, SETTINGS)["full"]
  part, whole = comparison.collect(place, fewer), comparison.collect(place, SETTINGS)
  assert len(part.images) == 3
  np.testing.assert_array_equal(part.images, whole.images[:3])
  comparison.draw(model, more, dataclasses.replace(SETTINGS, num_images=7), tmp_path)  # more images
  assert drawn == [f"compile {FULL}", f"compile {SHORT}", FULL, SHORT]
  assert contents(tmp_path).items() >= before.items()

  report = comparison.report(model, more, SETTINGS, tmp_path)
  assert not report["policies"]["full:num_iter=2"]["timed_with_baseline"]
  assert "* timed in another run than full" in tables.quality_table({"name": "tiny"} | report)


@pytest.mark.parametrize(
  "change",
  [
    lambda model, settings: (model, dataclasses.replace(settings, seed=4)),
    lambda model, settings: (model, dataclasses.replace(settings, batch_size=3)),
    lambda model, settings: (model, dataclasses.replace(settings, dtype=jnp.bfloat16)),
    lambda model, settings: (
      dataclasses.replace(model, params=jax.tree.map(lambda x: x + 1, model.params)), settings
    ),
  ],
  ids=["seed", "batch_size", "dtype", "weights"],
)  # fmt: skip
def test_batches_of_other_settings_are_not_taken(
  model: Model, change: Callable, tmp_path: pathlib.Path
) -> None:
  changed_model, changed = change(model, SETTINGS)
  (place,) = comparison.directories(tmp_path, model, entries("full"), SETTINGS).values()
  (other,) = comparison.directories(tmp_path, changed_model, entries("full"), changed).values()
  assert place != other
  shorter = dataclasses.replace(SETTINGS, num_images=2)
  assert list(comparison.directories(tmp_path, model, entries("full"), shorter).values()) == [place]


def test_entries_that_decode_alike_share_their_images(
  model: Model, drawn: list[str], tmp_path: pathlib.Path
) -> None:
  same = entries("full", f"full:max_timestep={tiny.SAMPLE.max_timestep}")
  comparison.draw(model, same, SETTINGS, tmp_path)
  assert [line for line in drawn if "compile" not in line] == [FULL] * 3


def test_images_are_those_of_generate(model: Model, tmp_path: pathlib.Path) -> None:
  """The real runner: image i depends on (seed, i, label) alone, here on its batch."""
  (entry,) = entries("full:num_iter=1")
  settings = Settings(num_images=3, batch_size=2, seed=5)
  comparison.draw(model, [entry], settings, tmp_path)
  place = comparison.directories(tmp_path, model, [entry], settings)[entry.name]
  found = comparison.collect(place, settings)
  assert len(found.seconds) == 2 and min(found.seconds) > 0
  latents = marche_jax.generate(model, [2, 1], jax.random.key(5), entry.sample, image_ids=[2, 1])
  np.testing.assert_allclose(found.latents[[2, 1]], latents, rtol=0, atol=1e-5)
  images = marche_jax.to_images(model, latents)
  assert np.abs(found.images[[2, 1]] - images.astype(int)).max() <= 1


def test_latents_that_are_not_finite_name_the_policy(
  model: Model, drawn: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def fail(*_: object) -> Iterator[Chunk]:
    raise NonFiniteLatentsError("non-finite latents at iteration 0")

  monkeypatch.setattr(comparison.PlanRunner, "run", fail)
  with pytest.raises(NonFiniteLatentsError, match="full: non-finite latents"):
    comparison.draw(model, entries("full"), SETTINGS, tmp_path)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ((0, 1, 0), "num_images=0: expected at least 1"),
    ((1, 0, 0), "batch_size=0: expected at least 1"),
    ((1, 1, -1), r"seed=-1: expected an integer in \[0, 2\*\*32\)"),
  ],
)
def test_values_out_of_range(values: tuple[int, int, int], message: str) -> None:
  with pytest.raises(ValueError, match=message):
    Settings(num_images=values[0], batch_size=values[1], seed=values[2])


def make_drawn(images: ArrayLike, latents: ArrayLike, seconds: list[float], runs: str) -> Drawn:
  return Drawn(np.asarray(images), np.asarray(latents, np.float32), seconds, list(runs))


def test_differences() -> None:
  images = np.full((2, 4, 4, 1), 100, np.uint8)
  other = images.copy()
  other[1] += 10
  latents = np.random.default_rng(0).normal(0, 3, (2, 1, 4, 4))
  base = make_drawn(images, latents, [1.0], "a")
  found = comparison.differences(make_drawn(other, latents + 1, [1.0], "a"), base)
  assert found["latent_rmse"] == pytest.approx(1 / latents.std(), rel=1e-5)
  second = 10 * np.log10(255**2 / 10**2)
  assert found["psnr"] == pytest.approx((comparison.MAX_PSNR + second) / 2)
  assert comparison.differences(base, base) == {"latent_rmse": 0, "psnr": comparison.MAX_PSNR}


def test_speedups_are_of_batches_drawn_in_the_same_run() -> None:
  base = make_drawn([], [], [4.0, 4.0, 40.0, 4.0], "aaab")
  noisy = make_drawn([], [], [2.0, 2.0, 20.0, 100.0], "aaac")  # the third batch met a busy machine
  assert comparison.speedup(noisy, base) == (2.0, True)
  apart = make_drawn([], [], [1.0, 2.0, 2.0, 2.0], "dddd")
  assert comparison.speedup(apart, base) == (2.0, False)
  assert comparison.speedup(base, base) == (1.0, True)


def test_pareto_front() -> None:
  points = [(1.0, 5.0), (2.0, 5.0), (2.0, 6.0), (3.0, 7.0), (1.5, 5.5), (0.5, 4.0), (2.0, 5.0)]
  assert comparison.pareto(points) == [5, 1, 6, 3]
  assert comparison.pareto([(1.0, 1.0)]) == [0]
  assert comparison.pareto([]) == []


def test_report(
  model: Model, drawn: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(comparison, "can_judge", lambda config: True)

  def evaluate(images: np.ndarray, labels: np.ndarray) -> quality.Report:
    mean = float(images.mean())
    return {"num_images": len(labels), "recognised": 0.5, "recognised_per_class": [0.5],
            "frechet": mean, "frechet_interval": [mean - 1, mean + 1]}  # fmt: skip

  monkeypatch.setattr(quality, "evaluate_samples", evaluate)
  three = entries("marche", "full", "full:num_iter=2")
  compile_seconds = comparison.draw(model, three, SETTINGS, tmp_path)
  real = np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4, np.int64)
  report = comparison.report(model, three, SETTINGS, tmp_path, compile_seconds, real)
  assert json.loads(json.dumps(report, allow_nan=False)) == json.loads(json.dumps(report))
  found = report["policies"]
  assert list(found) == ["marche", "full", "full:num_iter=2"] and report["baseline"] == "full"
  assert found["full"]["difference"] is None and found["full"]["speedup"] == 1
  assert found["marche"]["difference"]["latent_rmse"] == 0  # the fake draws the same
  assert found["full:num_iter=2"]["difference"]["latent_rmse"] > 0
  points = []
  for entry in three:
    policy = found[entry.name]
    assert policy["predicted_speedup"] == entry.plan.speedup(three[1].plan)
    assert policy["compile_seconds"] == 1.5 and policy["timed_with_baseline"]
    assert policy["gflops_per_image"] == entry.plan.flops().total / 1e9
    points.append((policy["speedup"], policy["quality"]["frechet"]))
  front = [i for i, policy in enumerate(found.values()) if policy["on_front"]]
  assert front == sorted(comparison.pareto(points))
  assert report["real"]["test images"]["frechet"] == 0
  text = tables.quality_table(report)
  assert "6 images in batches of 2, seed 3" in text and "(test images)" in text
  shown = comparison.example_images(model, three, SETTINGS, tmp_path, 4)
  assert {name: images.shape for name, images in shown.items()} == dict.fromkeys(
    found, (4, 8, 8, 1)
  )


def test_images_that_the_classifier_cannot_judge(
  model: Model, drawn: list[str], tmp_path: pathlib.Path
) -> None:
  both = entries("full", "marche")
  comparison.draw(model, both, SETTINGS, tmp_path)
  report = comparison.report(model, both, SETTINGS, tmp_path)
  assert report["policies"]["full"]["quality"] is None
  assert "on_front" not in report["policies"]["full"]
  assert "marche" in tables.quality_table(report)


def test_labels_are_the_classes_in_turn() -> None:
  assert comparison.labels_of(3, 4, tiny.MODEL).tolist() == [3, 0, 1, 2]
