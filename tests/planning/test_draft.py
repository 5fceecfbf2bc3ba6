"""Drafts: the schedule of MAR, and what makes no plan."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.planning.draft import Draft, Refresh, build, full_iterations, mask_schedule
from marche_jax.planning.policies import make_plan

MAR_B = ModelConfig()


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


def test_the_unconditional_half_needs_a_full_iteration_before():
  sample = SampleConfig(num_iter=4)
  steps = full_iterations(MAR_B, sample, 0, [0, 1])
  steps[1].halves, steps[2].halves = 1, 1
  plan = build(Draft(MAR_B, sample, 0, steps))
  first = plan.rows[2].num_known + plan.rows[2].num_predict
  assert [plan.step_shapes[row.shape_id].difference for row in plan.rows] == [first, 0, 0, 0]
  steps[0].encoder = Refresh(3)  # an encoder that did not run on everything
  with pytest.raises(ValueError, match="iteration 1 computes the conditional half alone"):
    build(Draft(MAR_B, sample, 0, steps))


@pytest.mark.parametrize(("num_iter", "num_known"), [(257, 0), (1, 256)])
def test_more_iterations_than_tokens(num_iter, num_known):
  expected = rf"sample\.num_iter={num_iter}: expected 1 to {256 - num_known}"
  with pytest.raises(ValueError, match=expected):
    make_plan(MAR_B, SampleConfig(num_iter=num_iter), num_known)


@pytest.mark.parametrize("num_known", [200, 255])
def test_known_tokens_leave_fewer_iterations(num_known):
  """As many as there are tokens to predict, where more are asked for."""
  unknown = 256 - num_known
  plan = make_plan(MAR_B, SampleConfig(num_iter=57), num_known)
  assert plan.rows == make_plan(MAR_B, SampleConfig(num_iter=unknown), num_known).rows
  assert [row.num_predict for row in plan.rows] == [1] * unknown
