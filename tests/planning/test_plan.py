"""The decode plan: schedules against recorded runs, and what must hold of every plan."""

from __future__ import annotations

import dataclasses
import re

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.decoding import state as state_lib
from marche_jax.planning.grouping import MAX_STEP_SHAPES
from marche_jax.planning.plan import DecodePlan
from marche_jax.planning.policies import make_plan

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
  assert plan.step_shapes[0].halves == (2 if recorded["z_uncond"].size else 1)


POLICIES = (
  "full", "disa", "marche", "lazymar", "recap", "gtr", "marche+disa+gtr", "recap+disa",
  "lazymar+gtr", "marche+gtr", "lazymar+disa", "recap+gtr", "turbo", "turbo+marche",
)  # fmt: skip


sizes = st.one_of(st.sampled_from([0, 10**3]), st.integers(1, 150))  # the default, all, or some


@st.composite
def runs(draw):
  grid = draw(st.integers(1, 16))
  known = draw(st.integers(0, grid**2 - 1))
  policy = draw(st.sampled_from(POLICIES))
  num_iter = draw(st.integers(1, min(grid**2 - known, 80)))
  refreshes = []
  if "gtr" not in policy and "turbo" not in policy:  # which take fewer iterations
    refreshes = draw(st.lists(st.integers(0, num_iter - 1), max_size=9))
  sample = SampleConfig(
    num_iter=num_iter,
    cfg=draw(st.sampled_from([1.0, 3.0])),
    num_sampling_steps=20,
    policy=policy,
    refresh_interval=draw(st.integers(1, 9)),
    refresh_iterations=refreshes,
    select_layer=draw(st.integers(1, 6)),
    selection=draw(st.sampled_from(["scout", "carried", "lower"])),
    condition_cache=draw(st.booleans()),
    active_size=draw(sizes),
    encoder_active_size=draw(sizes),
    detail_tokens=draw(st.booleans()),
    recap_raster=policy in ("recap", "recap+disa") and draw(st.booleans()),
  )
  config = dataclasses.replace(sized(grid), buffer_size=draw(st.sampled_from([1, 64])))
  return config, sample, known


def smallest_plan(config: ModelConfig, sample: SampleConfig, num_known: int) -> DecodePlan:
  """The plan; where an active size is too small, that of the smallest which the error names."""
  for _ in range(3):
    try:
      return make_plan(config, sample, num_known)
    except ValueError as error:
      named = re.search(r"sample\.(\w+)=.* smallest size that works is (\d+)", str(error))
      assert named is not None, error
      field, size = named.groups()
      sample = dataclasses.replace(sample, **{field: int(size)})
  raise AssertionError("the sizes that errors name do not work")


@settings(deadline=None, max_examples=150)
@given(runs())
def test_every_plan(run):
  config, sample, num_known = run
  plan = smallest_plan(config, sample, num_known)

  order = np.random.default_rng(0).permutation(config.seq_len)
  predicted = np.zeros(config.seq_len, int)
  predicted[order[::-1][:num_known]] += 1
  for row in plan.rows:
    assert row.num_known == predicted.sum()
    assert row.num_predict >= 1
    now = order[::-1][row.num_known : row.num_known + row.num_predict]
    predicted[now] += 1
    shape = plan.step_shapes[row.shape_id]
    assert row.num_known <= shape.encoder.slots <= config.seq_len
    assert shape.decoder.slots == config.seq_len
    assert row.num_predict <= shape.head.slots <= config.seq_len
    assert shape.guided == (sample.cfg != 1.0)
    steps = len(plan.processes[row.process].timesteps)
    assert shape.head.diffusion_steps in (None, steps)
    assert row.num_detail <= min(shape.head.detail, row.num_predict)
    if row.num_detail:
      assert shape.head.detail_diffusion_steps == len(plan.processes[row.detail_process].timesteps)
  assert (predicted == 1).all()  # every position exactly once
  check_refresh(plan)
  check_state(plan)

  assert len(plan.rows) == sample.num_iter or {"gtr", "turbo"} & set(sample.policy.split("+"))
  assert len(set(plan.step_shapes)) == len(plan.step_shapes) <= MAX_STEP_SHAPES
  assert {row.shape_id for row in plan.rows} == set(range(len(plan.step_shapes)))
  assert all(padding >= 1 for padding in plan.padding())
  exact, padded = plan.flops(padded=False), plan.flops()
  assert 0 < exact.encoder <= padded.encoder and 0 < exact.head <= padded.head
  assert 0 < exact.decoder <= padded.decoder
  # A heading and the rows; the shapes, totals and the cache below.
  assert len(plan.table().splitlines()) == 1 + len(plan.rows) + 1 + len(plan.step_shapes) + 2


def check_state(plan: DecodePlan):
  """What a step shape reads or writes is there, and nothing else."""
  c = plan.config
  state = jax.eval_shape(
    lambda tokens, by_rank: state_lib.empty_state(plan, tokens, by_rank, jnp.float32),
    jax.ShapeDtypeStruct((1, c.seq_len, c.token_dim), jnp.float32),
    jax.ShapeDtypeStruct((1, c.seq_len), jnp.int32),
  )
  stacks = [stack for shape in plan.step_shapes for stack in (shape.encoder, shape.decoder)]
  selective = any(stack.active is not None for stack in stacks)
  assert (state.encoder_cache is not None) == (state.decoder_cache is not None) == selective
  carries = any(stack.carried for stack in stacks)
  assert (state.encoder_carried is not None) == (state.decoder_carried is not None) == carries
  one_half = any(shape.guided and shape.halves == 1 for shape in plan.step_shapes)
  assert (state.difference is not None) == one_half


