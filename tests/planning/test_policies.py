"""Policies: the iterations that each one plans, against the papers' numbers; what they refuse."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
from golden import DATA
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.decoding import state as state_lib
from marche_jax.models.diffusion import log_snr_timesteps, respaced_timesteps
from marche_jax.planning.plan import DecodePlan
from marche_jax.planning.policies import POLICIES, make_plan, parse_policy
from marche_jax.planning.policies.disa import disa_diffusion_steps
from marche_jax.planning.policies.gtr import checkerboard_stages, stage_iterations
from marche_jax.planning.policies.lazymar import kept_share

MAR_B = ModelConfig()
SMALL = ModelConfig(img_size=96)  # 6x6 tokens


def plan(
  policy: str,
  config: ModelConfig = MAR_B,
  num_known: int = 0,
  num_known_odd: int | None = None,
  **fields,
) -> DecodePlan:
  return make_plan(config, SampleConfig(policy=policy, **fields), num_known, num_known_odd)


def shapes(plan: DecodePlan) -> list:
  """The step shape of every iteration."""
  return [plan.step_shapes[row.shape_id] for row in plan.rows]


def full(shape) -> bool:
  return shape.encoder.active is None and shape.decoder.active is None


def timesteps(plan: DecodePlan) -> list[list[int]]:
  return [plan.processes[row.process].timesteps.tolist() for row in plan.rows]


# ---- names


@pytest.mark.parametrize(
  ("policy", "message"),
  [
    ("fast", "unknown policy 'fast'; expected one of full, .*marche"),
    ("", "unknown policy ''"),
    ("marche+", "unknown policy ''"),
    ("marche + disa", "unknown policy 'marche '"),
    ("marche+marche", "marche stands there twice"),
    ("full+full", "full stands there twice"),
    ("marche+lazymar", "marche and lazymar contradict each other, both decide on the tokens"),
    ("recap+disa+marche", "recap and marche contradict each other"),
    ("disa+turbo", "disa and turbo contradict each other, both decide on the diffusion steps"),
    ("turbo+gtr", "turbo and gtr contradict each other, both decide on the order"),
  ],
)
def test_names_that_make_no_sense(policy, message):
  with pytest.raises(ValueError, match=message) as caught:
    make_plan(MAR_B, SampleConfig(policy=policy))
  assert str(caught.value).startswith(f"sample.policy={policy!r}: ")


@pytest.mark.parametrize("policy", ["recap+gtr", "recap+turbo"])
def test_recap_in_raster_order_contradicts_an_order_of_stages(policy):
  assert plan(policy).stages is not None
  with pytest.raises(ValueError, match=r"sample\.recap_raster=True: contradicts the order of gtr"):
    plan(policy, recap_raster=True)


def test_every_policy_is_listed_where_one_is_unknown():
  with pytest.raises(ValueError) as caught:
    parse_policy("fast")
  assert all(name in str(caught.value) for name in POLICIES)


def test_the_order_of_names_does_not_matter():
  assert parse_policy("marche+disa+gtr") == parse_policy("disa+gtr+marche") == [
    "gtr", "disa", "marche",
  ]  # fmt: skip
  assert plan("full+marche").rows == plan("marche").rows


@settings(deadline=None, max_examples=50)
@given(
  st.sampled_from(["marche+disa+gtr", "recap+disa", "lazymar+gtr"]),
  st.integers(1, 96),
  st.sampled_from([1.0, 3.0]),
)
def test_combinations_build(policy, num_iter, cfg):
  """Each policy decides on what it decides alone."""
  found = plan(policy, num_iter=num_iter, cfg=cfg)
  names = policy.split("+")
  counts = plan("gtr" if "gtr" in names else "full", num_iter=num_iter, cfg=cfg)
  assert [row.num_predict for row in found.rows] == [row.num_predict for row in counts.rows]
  assert (found.stages is not None) == ("gtr" in names)
  iterations = len(found.rows)
  if "disa" in names:
    assert max(max(t) for t in timesteps(found)) <= 950
    steps = [
      respaced_timesteps(disa_diffusion_steps(k, iterations), 950).tolist()
      for k in range(iterations)
    ]
    if "recap" in names:  # whose local iterations take 40% of them
      for k in range(iterations // 2 + 1, iterations, 2):
        steps[k] = respaced_timesteps(max(2, round(0.4 * len(steps[k]))), 950).tolist()
    assert timesteps(found) == steps
  else:
    assert timesteps(found) == timesteps(counts)


def test_timesteps_are_spaced_as_the_solver_wants_them():
  """Under every policy; a higher-order solver takes them evenly in log SNR."""
  for policy, steps in (("disa", 50), ("gtr", 50), ("recap", 100), ("full", 100)):
    found = timesteps(plan(policy, num_iter=8, solver="dpm++"))
    top = 950 if policy == "disa" else 999
    assert found[0] == log_snr_timesteps(steps, top).tolist() != respaced_timesteps(steps).tolist()
  for local in timesteps(plan("recap+turbo", num_iter=64))[7::2]:
    assert local == log_snr_timesteps(4, 950).tolist()


@settings(deadline=None, max_examples=100)
@given(
  st.sampled_from([*POLICIES, "marche+disa+gtr", "recap+turbo", "lazymar+gtr", "marche+turbo"]),
  st.sampled_from([1, 8, 32, 64]),
  st.integers(0, 35),
  st.data(),
)
def test_any_number_of_known_tokens(policy, num_iter, num_known, data):
  """Those of a calibrated plan may go beyond the iterations that are left."""
  fields = {"num_iter": min(num_iter, 36 if num_known == 0 else 64)}
  if "marche" in policy and num_known:
    fields["refresh_iterations"] = data.draw(st.sampled_from([(), (0, 3, 40)]))
  odd = data.draw(st.integers(max(0, num_known - 18), min(18, num_known)) | st.none())
  found = plan(policy, SMALL, num_known, odd, **fields)
  assert found.rows[0].num_known == num_known
  predicted = [row.num_predict for row in found.rows]
  assert min(predicted) >= 1 and sum(predicted) == 36 - num_known


# ---- DiSA


def test_disa_equals_the_released_timesteps():
  golden = json.loads((DATA / "peers" / "disa_timesteps.json").read_text())
  for iterations, rows in golden.items():
    assert timesteps(plan("disa", num_iter=int(iterations))) == rows
  assert len(golden) == 3
  steps = [len(t) for t in timesteps(plan("disa", num_iter=64))]
  assert (steps[-1], round(np.mean(steps))) == (5, 26)
  assert plan("disa", num_iter=1).rows[0].num_predict == 256
  assert disa_diffusion_steps(0, 1) == 50


def test_disa_respects_a_lower_max_timestep():
  assert max(max(t) for t in timesteps(plan("disa", num_iter=8, max_timestep=700))) == 700


# ---- GtR


def test_gtr_takes_half_the_iterations():
  found = plan("gtr", num_iter=64)
  assert stage_iterations(64) == [24, 6, 2]
  predicted = np.asarray([row.num_predict for row in found.rows])
  assert len(predicted) == 32
  # A quarter of the tokens in 24 iterations, a quarter in 6, the other half in 2.
  assert predicted[:24].sum() == predicted[24:30].sum() == 64
  assert predicted[30:].tolist() == [64, 64]
  assert set(predicted[:24]) == {2, 3} and set(predicted[24:30]) == {10, 11}
  steps = [len(t) for t in timesteps(found)]
  assert (steps[0], steps[29]) == (50, 20) and steps[30:] == [20, 20]
  assert (np.diff(steps) <= 0).all()
  for row, shape in zip(found.rows[30:], shapes(found)[30:]):
    assert row.num_detail == 6  # a tenth
    assert shape.head.detail >= 6 and shape.head.detail_diffusion_steps == 50
    assert len(found.processes[row.detail_process].timesteps) == 50
  assert not any(row.num_detail for row in found.rows[:30])
  assert not any(row.num_detail for row in plan("gtr", detail_tokens=False).rows)


@pytest.mark.parametrize("grid", [1, 2, 5, 6, 16])
def test_a_checkerboard(grid):
  """The last stage is one colour of it: all four neighbours of its tokens are of the other."""
  stages = checkerboard_stages(ModelConfig(img_size=16 * grid)).reshape(grid, grid)
  last = stages == 2
  assert (last == (np.indices((grid, grid)).sum(axis=0) % 2 == 1)).all()
  sizes = np.bincount(stages.ravel(), minlength=3)
  assert sizes.sum() == grid**2 and abs(sizes[0] - sizes[1]) <= grid


def test_neighbours_are_known_in_the_reconstruction():
  """In every image: when a token of the last stage is predicted, all its neighbours are there."""
  found = plan("gtr", SMALL, num_iter=18)
  given = np.stack([np.random.default_rng(i).permutation(36) for i in range(20)])
  by_rank = np.asarray(state_lib.arrange(found, given))
  np.testing.assert_array_equal(np.sort(by_rank, axis=1), np.tile(np.arange(36), (20, 1)))
  stage = checkerboard_stages(SMALL)
  assert (np.diff(stage[by_rank], axis=1) >= 0).all()
  assert len({tuple(ranks) for ranks in by_rank}) == 20  # still random within a stage
  checked = 0
  for ranks in by_rank:
    known = np.zeros((8, 8), bool)  # the image with a border, where nothing is missing
    known[[0, -1]], known[:, [0, -1]] = True, True
    for row in found.rows:
      now = np.divmod(ranks[row.num_known : row.num_known + row.num_predict], 6)
      for r, c in zip(*now):
        if (r + c) % 2 == 1:
          checked += 1
          assert known[r, c + 1] and known[r + 2, c + 1] and known[r + 1, c] and known[r + 1, c + 2]
      known[now[0] + 1, now[1] + 1] = True
  assert checked == 20 * 18


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 255), st.data())
def test_gtr_with_any_number_of_iterations(num_known, data):
  num_iter = data.draw(st.integers(1, 256 - num_known))
  found = plan("gtr", num_known=num_known, num_iter=num_iter)
  predicted = np.asarray([row.num_predict for row in found.rows])
  assert predicted.min() >= 1 and predicted.sum() == 256 - num_known
  assert len(predicted) <= sum(stage_iterations(num_iter)) <= max(3, num_iter / 2 + 2)
  assert found.rows[-1].mask_len == 1
  assert [row.mask_len for row in found.rows[:-1]] == (256 - num_known - predicted.cumsum())[
    :-1
  ].tolist()


def known_masks(num: int, odd: int, grid: int = 6) -> np.ndarray:
  """20 masks [20, S], 1 where unknown: of `num` known tokens, `odd` where row + column is odd."""
  colour = np.indices((grid, grid)).sum(axis=0).ravel() % 2
  mask = np.ones((20, grid**2), int)
  for i, row in enumerate(mask):
    rng = np.random.default_rng(i)
    row[rng.choice(np.flatnonzero(colour == 1), odd, replace=False)] = 0
    row[rng.choice(np.flatnonzero(colour == 0), num - odd, replace=False)] = 0
  return mask


@pytest.mark.parametrize("policy", ["gtr", "turbo"])
@pytest.mark.parametrize(("num", "odd"), [(12, 0), (12, 12), (20, 3), (18, 0), (18, 18), (35, 18)])
def test_known_tokens_of_one_colour_move_the_reconstruction(policy, num, odd):
  """No token of the second colour is predicted together with, or before, one of the first."""
  found = plan(policy, SMALL, num, num_iter=18, num_known_odd=odd)
  mask = known_masks(num, odd)
  given = np.stack([np.random.default_rng(i).permutation(36) for i in range(20)])
  unknown = np.take_along_axis(mask, given, axis=1)
  given = np.take_along_axis(given, np.argsort(unknown, axis=1, kind="stable"), axis=1)
  by_rank = np.asarray(state_lib.arrange(found, given))
  colours = np.divmod(by_rank, 6)[0] + np.divmod(by_rank, 6)[1]
  drawn = set()
  for row in found.rows:
    now = colours[:, row.num_known : row.num_known + row.num_predict] % 2
    assert len(set(now.ravel().tolist())) == 1
    drawn.add(int(now[0, 0]))
  assert found.rows[0].num_known == num and sum(r.num_predict for r in found.rows) == 36 - num
  assert drawn == {colour for colour, known in ((0, num - odd), (1, odd)) if known < 18}


# ---- ReCAP and LazyMAR


@pytest.mark.parametrize("num_iter", [1, 2, 7, 64])
def test_recap(num_iter):
  """First half full, then pairs of a full and a local iteration."""
  found = plan("recap", num_iter=num_iter)
  for k, (row, shape) in enumerate(zip(found.rows, shapes(found))):
    local = k > num_iter // 2 and (k - num_iter // 2) % 2 == 1
    assert full(shape) == (not local)
    assert len(found.processes[row.process].timesteps) == (40 if local else 100)
    if local:
      assert row.encoder_active == 64 + row.num_previous
      assert row.decoder_active == 64 + row.num_previous + row.num_predict
      assert shape.encoder.buffer and shape.decoder.buffer
      assert shape.encoder.source == shape.decoder.source == "none"
      assert shape.halves == 2
  if num_iter == 64:
    assert [k for k, s in enumerate(shapes(found)) if not full(s)] == list(range(33, 64, 2))
    assert found.rows[63].cfg == 3.0  # unlike in `full`, where one token counts as masked
  assert found.raster_groups == ()


@pytest.mark.parametrize("policy", ["full", "recap", "recap+turbo", "marche+gtr", "lazymar+disa"])
@pytest.mark.parametrize("solver", ["ddpm", "dpm++"])
def test_no_iteration_draws_at_timestep_0_alone(policy, solver):
  """Which would leave noise as it is; the noisiest timestep is always among them."""
  for steps, top in ((2, 999), (3, 950), (3, 1), (100, 1), (4, 999)):
    fields = {"num_sampling_steps": steps, "max_timestep": top, "num_iter": 8}
    if "turbo" not in policy:
      fields["solver"] = solver
    for row in timesteps(plan(policy, **fields)):
      clipped = 950 if {"turbo", "disa"} & set(policy.split("+")) else 999
      assert len(row) >= 2 and (row[0], row[-1]) == (0, min(top, clipped))


def test_recap_in_raster_order():
  """The two sets of a pair are revealed in raster order; those before in the order given."""
  found = plan("recap", SMALL, num_known=5, num_iter=8, recap_raster=True)
  ranks = [(row.num_known, row.num_known + row.num_predict) for row in found.rows]
  assert found.raster_groups == ((ranks[4][0], ranks[5][1]), (ranks[6][0], ranks[7][1]))
  given = np.stack([np.random.default_rng(i).permutation(36) for i in range(4)])
  by_rank = np.asarray(state_lib.arrange(found, given))
  np.testing.assert_array_equal(by_rank[:, : ranks[4][0]], given[:, : ranks[4][0]])
  for start, end in found.raster_groups:
    np.testing.assert_array_equal(by_rank[:, start:end], np.sort(given[:, start:end], axis=1))
  plain = plan("recap", SMALL, num_iter=8)
  np.testing.assert_array_equal(state_lib.arrange(plain, given), given)


def test_lazymar():
  """Iterations 0 to 5 and every 9th after are full; the others prune by a table."""
  found = plan("lazymar")
  lazy = [k for k, s in enumerate(shapes(found)) if s.halves == 1]
  assert sorted(set(range(64)) - set(lazy)) == [0, 1, 2, 3, 4, 5, 14, 23, 32, 41, 50, 59]
  table = ((20, 1.0), (21, 0.6), (25, 0.5), (30, 0.4), (35, 0.15), (40, 0.12), (64, 0.05))
  for k, (row, shape) in enumerate(zip(found.rows, shapes(found))):
    assert full(shape) == (k not in lazy)
    share = next(share for end, share in table if k < end)
    assert kept_share(k, 64) == kept_share(2 * k, 128) == share
    if k in lazy:
      assert row.encoder_active == 64 + row.num_previous and shape.encoder.buffer
      forced = row.num_previous + row.num_predict
      assert row.decoder_active == max(int(320 * share), forced + 15)
      assert (shape.decoder.source, shape.decoder.score, shape.decoder.layer) == (
        "lower", "value", 4,
      )  # fmt: skip
  assert not any(s.head.cached for s in shapes(found))
  assert all(s.head.cached for s in shapes(plan("lazymar", head_cache=True)))
  assert all(full(s) for s in shapes(plan("lazymar", num_iter=6)))


@pytest.mark.parametrize("policy", ["lazymar+disa", "lazymar+gtr"])
def test_head_cache_needs_one_number_of_steps(policy):
  with pytest.raises(ValueError, match=r"sample\.head_cache=True: expected the same diffusion"):
    plan(policy, head_cache=True)


def test_lazymar_needs_a_layer_to_prune_at():
  config = dataclasses.replace(SMALL, decoder_depth=1)
  with pytest.raises(ValueError, match=r"model\.decoder_depth=1: expected at least 2"):
    plan("lazymar", config, num_iter=20)


# ---- MARché


@pytest.mark.parametrize("interval", [1, 3, 64])
def test_marche_refreshes_at_intervals(interval):
  found = plan("marche", refresh_interval=interval)
  assert [full(s) for s in shapes(found)] == [k % interval == 0 for k in range(64)]
  for row, shape in zip(found.rows, shapes(found)):
    if not full(shape):
      assert (row.decoder_active, row.encoder_active) == (64, 32)  # the paper's, and half of it
      assert (shape.decoder.source, shape.decoder.layer) == ("scout", 2)
      assert shape.encoder == dataclasses.replace(
        shape.decoder, slots=shape.encoder.slots, active=shape.encoder.active,
        forced=shape.encoder.forced,
      )  # fmt: skip
      assert not shape.decoder.buffer and shape.halves == 2
  if interval == 1:
    everything = plan("full")
    assert (found.rows, found.step_shapes) == (everything.rows, everything.step_shapes)


def test_marche_refreshes_where_it_is_told():
  found = plan("marche", num_iter=10, refresh_iterations=(6, 2))
  assert [k for k, s in enumerate(shapes(found)) if full(s)] == [0, 2, 6]
  with pytest.raises(ValueError, match=r"sample\.refresh_iterations: found 10, expected .*0 to 9"):
    plan("marche", num_iter=10, refresh_iterations=(2, 10))


@pytest.mark.parametrize("interval", [0, -1, 2.0])
def test_refresh_interval_out_of_range(interval):
  with pytest.raises(
    ValueError, match=rf"sample\.refresh_interval={interval}: expected an integer"
  ):
    plan("marche", refresh_interval=interval)


@pytest.mark.parametrize(
  ("selection", "depth", "last"), [("scout", 3, 3), ("carried", 3, 2), ("lower", 3, 2)]
)
def test_select_layer_outside_the_stacks(selection, depth, last):
  config = dataclasses.replace(SMALL, encoder_depth=5, decoder_depth=depth)
  fields = {"num_iter": 6, "selection": selection}
  plan("marche", config, select_layer=last, **fields)
  message = rf"sample\.select_layer={last + 1}: expected 1 to {last} with selection {selection}"
  with pytest.raises(ValueError, match=message):
    plan("marche", config, select_layer=last + 1, **fields)
  shallow = dataclasses.replace(SMALL, encoder_depth=1)
  with pytest.raises(ValueError, match=r"sample\.select_layer=2: expected 1 to 1 .*of 1 and 12"):
    plan("marche", shallow, **fields)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 64), st.integers(1, 9), st.sampled_from(["", "+gtr"]), st.data())
def test_an_active_size_must_hold_the_forced_tokens(num_iter, interval, more, data):
  """The error names the iteration and the smallest size that works; that size then works."""
  field = data.draw(st.sampled_from(["active_size", "encoder_active_size"]))
  fields = {"num_iter": num_iter, "refresh_interval": interval}
  rows = plan("marche" + more, **fields).rows
  forced = {
    k: row.num_previous + (row.num_predict if field == "active_size" else 0)
    for k, row in enumerate(rows)
    if k % interval
  }
  assume(forced and max(forced.values()) > 1)
  need = max(forced.values())
  given = data.draw(st.integers(1, need - 1))
  first = next(k for k, n in forced.items() if n > given)
  message = (
    rf"sample\.{field}={given}: iteration {first} forces {forced[first]} tokens; the smallest size "
    rf"that works is {need} "
  )
  with pytest.raises(ValueError, match=message):
    plan("marche" + more, **fields, **{field: given})
  works = plan("marche" + more, **fields, **{field: need})
  stack = "decoder_active" if field == "active_size" else "encoder_active"
  assert all(getattr(works.rows[k], stack) == need for k in forced)


def test_the_default_size_is_raised_to_what_is_forced():
  """Few iterations force more tokens than a fifth."""
  found = plan("marche", num_iter=4)
  row = found.rows[2]
  assert row.num_previous + row.num_predict > 64 == plan("marche").rows[1].decoder_active
  assert row.decoder_active == row.num_previous + row.num_predict
  assert row.encoder_active == row.num_previous > 32


@pytest.mark.parametrize("field", ["active_size", "encoder_active_size"])
def test_a_size_above_the_sequence_is_clipped(field, caplog):
  logging.getLogger("absl").propagate = True
  with caplog.at_level(logging.WARNING, "absl"):
    found = plan("marche", SMALL, num_iter=6, **{field: 101})
  assert caplog.messages == [f"sample.{field}=101: clipped to all 100 tokens"]
  stack = "decoder" if field == "active_size" else "encoder"
  assert all(getattr(s, stack).active is None for s in shapes(found))  # the plan's shortcut
  # All of the decoder's tokens mean those of the encoder too.
  assert all(full(s) for s in shapes(found)) == (field == "active_size")


def test_a_clipped_size_is_said_outside_of_tests():
  """Once, on the standard error of a command as of any program."""
  script = (
    "from marche_jax.config import ModelConfig, SampleConfig\n"
    "from marche_jax.planning.policies import make_plan\n"
    "make_plan(ModelConfig(), SampleConfig(policy='marche', active_size=321))"
  )
  command = ["-m", "marche_jax.sample", "--print_plan", "--policy=marche"]
  for arguments in (["-c", script], [*command, "--config.sample.active_size=321"]):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("sample.active_size=321: clipped to all ") == 1, done.stderr


def test_condition_cache_computes_one_half():
  found = plan("marche", condition_cache=True)
  assert [s.halves for s in shapes(found)] == [1 if k % 3 else 2 for k in range(64)]
  assert found.cache_halves == 1
  unguided = plan("marche", condition_cache=True, cfg=1.0)
  assert all(s.halves == 1 and s.difference == 0 for s in unguided.step_shapes)


# ---- turbo


def test_turbo():
  """GtR's order in 12 full iterations of 64, a few steps of a second-order solver in each."""
  found = plan("turbo", num_iter=64)
  assert len(found.rows) == 12
  np.testing.assert_array_equal(found.stages, checkerboard_stages(MAR_B))
  assert all(full(s) and s.head.solver == "dpm++" and not s.head.detail for s in found.step_shapes)
  assert all(len(t) == 9 and t[0] == 0 and t[-1] == 950 for t in timesteps(found))
  assert max(max(t) for t in timesteps(plan("turbo", max_timestep=600))) == 600
  both = plan("turbo+marche")
  assert [full(s) for s in shapes(both)] == [k % 3 == 0 for k in range(12)]
  assert timesteps(both) == timesteps(found)
