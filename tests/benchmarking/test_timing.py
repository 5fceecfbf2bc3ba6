"""Timing: turns, estimates from single rows, and the sampler's program."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from golden import quick_programs as quick_programs

from marche_jax.benchmark import random_params
from marche_jax.benchmarking import timing
from marche_jax.benchmarking.entries import parse_entries
from marche_jax.benchmarking.timing import Options, Program
from marche_jax.decoding.state import IDLE
from marche_jax.planning.policies import make_plan


def test_runs_take_turns() -> None:
  order: list[str] = []
  told: list[str] = []
  runs = {name: lambda name=name: order.append(name) or len(order) for name in "ABC"}
  found = timing.interleave(runs, 2, told.append)
  assert order == list("ABCABC")
  assert found == {"A": [1, 4], "B": [2, 5], "C": [3, 6]}
  assert told[0] == "round 1 of 2: A" and told[-1] == "round 2 of 2: C"


@pytest.mark.parametrize("policy", ["full", "marche", "disa", "gtr", "lazymar+disa"])
def test_an_estimate_is_exact_where_time_is_linear_in_diffusion_steps(policy: str) -> None:
  """A fake timer: every call costs 5, a row of shape s with n diffusion steps 10 s + (s + 1) n."""
  sample = dataclasses.replace(tiny.SAMPLE, policy=policy, num_iter=8, num_sampling_steps=20)
  plan = make_plan(tiny.MODEL, sample)

  def row_seconds(number: int) -> float:
    row = plan.rows[number]
    return 10 * row.shape_id + (row.shape_id + 1) * plan.diffusion_steps(row)

  timed = timing.rows_to_time(plan)
  numbers = {number for pair in timed.values() for number in pair}
  measured = {IDLE: 5.0} | {number: row_seconds(number) for number in numbers}
  expected = 5.0 + sum(row_seconds(k) for k in range(len(plan.rows)))
  assert timing.estimate_seconds(plan, measured) == pytest.approx(expected)

  assert timed.keys() == set(range(len(plan.step_shapes)))
  for shape, (few, many) in timed.items():
    steps = [plan.diffusion_steps(row) for row in plan.rows if row.shape_id == shape]
    assert plan.rows[few].shape_id == plan.rows[many].shape_id == shape
    assert (plan.diffusion_steps(plan.rows[few]), plan.diffusion_steps(plan.rows[many])) == (
      min(steps),
      max(steps),
    )
    assert few == many or min(steps) < max(steps)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"batch_size": 0}, "batch_size=0: expected at least 1"),
    ({"repeats": 0}, "repeats=0: expected at least 1"),
    ({"check": True}, "check=True: expected an estimate to check"),
  ],
)
def test_values_out_of_range(options: dict, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    Options(**options)


@pytest.fixture(scope="module")
def params() -> dict:
  return random_params(tiny.MODEL)


@pytest.fixture(scope="module")
def one_row(params: dict) -> Program:
  """Of a plan with two rows, which two tests time."""
  (entry,) = parse_entries(["marche:num_iter=2"], tiny.MODEL, tiny.SAMPLE)
  return Program(entry.plan, params, Options(batch_size=2), one_row=True)


def test_rows_run_one_at_a_time(
  params: dict, one_row: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
  """In the order asked for, after an idle row that changes nothing; memory adds up."""
  program, plan = one_row, one_row.plan
  assert len(program.rows) == len(plan.rows) and program.compile_seconds > 0
  state = program.start()
  tokens, cached = np.asarray(state.tokens), np.asarray(state.decoder_cache.k)
  idle = dataclasses.replace(program.rows[0], shape_id=np.full(1, IDLE, np.int32))
  _, state, finite = program.call(state, idle)  # takes the state's memory
  np.testing.assert_array_equal(state.tokens, tokens)
  np.testing.assert_array_equal(state.decoder_cache.k, cached)
  assert finite.shape == (1, 2) and finite.all()

  called = []
  call = program.call
  monkeypatch.setattr(
    program, "call", lambda state, rows: called.append(int(rows.shape_id[0])) or call(state, rows)
  )
  found = program.time_rows([0, 1])
  assert list(found) == [IDLE, 0, 1] and min(found.values()) > 0
  assert called == [IDLE, IDLE, plan.rows[0].shape_id, plan.rows[1].shape_id]

  memory = program.memory()
  total = memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporary"]
  assert memory["peak"] == total > 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
  assert memory["aliased"] > 2 * plan.cache_bytes_per_image  # the state is donated
  assert json.loads(json.dumps(memory)) == memory


def test_what_a_call_costs_is_taken_from_its_own_round(
  one_row: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
  program = one_row
  seconds = iter([9.0, 0.25, 1.25, 2.25])  # takes the memory, idle, two rows
  monkeypatch.setattr(program, "call", lambda state, rows: (next(seconds), state, None))
  assert program.time_rows([0, 1]) == {IDLE: 0.25, 0: 1.0, 1: 2.0}


@pytest.mark.parametrize("one_row", [True, False])
def test_every_step_shape_warms_up(
  params: dict, monkeypatch: pytest.MonkeyPatch, one_row: bool
) -> None:
  (entry,) = parse_entries(["marche:num_iter=4"], tiny.MODEL, tiny.SAMPLE)
  program = Program(entry.plan, params, Options(batch_size=2), one_row=one_row)
  ran: list[int] = []
  call = program.call
  monkeypatch.setattr(
    program, "call", lambda state, rows: ran.extend(rows.shape_id.tolist()) or call(state, rows)
  )
  program.warm_up()
  assert sorted(shape for shape in ran if shape != IDLE) == list(range(len(entry.plan.step_shapes)))


def test_latents_that_are_not_finite(params: dict) -> None:
  broken = {**params, "mask_token": params["mask_token"] * jnp.nan}
  plan = make_plan(tiny.MODEL, dataclasses.replace(tiny.SAMPLE, num_iter=1))
  with pytest.raises(ValueError, match="non-finite latents at iteration 0 of 1"):
    Program(plan, broken, Options(batch_size=2)).whole_run()
