"""`sample --calibrate` and `--policy=FILE.json`: where full refreshes go, and the file of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import re
import subprocess
import sys

import golden
import jax
import numpy as np
import pytest
import tiny
from golden import quick_programs as quick_programs
from hypothesis import given, settings
from hypothesis import strategies as st

from marche_jax import sample
from marche_jax.benchmarking.entries import parse_entries
from marche_jax.config import ModelConfig
from marche_jax.decoding import calibration, plan_runner
from marche_jax.planning import plan_file
from marche_jax.planning.plan import DecodePlan
from marche_jax.planning.policies import check_sample, make_plan
from marche_jax.planning.policies.marche import too_large
from marche_jax.weights import checkpoint
from marche_jax.weights.checkpoint import Model

MARCHE = dataclasses.replace(tiny.SAMPLE, policy="marche", num_iter=8, num_sampling_steps=2)
BUFFER, SIZE = tiny.MODEL.buffer_size, tiny.MODEL.seq_len


def total_drift(drift: np.ndarray, refreshes: tuple[int, ...]) -> float:
  return sum(drift[max(r for r in refreshes if r <= k), k] for k in range(len(drift)))


# --- the choice


@st.composite
def drifts(draw: st.DrawFn) -> tuple[np.ndarray, int]:
  """A drift (integers, so that sums are exact) and a number of refreshes."""
  n = draw(st.integers(1, 7))
  values = draw(st.lists(st.integers(0, 20), min_size=n * n, max_size=n * n))
  return np.triu(np.asarray(values, float).reshape(n, n), 1), draw(st.integers(1, n))


@given(drifts())
@settings(deadline=None)
def test_no_other_refreshes_leave_less_drift(case: tuple[np.ndarray, int]) -> None:
  drift, count = case
  chosen = calibration.choose_refreshes(drift, count)
  assert chosen[0] == 0 and len(set(chosen)) == count and list(chosen) == sorted(chosen)
  others = itertools.combinations(range(1, len(drift)), count - 1)
  assert total_drift(drift, chosen) == min(total_drift(drift, (0, *rest)) for rest in others)


@given(drifts(), st.data())
@settings(deadline=None)
def test_required_refreshes_are_among_them(
  case: tuple[np.ndarray, int], data: st.DataObject
) -> None:
  drift, count = case
  others = data.draw(st.sets(st.integers(0, len(drift) - 1), max_size=count - 1)) - {0}
  chosen = calibration.choose_refreshes(drift, count, {0, *others})
  assert others <= set(chosen) and chosen[0] == 0 and len(set(chosen)) == count
  possible = [
    (0, *rest)
    for rest in itertools.combinations(range(1, len(drift)), count - 1)
    if others <= set(rest)
  ]
  assert total_drift(drift, chosen) == min(total_drift(drift, c) for c in possible)


def test_a_jump_is_followed_by_a_refresh() -> None:
  """Keys and values that change once, before iteration 4, are computed anew there."""
  drift = np.zeros((6, 6))
  drift[:4, 4:] = 1.0
  assert calibration.choose_refreshes(drift, 2) == (0, 4)


# --- the drift


@pytest.fixture(scope="module")
def plan() -> DecodePlan:
  return make_plan(tiny.MODEL, dataclasses.replace(MARCHE, refresh_interval=1))


def sketches_of(plan: DecodePlan) -> list[list[np.ndarray]]:
  """Two layers of encoder and decoder, everywhere 1."""
  return [[np.ones((2, 1, BUFFER + SIZE, 1)) for _ in range(2)] for _ in plan.rows]


def test_drift_by_hand(plan: DecodePlan) -> None:
  """Of iteration 5 from iteration 2; a buffer token and one still masked change from 1 to 3."""
  sketches = sketches_of(plan)
  sketches[5][0][0, :, 0] = sketches[5][1][0, :, 0] = 3  # in the first of two layers
  sketches[5][1][0, :, -1] = 3
  drift = calibration.drift_of_sketches(sketches, plan)
  known = BUFFER + plan.rows[2].num_known
  masked = SIZE - plan.rows[5].num_known - plan.rows[5].num_predict
  assert masked > 0
  encoder = (3 - 1) ** 2 / (known - 1 + 3**2)
  decoder = 2 * (3 - 1) ** 2 / (known + masked - 2 + 2 * 3**2)
  assert drift[2, 5] == pytest.approx((encoder / 2 + decoder / 2) / 2)
  assert drift[2, 4] == drift[6, 7] == 0 and drift[5, 6] > 0
  assert (np.tril(drift) == 0).all()


def test_forced_tokens_do_not_count(plan: DecodePlan) -> None:
  """Those that became known since the refresh are recomputed in between."""
  sketches, r, k = sketches_of(plan), 1, 4
  known = BUFFER + plan.rows[r].num_known
  later = BUFFER + plan.rows[k].num_known + plan.rows[k].num_predict
  for stack in sketches[k]:
    stack[:, :, known:later] = 7
  assert calibration.drift_of_sketches(sketches, plan)[r, k] == 0
  for rank, stacks in ((known - 1, (0, 1)), (later, (1,))):  # the neighbours of those do
    for stack in stacks:
      changed = [[s.copy() for s in both] for both in sketches]
      changed[k][stack][:, :, rank] = 7
      assert calibration.drift_of_sketches(changed, plan)[r, k] > 0
  sketches[k][0][:, :, later:] = 7  # the encoder does not see masked tokens
  assert calibration.drift_of_sketches(sketches, plan)[r, k] == 0


# --- a model


@pytest.fixture(scope="module")
def model() -> Model:
  return Model(tiny.MODEL, golden.random_params(tiny.MODEL), sample_config=tiny.SAMPLE)


@pytest.mark.parametrize(
  "changes", [{}, {"condition_cache": True}], ids=["both halves", "one half"]
)
def test_a_calibrated_plan_costs_no_more(model: Model, changes: dict[str, bool]) -> None:
  given = dataclasses.replace(MARCHE, **changes)
  chosen, drift = calibration.calibrate(model, given, [0, 1], jax.random.key(0))
  assert drift.shape == (8, 8) and np.isfinite(drift).all()
  assert (drift[np.triu_indices(8, 1)] > 0).all() and (np.tril(drift) == 0).all()
  assert chosen == dataclasses.replace(given, refresh_iterations=chosen.refresh_iterations)
  check_sample(chosen, None)
  flops = [make_plan(tiny.MODEL, s).flops(padded=False).total for s in (chosen, given)]
  assert flops[0] <= flops[1]
  plan = make_plan(tiny.MODEL, chosen)
  full = [
    k for k, row in enumerate(plan.rows) if plan.step_shapes[row.shape_id].decoder.active is None
  ]
  assert full == list(chosen.refresh_iterations)
  every_third = tuple(range(0, 8, given.refresh_interval))
  if len(full) == len(every_third):
    assert total_drift(drift, chosen.refresh_iterations) <= total_drift(drift, every_third)


def flat(config: ModelConfig, drift: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Model:
  """A model that drifts as it is told to; it has no weights."""
  monkeypatch.setattr(calibration, "measure_drift", lambda *_: drift)
  return Model(config, {})


def test_where_fewer_refreshes_cost_more(monkeypatch: pytest.MonkeyPatch) -> None:
  """Large selective iterations beside small encoders: the refreshes stay at intervals."""
  sample = dataclasses.replace(MARCHE, policy="marche+gtr", refresh_interval=2, active_size=17)
  drift = np.zeros((5, 5))
  drift[:3, 3:], drift[3, 4] = 5.0, 1.0
  flops = lambda s: make_plan(tiny.MODEL, s).flops(padded=False).total
  for count, expected in ((1, (0,)), (2, (0, 3)), (3, (0, 3, 4))):
    assert calibration.choose_refreshes(drift, count) == expected
    chosen = dataclasses.replace(sample, refresh_iterations=expected)
    assert flops(chosen) > flops(sample)
  model = flat(tiny.MODEL, drift, monkeypatch)
  chosen, _ = calibration.calibrate(model, sample, [0], jax.random.key(0))
  assert chosen == dataclasses.replace(sample, refresh_iterations=(0, 2, 4), refresh_interval=3)
  assert flops(chosen) == flops(sample)


@pytest.mark.parametrize(
  ("field", "size", "num_iter", "interval", "required"),
  [("active_size", 3, 14, 3, 12), ("encoder_active_size", 2, 10, 4, 8)],
)
def test_an_active_size_rules_schedules_out(
  field: str,
  size: int,
  num_iter: int,
  interval: int,
  required: int,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """The iteration that forces more than it is refreshed, whatever the drift says."""
  fields = {field: size, "num_iter": num_iter, "refresh_interval": interval}
  given = dataclasses.replace(MARCHE, **fields)
  assert too_large(given, make_plan(tiny.MODEL, given).rows) == [required]
  jumps = np.triu(np.ones((num_iter, num_iter)), 1)  # before iterations 1, 2, ... but not that one
  drift = np.cumsum(jumps * (np.arange(num_iter) != required), axis=1)
  count = len(range(0, num_iter, interval))
  ruled_out = dataclasses.replace(
    given, refresh_iterations=calibration.choose_refreshes(drift, count)
  )
  assert required not in ruled_out.refresh_iterations
  with pytest.raises(ValueError, match=rf"sample\.{field}={size}: iteration {required} forces"):
    make_plan(tiny.MODEL, ruled_out)
  model = flat(tiny.MODEL, drift, monkeypatch)
  chosen, _ = calibration.calibrate(model, given, [0], jax.random.key(0))
  assert required in chosen.refresh_iterations
  make_plan(tiny.MODEL, chosen)


def test_an_active_size_that_fits_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
  """Is refused before anything is measured."""
  model = Model(tiny.MODEL, {})
  monkeypatch.setattr(calibration, "measure_drift", lambda *_: pytest.fail("measured"))
  given = dataclasses.replace(MARCHE, active_size=1)
  with pytest.raises(ValueError, match=r"sample\.active_size=1: iteration 1 forces"):
    calibration.calibrate(model, given, [0], jax.random.key(0))


def test_a_policy_without_marche(model: Model) -> None:
  for policy in ("full", "lazymar+disa"):
    without = dataclasses.replace(tiny.SAMPLE, policy=policy)
    with pytest.raises(ValueError, match="expected marche in what is to be calibrated"):
      calibration.calibrate(model, without, [0], jax.random.key(0))


@pytest.mark.parametrize("fields", [{"refresh_interval": 1}, {"num_iter": 1}])
def test_a_plan_without_caches(model: Model, fields: dict[str, int]) -> None:
  given = dataclasses.replace(MARCHE, **fields)
  with pytest.raises(ValueError, match=r"nothing to calibrate: .*no iteration reads a cache"):
    calibration.calibrate(model, given, [0], jax.random.key(0))


def test_weights_that_are_not_finite(model: Model) -> None:
  params = {**model.params, "mask_token": model.params["mask_token"] * np.nan}
  broken = dataclasses.replace(model, params=params)
  with pytest.raises(plan_runner.NonFiniteLatentsError, match="non-finite latents at iteration 0"):
    calibration.calibrate(broken, MARCHE, [0, 1], jax.random.key(0))


# --- the file


PLANNED: dict[str, object] = {
  "policy": "marche+disa", "refresh_iterations": (0, 3, 5), "active_size": 12,
  "encoder_active_size": 9, "select_layer": 1, "selection": "carried", "condition_cache": True,
}  # fmt: skip


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> pathlib.Path:
  path = tmp_path / "plan.json"
  chosen = dataclasses.replace(MARCHE, **PLANNED, refresh_interval=2)
  plan_file.save_plan(path, tiny.MODEL, "d" * 64, chosen, np.arange(64.0).reshape(8, 8))
  return path


def test_plan_file(saved: pathlib.Path) -> None:
  given = dataclasses.replace(tiny.SAMPLE, num_iter=8, cfg=1.5)
  loaded = plan_file.load_plan(saved, tiny.MODEL, given)
  assert loaded == dataclasses.replace(given, **PLANNED)
  assert PLANNED.keys() == set(plan_file.FIELDS)
  # drift[r, k] = 8 r + k
  assert json.loads(saved.read_text())["drift"] == [0, 1, 2, 27, 28, 45, 46, 47]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"num_iter": 9},
      r"made for num_iter=9, expected 8: use it with --config\.sample\.num_iter=9$",
    ),
    ({"format": "marche_jax refresh plan, version 2"}, "expected .*version 3.* with --calibrate"),
    ({"weights": None}, "missing field weights"),
    ({"model": [1]}, r"model=\[1\]: expected fields"),
    ({"sample": 7}, "sample=7: expected fields"),
    ({"model": {}}, r"made for another model: model\.img_size=None, now "),
    ({"seq_len": 256}, "made for seq_len=256, expected 16"),
    ({"format": "another"}, "expected a plan file of --calibrate"),
    ({"policy": None}, "missing field policy"),
    ({"refresh_iterations": None}, "missing field refresh_iterations"),
    ({"refresh_iterations": [0, "3"]}, "refresh_iterations"),
    ({"refresh_iterations": [True]}, "refresh_iterations"),
    ({"refresh_iterations": []}, "expected iterations from 0 to 7"),
    ({"refresh_iterations": [0, 8]}, r"\[0, 8\]: expected iterations from 0 to 7"),
    ({"policy": "disa"}, "policy='disa': expected marche in it"),
    ({"policy": "marche+fast"}, "unknown policy 'fast'"),
    ({"active_size": -1}, "active_size"),
    ({"cfg": 2.0}, "unknown field cfg"),
  ],
)
def test_wrong_plan_files(saved: pathlib.Path, changes: dict[str, object], message: str) -> None:
  """None: the field is not there."""
  content = {**json.loads(saved.read_text()), **changes}
  saved.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
  with pytest.raises(ValueError, match=message) as caught:
    plan_file.load_plan(saved, tiny.MODEL, MARCHE)
  assert str(caught.value).startswith(f"{saved}: ")


def test_a_plan_of_another_model_is_refused_by_field(saved: pathlib.Path) -> None:
  """As many tokens, as MAR-B and MAR-H have: what it was measured on is another model's drift."""
  other = dataclasses.replace(tiny.MODEL, decoder_depth=tiny.MODEL.decoder_depth + 1)
  depth = tiny.MODEL.decoder_depth
  with pytest.raises(
    ValueError, match=f"another model: model.decoder_depth={depth}, now {depth + 1}$"
  ):
    plan_file.load_plan(saved, other, MARCHE)
  trained = dataclasses.replace(tiny.MODEL, label_drop_prob=0.7)  # of training alone
  plan_file.load_plan(saved, trained, MARCHE)


