"""Step shapes: padded within bounds, and at the least work."""

from __future__ import annotations

import functools
import itertools

import golden
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.planning import cost
from marche_jax.planning.grouping import MAX_PADDING, MAX_STEP_SHAPES, group_shapes, widest
from marche_jax.planning.policies import make_plan
from marche_jax.planning.shapes import HeadShape, StackShape, StepShape

MAR_B = ModelConfig()


@pytest.mark.parametrize("num_iter", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("name", ["mar_base", "mar_large", "mar_huge"])
def test_padding_is_at_most_a_quarter(name, num_iter):
  plan = make_plan(golden.read_config(name).model, SampleConfig(num_iter=num_iter))
  encoder, head = plan.padding()
  assert encoder <= 1.25 and head <= 1.25
  assert len(plan.step_shapes) <= MAX_STEP_SHAPES


@settings(deadline=None, max_examples=50)
@given(
  st.lists(st.tuples(st.integers(1, 9), st.integers(1, 50)), min_size=1, max_size=7),
  st.integers(0, 20),
  st.booleans(),
)
def test_slots_are_grouped_at_the_least_work(rows, first, selective):
  """Against trying every split into as few groups as reach the padding asked for."""
  config = MAR_B
  predicted, steps = (np.asarray(x) for x in zip(*rows))
  known = first + np.cumsum(predicted) - predicted

  def exact(k):
    some = {"source": "scout", "layer": 2} if selective else {}
    active = {"active": 5 + int(known[k]) // 2, "forced": 2} if selective else {}
    return StepShape(
      encoder=StackShape(int(known[k]), **active, **some),
      decoder=StackShape(config.seq_len, **active, **some),
      head=HeadShape(int(predicted[k]), int(steps[k])),
      guided=True,
      halves=2,
    )

  every = [exact(k) for k in range(len(rows))]

  def split(cuts):
    bounds = [0, *cuts, len(rows)]
    return [
      functools.reduce(widest, every[i:j])
      for i, j in itertools.pairwise(bounds)
      for _ in range(i, j)
    ]

  def work(shapes):
    return sum(cost.iteration_flops(config, s, int(n)).total for s, n in zip(shapes, steps))

  def padding(shapes):
    def tokens(shapes):
      encoder = sum(s.encoder.active or config.buffer_size + s.encoder.slots for s in shapes)
      return np.asarray([encoder, sum(s.head.slots for s in shapes)])

    return (tokens(shapes) / tokens(every)).max()

  for count in range(1, len(rows) + 1):
    best = min(map(split, itertools.combinations(range(1, len(rows)), count - 1)), key=work)
    if padding(best) <= MAX_PADDING:
      break
  grouped = group_shapes(config, every, steps.tolist())
  assert work(grouped) == pytest.approx(work(best))
  for shape, wide in zip(every, grouped):  # every row fits into its shape
    assert widest(wide, shape) == wide


def test_rows_of_another_kind_share_no_shape():
  """Only numbers of slots may be padded: what else a shape says is what the iteration does."""
  plan = make_plan(MAR_B, SampleConfig(num_iter=32, policy="marche", refresh_interval=3))
  selective = [plan.step_shapes[row.shape_id].decoder.active is not None for row in plan.rows]
  assert selective == [k % 3 > 0 for k in range(32)]
