"""The decode plan: schedules against recorded runs, and what must hold of every plan."""

from __future__ import annotations

import itertools
import math

import golden
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marche_jax import cost
from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.plan import MAX_PADDING, MAX_STEP_SHAPES, group_slots, mask_schedule
from marche_jax.policies import POLICIES, make_plan

MAR_B = ModelConfig()


def sized(grid: int) -> ModelConfig:
  """MAR-B with grid * grid tokens."""
  return ModelConfig(img_size=16 * grid)


@pytest.mark.parametrize("run", golden.RUNS)
def test_plan_equals_the_recorded_run(run):
  sample, recorded = golden.sampling_run(run)
  plan = make_plan(golden.model(run.split("/")[0])[0], sample)
  assert [row.mask_len for row in plan.rows] == recorded["mask_len"].tolist()
  assert [row.num_predict for row in plan.rows] == recorded["num_pred"].tolist()
  scale = np.asarray([row.cfg for row in plan.rows], np.float32)
  np.testing.assert_array_equal(scale, recorded["cfg_per_iter"])
  np.testing.assert_array_equal(
    [row.num_predict for row in plan.rows], recorded["pred_mask"].sum(axis=2)[:, 0]
  )
  assert plan.shapes[0].guidance_halves == (2 if recorded["z_uncond"].size else 1)


@st.composite
def runs(draw):
  grid = draw(st.integers(1, 16))
  known = draw(st.integers(0, grid**2 - 1))
  return sized(grid), draw(st.integers(1, min(grid**2 - known, 80))), known


@settings(deadline=None)
@given(runs(), st.sampled_from(sorted(POLICIES)), st.sampled_from([1.0, 3.0]))
def test_every_plan(run, policy, cfg):
  config, num_iter, num_known = run
  sample = SampleConfig(num_iter=num_iter, cfg=cfg, policy=policy, num_sampling_steps=20)
  plan = make_plan(config, sample, num_known)

  order = np.random.default_rng(0).permutation(config.seq_len)
  predicted = np.zeros(config.seq_len, int)
  predicted[order[::-1][:num_known]] += 1
  for row in plan.rows:
    assert row.num_known == predicted.sum()
    assert row.num_predict >= 1
    now = order[::-1][row.num_known : row.num_known + row.num_predict]
    predicted[now] += 1
    shape = plan.shapes[row.shape]
    assert row.num_known <= shape.encoder_slots <= config.seq_len
    assert row.num_predict <= shape.predict_slots <= config.seq_len
    assert shape.guidance_halves == (1 if cfg == 1.0 else 2)
    steps = len(plan.processes[row.process].timesteps)
    assert shape.diffusion_steps in (None, steps)
  assert (predicted == 1).all()  # every position exactly once

  assert len(plan.rows) == num_iter
  assert len(set(plan.shapes)) == len(plan.shapes) <= MAX_STEP_SHAPES
  assert {row.shape for row in plan.rows} == set(range(len(plan.shapes)))
  assert all(padding >= 1 for padding in plan.padding())
  exact, padded = plan.flops(padded=False), plan.flops()
  assert 0 < exact.encoder <= padded.encoder and 0 < exact.head <= padded.head
  assert len(plan.table().splitlines()) == num_iter + 2