def test_a_plan_measured_otherwise_is_warned_of_by_field(
  saved: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  told: list[str] = []
  monkeypatch.setattr(plan_file.logging, "warning", lambda text, *args: told.append(text % args))
  plan_file.load_plan(saved, tiny.MODEL, MARCHE, lambda: "d" * 64)
  assert told == []
  # disa brings its own diffusion steps, and head_cache is lazymar's: neither changes a thing.
  other = dataclasses.replace(
    MARCHE, cfg=1.5, temperature=0.5, num_sampling_steps=3, head_cache=True
  )
  plan_file.load_plan(saved, tiny.MODEL, other, lambda: "e" * 64)
  assert [text.partition(": measured ")[2].partition(";")[0] for text in told] == [
    f"with sample.cfg={MARCHE.cfg!r}, now 1.5",
    f"with sample.temperature={MARCHE.temperature!r}, now 0.5",
    "on other weights",
  ]
  assert all(text.startswith(f"{saved}: ") for text in told)


def test_a_directory_is_no_plan(tmp_path: pathlib.Path) -> None:
  with pytest.raises(ValueError, match=f"{tmp_path}: expected a plan file .*[Dd]irectory"):
    plan_file.load_plan(tmp_path, tiny.MODEL, MARCHE)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff\xfe"])
def test_files_that_are_no_plans(tmp_path: pathlib.Path, content: bytes) -> None:
  (tmp_path / "plan.json").write_bytes(content)
  with pytest.raises(ValueError, match=r"plan\.json: expected a plan file of --calibrate"):
    plan_file.load_plan(tmp_path / "plan.json", tiny.MODEL, MARCHE)


def test_bad_flags(model: Model, tmp_path: pathlib.Path) -> None:
  """Told before anything is compiled."""
  done = subprocess.run(
    [sys.executable, "-m", "marche_jax.sample", "--calibrate=plan.txt"],
    capture_output=True, text=True, timeout=120,
  )  # fmt: skip
  assert done.returncode == 1
  assert re.fullmatch(r"error: --calibrate=plan\.txt: .* ends in \.json\n", done.stderr)
  with pytest.raises(ValueError, match="file: expected a directory"):
    (tmp_path / "file").touch()
    sample.write_calibrated(tmp_path / "file" / "plan.json", model, MARCHE)
  with pytest.raises(ValueError, match=r"absent\.json: expected a plan file .*No such file"):
    sample.under_policy(str(tmp_path / "absent.json"), tiny.MODEL, MARCHE, [])


def test_a_plan_file_decides(saved: pathlib.Path) -> None:
  """Of what it says, the command line may say nothing else; entries of comparisons may be one."""
  expected = dataclasses.replace(MARCHE, **PLANNED)
  assert sample.under_policy(str(saved), tiny.MODEL, MARCHE, ["cfg", "num_iter"]) == expected
  named = dataclasses.replace(MARCHE, policy=str(saved))  # --config.sample.policy=FILE
  assert sample.under_policy(None, tiny.MODEL, named, ["policy"]) == expected
  for field in ("active_size", "refresh_interval", "num_sampling_steps", "head_cache"):
    with pytest.raises(ValueError, match=rf"sample\.{field} is"):
      sample.under_policy(str(saved), tiny.MODEL, MARCHE, [field])
  with pytest.raises(ValueError, match=r"expected one of --policy and --config\.sample\.policy"):
    sample.under_policy("full", tiny.MODEL, MARCHE, ["policy"])
  (entry,) = parse_entries([f"{saved}:cfg=1.5"], tiny.MODEL, MARCHE)
  assert entry.sample == dataclasses.replace(expected, cfg=1.5)


def test_command(model: Model, tmp_path: pathlib.Path) -> None:
  """Of a model that decodes in full unless it is told otherwise; nothing is drawn."""
  stored, path = tmp_path / "model", tmp_path / "plan.json"
  checkpoint.save_model(stored, "mar", tiny.MODEL, model.params, sample_config=tiny.SAMPLE)
  done = subprocess.run(
    [sys.executable, "-m", "marche_jax.sample", f"--checkpoint={stored}", f"--calibrate={path}",
     f"--out={tmp_path / 'out'}", "--compilation_cache="],
    env=golden.quick_environment(),
    capture_output=True, text=True, timeout=240,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  refreshes = json.loads(path.read_text())["refresh_iterations"]
  assert f"full refreshes at iterations {', '.join(map(str, refreshes))}: {path}" in done.stdout
  assert not (tmp_path / "out").exists()
  used = sample.under_policy(str(path), tiny.MODEL, tiny.SAMPLE, [])
  assert used == dataclasses.replace(
    tiny.SAMPLE, policy="marche", refresh_iterations=tuple(refreshes)
  )