def check_refresh(plan: DecodePlan):
  """What a selective row needs: slots for its tokens, and rows before it that left the rest."""
  config = plan.config
  buffer, before, stored = config.buffer_size, 0, range(0)
  for k, row in enumerate(plan.rows):
    shape = plan.step_shapes[row.shape_id]
    assert row.num_previous == before
    before = row.num_predict
    stacks = (
      (shape.encoder, row.encoder_active, row.num_previous, row.num_known, row.num_previous),
      (shape.decoder, row.decoder_active, row.num_previous + row.num_predict, config.seq_len,
       row.num_predict),
    )  # fmt: skip
    for stack, active, forced, known, fresh in stacks:
      if stack.active is None:
        assert active == buffer + known
      else:
        assert k > 0  # everything was computed once before
        assert forced <= stack.forced
        assert forced + (buffer if stack.buffer else 0) <= active <= stack.active
        assert stack.active <= buffer + stack.slots
        assert stack.source == "none" or 1 <= stack.layer < config.decoder_depth
      if plan.carries_scores:
        assert fresh <= stack.carried
    full = shape.encoder.active is None and shape.decoder.active is None
    if plan.guided and shape.halves == 1:  # the difference was stored for every rank asked for
      assert stored.start <= row.num_known and row.num_known + row.num_predict <= stored.stop
    else:
      reach = shape.difference if full else 0
      stored = range(row.num_known, row.num_known + reach)
  selective = any(s.encoder.active or s.decoder.active for s in plan.step_shapes)
  assert (plan.cache_bytes_per_image > 0) == selective == (plan.cache_halves > 0)


def test_guidance_off_halves_the_work():
  on, off = (make_plan(MAR_B, SampleConfig(cfg=cfg)).flops() for cfg in (3.0, 1.0))
  assert (off.encoder, off.decoder) == (on.encoder / 2, on.decoder / 2)
  assert on.head / 2 < off.head < 1.001 * on.head / 2  # both halves share the projection of x_t


def test_shares_of_the_work():
  """MAR-B, 64 iterations, guidance, 100 diffusion steps: the shares that DESIGN.md states."""
  flops = make_plan(MAR_B, SampleConfig(num_iter=64)).flops(padded=False)
  assert 0.22 <= flops.encoder / flops.total <= 0.27
  assert 0.48 <= flops.decoder / flops.total <= 0.53
  assert 0.22 <= flops.head / flops.total <= 0.27


def test_table_states_every_row_and_the_padding():
  sample = SampleConfig(num_iter=7, num_sampling_steps=9, policy="lazymar", head_cache=True)
  plan = make_plan(MAR_B, sample)
  full = make_plan(MAR_B, SampleConfig(num_iter=7, num_sampling_steps=9))
  for table, lazy in ((plan, True), (full, False)):
    lines = table.table(baseline=full).splitlines()
    for k, (line, row) in enumerate(zip(lines[1:], table.rows)):
      last = lazy and k == 6
      assert line.split() == [
        str(k), str(row.shape_id), str(row.num_known), str(row.num_predict), str(row.mask_len),
        f"{row.cfg:.2f}", "9c" if lazy else "9",
        str(64 + row.num_previous) if last else "all", str(row.decoder_active) if last else "all",
      ]  # fmt: skip
    shapes = lines[len(table.rows) + 2 :][: len(table.step_shapes)]
    assert [line.split(":")[0] for line in shapes] == [f"shape {i}" for i in range(len(shapes))]
    assert lines[-3].endswith(
      f"encoder {table.padding()[0]:.2f}, head {table.padding()[1]:.2f}"
    )  # fmt: skip
    assert lines[-2] == f"cache: {table.cache_bytes_per_image / 2**20:.1f} MiB per image in float32"
    assert lines[-1].endswith(f": {full.flops().total / table.flops().total:.2f}")


def test_cache_bytes_are_those_of_the_state():
  """Of the sampler's caches, but for tokens and order."""
  for fields in (
    {"policy": "full"},
    {"policy": "marche"},
    {"policy": "marche", "cfg": 1.0},
    {"policy": "marche", "selection": "carried"},
    {"policy": "marche", "condition_cache": True, "selection": "carried"},
    {"policy": "lazymar"},
  ):
    plan = make_plan(MAR_B, SampleConfig(num_iter=16, **fields))
    tokens, by_rank = jnp.zeros((1, 256, 16)), jnp.zeros((1, 256), jnp.int32)
    state = jax.eval_shape(
      lambda plan=plan, x=tokens, r=by_rank: state_lib.empty_state(plan, x, r, jnp.float32)
    )
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert plan.cache_bytes_per_image == size - tokens.nbytes - by_rank.nbytes, fields


def test_unknown_policy():
  with pytest.raises(ValueError, match=r"sample\.policy='fast': unknown .*expected one of full"):
    make_plan(MAR_B, SampleConfig(policy="fast"))