@pytest.mark.parametrize("num_iter", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("name", ["mar_base", "mar_large", "mar_huge"])
def test_padding_is_at_most_a_quarter(name, num_iter):
  plan = make_plan(golden.read_config(name).model, SampleConfig(num_iter=num_iter))
  encoder, head = plan.padding()
  assert encoder <= 1.25 and head <= 1.25
  assert len(plan.shapes) <= MAX_STEP_SHAPES


@given(st.integers(1, 1024), st.data())
def test_mask_schedule(unknown, data):
  num_iter = data.draw(st.integers(1, min(unknown, 300)))
  mask_len, predicted = mask_schedule(unknown, num_iter)
  assert predicted.sum() == unknown and predicted.min() >= 1
  assert mask_len[-1] == 1  # so the last guidance scale is not quite cfg, as in the reference
  assert (np.diff(mask_len[:-1]) < 0).all()
  np.testing.assert_array_equal(unknown - np.cumsum(predicted)[:-1], mask_len[:-1])


def test_mask_schedule_is_computed_in_float64():
  """cos(pi/3) is a little above 1/2 in float64 and a little below it in float32."""
  assert math.floor(256 * math.cos(math.pi / 2 * 2 / 3)) == 128
  assert np.floor(np.float32(256) * np.cos(np.float32(np.pi) / 2 * np.float32(2 / 3))) == 127
  assert mask_schedule(256, 3)[0].tolist() == [221, 128, 1]
  assert mask_schedule(256, 6)[0][3] == 128


@settings(deadline=None, max_examples=50)
@given(
  st.lists(st.tuples(st.integers(1, 9), st.integers(1, 50)), min_size=1, max_size=7),
  st.integers(0, 20),
)
def test_slots_are_grouped_at_the_least_work(rows, first):
  """Against trying every split into as few groups as reach the padding asked for."""
  config = sized(16)
  predicted, steps = (np.asarray(x) for x in zip(*rows))
  known = first + np.cumsum(predicted) - predicted

  def split(cuts):
    bounds = [0, *cuts, len(rows)]
    return [
      (int(known[i:j].max()), int(predicted[i:j].max()))
      for i, j in itertools.pairwise(bounds)
      for _ in range(i, j)
    ]

  def work(groups):
    return sum(
      cost.encoder_flops(config, k) + cost.head_flops(config, p, int(s))
      for (k, p), s in zip(groups, steps)
    )

  def padding(groups):
    buffer = config.buffer_size
    encoder = sum(buffer + k for k, _ in groups) / (buffer + known).sum()
    return max(encoder, sum(p for _, p in groups) / predicted.sum())

  for count in range(1, len(rows) + 1):
    best = min(map(split, itertools.combinations(range(1, len(rows)), count - 1)), key=work)
    if padding(best) <= MAX_PADDING:
      break
  assert work(group_slots(config, known, predicted, steps)) == pytest.approx(work(best))


def test_guidance_off_halves_the_work():
  on, off = (make_plan(MAR_B, SampleConfig(cfg=cfg)).flops().total for cfg in (3.0, 1.0))
  assert off == pytest.approx(on / 2)


def test_shares_of_the_work():
  """MAR-B, 64 iterations, guidance, 100 diffusion steps: the shares that DESIGN.md states."""
  flops = make_plan(MAR_B, SampleConfig(num_iter=64)).flops(padded=False)
  assert 0.22 <= flops.encoder / flops.total <= 0.27
  assert 0.48 <= flops.decoder / flops.total <= 0.53
  assert 0.22 <= flops.head / flops.total <= 0.27


def test_table_states_every_row_and_the_padding():
  plan = make_plan(MAR_B, SampleConfig(num_iter=5, num_sampling_steps=7))
  lines = plan.table().splitlines()
  for k, (line, row) in enumerate(zip(lines[1:], plan.rows)):
    shape = plan.shapes[row.shape]
    assert line.split() == [
      str(k), str(row.shape), str(row.num_known), str(row.num_predict), str(row.mask_len),
      f"{row.cfg:.2f}", "7", str(shape.encoder_slots), str(shape.predict_slots),
    ]  # fmt: skip
  assert lines[-1].endswith(
    f"encoder {plan.padding()[0]:.2f}, head {plan.padding()[1]:.2f}"
  )  # fmt: skip


@pytest.mark.parametrize(("num_iter", "num_known"), [(257, 0), (57, 200), (1, 256)])
def test_more_iterations_than_tokens(num_iter, num_known):
  expected = rf"sample\.num_iter={num_iter}: expected 1 to {256 - num_known}"
  with pytest.raises(ValueError, match=expected):
    make_plan(MAR_B, SampleConfig(num_iter=num_iter), num_known)


def test_unknown_policy():
  with pytest.raises(ValueError, match=r"sample\.policy='fast': expected one of .*full"):
    make_plan(MAR_B, SampleConfig(policy="fast"))
