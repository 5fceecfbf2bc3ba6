"""Analytic FLOPs against the matrix products that the sampler's traced functions execute."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from tiny import UNEQUAL as CONFIG

from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.decoding import head_sampler, sampler
from marche_jax.decoding import state as state_lib
from marche_jax.decoding.state import Inputs, Rows, Tables
from marche_jax.decoding.transformer import Transformer
from marche_jax.models.diffusion import make_process
from marche_jax.models.mar import abstract_params
from marche_jax.planning import cost
from marche_jax.planning.draft import build
from marche_jax.planning.plan import DecodePlan
from marche_jax.planning.policies import make_draft, make_plan
from marche_jax.planning.shapes import HeadShape, StackShape

PARAMS = abstract_params(CONFIG)
KEYS = jax.ShapeDtypeStruct((1,), jax.random.key(0).dtype)  # of one image

UNKNOWN = object()


class Later:
  """A value that is computed when it is asked for."""

  def __init__(self, compute: Callable[[], Any]) -> None:
    self.compute = functools.cache(compute)


def value(x: Any) -> Any:
  return x.compute() if isinstance(x, Later) else x


class Execution:
  """Runs a jaxpr without its floating point values, and counts FLOPs of the products on the way.

  How often a loop turns and which branch is taken depends on integers alone. They are computed, but
  only those: every other operation would be compiled for nothing.
  """

  def __init__(self) -> None:
    self.flops = 0.0

  def run(self, jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Values of the outputs, UNKNOWN where they are not integers or depend on others."""
    values: dict[core.Var, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))
    read = lambda v: v.val if isinstance(v, core.Literal) else values[v]
    for eqn in jaxpr.eqns:
      out = self._equation(eqn, [read(v) for v in eqn.invars])
      values.update(zip(eqn.outvars, out))
    return [read(v) for v in jaxpr.outvars]

  def closed(self, closed: core.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    return self.run(closed.jaxpr, closed.consts, args)

  def _equation(self, eqn: core.JaxprEqn, args: list[Any]) -> list[Any]:
    name, params = eqn.primitive.name, eqn.params
    if name == "while":
      return self._while(params, args)
    if name == "scan":
      return self._scan(params, args)
    if name == "cond":
      assert args[0] is not UNKNOWN
      return self.closed(params["branches"][int(value(args[0]))], args[1:])
    for inner in ("jaxpr", "call_jaxpr"):
      if inner in params:
        return self.closed(params[inner], args)
    assert not list(core.jaxprs_in_params(params)) or name in ("reduce", "scatter", "scatter-add")
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      lhs = eqn.invars[0].aval.shape
      terms = math.prod(lhs[i] for i in contracted)
      self.flops += 2 * math.prod(eqn.outvars[0].aval.shape) * terms
    whole = (jnp.issubdtype(v.aval.dtype, jnp.integer) or v.aval.dtype == bool for v in eqn.outvars)
    if not all(whole) or any(a is UNKNOWN for a in args):
      return [UNKNOWN] * len(eqn.outvars)
    out = Later(lambda: eqn.primitive.bind(*map(value, args), **params))
    if not eqn.primitive.multiple_results:
      return [out]
    return [Later(lambda i=i: value(out)[i]) for i in range(len(eqn.outvars))]

  def _while(self, params: dict, args: list[Any]) -> list[Any]:
    split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    of_cond, of_body, carry = args[: split[0]], args[split[0] : split[1]], args[split[1] :]
    while True:
      (go_on,) = self.closed(params["cond_jaxpr"], [*of_cond, *carry])
      assert go_on is not UNKNOWN
      if not value(go_on):
        return carry
      carry = self.closed(params["body_jaxpr"], [*of_body, *carry])

  def _scan(self, params: dict, args: list[Any]) -> list[Any]:
    assert not params["reverse"]
    if "ft_in" in params:  # jax 0.12 gives the trees of the three
      num_consts, num_carry, _ = (len(tree) for tree in params["ft_in"].unpack())
    else:
      num_consts, num_carry = params["num_consts"], params["num_carry"]
    split = num_consts, num_consts + num_carry
    consts, carry, xs = args[: split[0]], args[split[0] : split[1]], args[split[1] :]
    outputs = len(params["jaxpr"].jaxpr.outvars) - len(carry)
    if not _branches(params["jaxpr"].jaxpr):  # every turn executes the same
      before = self.flops
      self.closed(params["jaxpr"], [UNKNOWN] * len(args))
      self.flops += (params["length"] - 1) * (self.flops - before)
      return [UNKNOWN] * (len(carry) + outputs)
    for i in range(params["length"]):
      at = [x if x is UNKNOWN else value(x)[i] for x in xs]
      out = self.closed(params["jaxpr"], [*consts, *carry, *at])
      carry = out[: len(carry)]
    return [*carry, *[UNKNOWN] * outputs]


def _branches(jaxpr: core.Jaxpr) -> bool:
  """What a jaxpr executes may depend on values."""
  inner = (getattr(j, "jaxpr", j) for e in jaxpr.eqns for j in core.jaxprs_in_params(e.params))
  return any(e.primitive.name in ("while", "cond") for e in jaxpr.eqns) or any(
    map(_branches, inner)
  )


def matmul_flops(function: Callable, *args: Any) -> float:
  """FLOPs of all matrix products that a call executes; loops count as often as they turn.

  Of the arguments only integers are looked at, where they are values and not shapes.
  """
  known = [
    x if isinstance(x, np.generic | np.ndarray) and x.dtype.kind in "iub" else UNKNOWN
    for x in jax.tree.leaves(args)
  ]
  execution = Execution()
  execution.closed(jax.make_jaxpr(function)(*args), known)
  return execution.flops


def test_loops_count_as_often_as_they_turn() -> None:
  x = jnp.zeros((3, 3))
  product = 2 * 3**3

  def loops(x: jax.Array, trips: jax.Array) -> jax.Array:
    x = jax.lax.fori_loop(
      0, trips, lambda i, x: jax.lax.cond(i < 2, lambda x: x @ x, jnp.sin, x), x
    )
    x, _ = jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=4)
    return jax.jit(lambda x: x @ x)(x)

  for trips, executed in ((0, 5), (1, 6), (2, 7), (9, 7)):
    assert matmul_flops(loops, x, np.int32(trips)) == executed * product


# ---- encoder and decoder


def row(**fields: Any) -> Rows:
  """An iteration whose counts are those of its slots: what is executed does not depend on them."""
  zero = {f.name: np.int32(0) for f in dataclasses.fields(Rows)}
  return Rows(**{**zero, **fields})


def kinds(slots: int) -> dict[str, StackShape]:
  """Every way of running a stack that sees `slots` image tokens."""
  seen = CONFIG.buffer_size + slots
  some = {"active": seen - 1, "forced": min(2, slots)}
  return {
    "full": StackShape(slots),
    "full, recorded": StackShape(slots, carried=3, layer=2),
    "forced only": StackShape(slots, **some),
    "scout 3": StackShape(slots, **some, source="scout", layer=3),
    "scout with buffer": StackShape(slots, **some, buffer=True, source="scout", layer=2),
    "carried": StackShape(slots, **some, source="carried", carried=2, layer=3),
    "lower 1": StackShape(slots, **some, source="lower", layer=1),
    "lower 4": StackShape(slots, **some, source="lower", layer=4),
    "lower, values": StackShape(slots, **some, source="lower", layer=3, score="value"),
    "lower, recorded": StackShape(slots, **some, source="lower", layer=2, carried=3),
    "everything active": StackShape(slots, **{**some, "active": seen}, source="scout", layer=2),
  }


NAMES = list(kinds(1))


def empty_state(plan: DecodePlan) -> Any:
  """The shapes of one image's state."""
  tokens = jnp.zeros((1, CONFIG.seq_len, CONFIG.token_dim))
  by_rank = jnp.zeros((1, CONFIG.seq_len), jnp.int32)
  return jax.eval_shape(lambda: state_lib.empty_state(plan, tokens, by_rank, jnp.float32))


def state_for(shape: StackShape, halves: int) -> Any:
  """With caches and carried scores, but for a full stack that records nothing."""
  policy = "full" if shape.active is None and not shape.carried else "marche"
  cfg = 1.0 if halves == 1 else 2.0
  return empty_state(
    make_plan(CONFIG, SampleConfig(num_iter=3, policy=policy, cfg=cfg, selection="carried"))
  )


@pytest.mark.parametrize("name", NAMES)
def test_encoder(name: str) -> None:
  for slots, halves in ((0 if name.startswith("full") else 1, 1), (25, 2)):
    shape = kinds(slots)[name]

    def encode(params: dict, state: Any, embedding: Any, shape: StackShape = shape) -> Any:
      return Transformer(params, CONFIG, jnp.float32).run_encoder(shape, row(), state, embedding)

    embedding = jax.ShapeDtypeStruct((halves, CONFIG.encoder_embed_dim), jnp.float32)
    executed = matmul_flops(encode, PARAMS, state_for(shape, halves), embedding)
    assert executed == cost.encoder_flops(CONFIG, shape, halves), (slots, halves)


@pytest.mark.parametrize("name", NAMES)
def test_decoder(name: str) -> None:
  shape = kinds(CONFIG.seq_len)[name]
  for asked, halves in ((1, 2), (9, 1)):

    def decode(params: dict, state: Any, x: Any, asked: int = asked) -> Any:
      return Transformer(params, CONFIG, jnp.float32).run_decoder(shape, row(), state, x, asked)

    x = jax.ShapeDtypeStruct((halves, CONFIG.num_tokens, CONFIG.decoder_embed_dim), jnp.float32)
    executed = matmul_flops(decode, PARAMS, state_for(shape, halves), x)
    assert executed == cost.decoder_flops(CONFIG, shape, halves, asked), (asked, halves)


def test_every_kind_costs_something_else() -> None:
  """Else the tests above could not tell kinds apart."""
  shapes = kinds(CONFIG.seq_len)
  shapes.pop("lower, values")  # the same products as lower at that layer
  costs = [cost.decoder_flops(CONFIG, shape, 1, 9) for shape in shapes.values()]
  assert len(set(costs)) == len(costs)


# ---- the head


def executed_by_head(
  shape: HeadShape, halves: int, *, steps: int, longest: int, config: ModelConfig = CONFIG
) -> float:
  """FLOPs of `sample_tokens` for one image in a row of `steps` steps; tables have `longest`."""
  floats = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  one = make_process(np.arange(longest)).coefficients()
  coefficients = jax.tree.map(lambda x: np.stack([x, x]), one)
  weights = jax.eval_shape(
    lambda head: head_sampler.prepare(head, config, coefficients.timestep, jnp.float32),
    abstract_params(config)["head"],
  )
  now = row(diffusion_steps=np.int32(steps), num_detail=np.int32(shape.detail))

  def head(weights: Any, z: Any, keys: Any, row: Any, tables: Any) -> jax.Array:
    predict = jnp.zeros((1, shape.slots), jnp.int32)
    inputs = Inputs(np.zeros(1, np.int32), keys)
    return sampler.sample_tokens(weights, shape, row, tables, inputs, predict, z)

  z = floats((halves, 1, shape.slots, config.decoder_embed_dim))
  return matmul_flops(head, weights, z, KEYS, now, Tables(coefficients, floats(())))


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize(("predicted", "steps"), [(1, 12), (5, 12), (300, 7)])
def test_head(predicted: int, steps: int, halves: int) -> None:
  shape = HeadShape(predicted, steps)
  executed = executed_by_head(shape, halves, steps=steps, longest=12)
  assert executed == cost.head_flops(CONFIG, shape, halves == 2, steps)


@pytest.mark.parametrize("halves", [1, 2])
def test_head_with_detail_tokens(halves: int) -> None:
  shape = HeadShape(9, 4, detail=2, detail_diffusion_steps=6)
  executed = executed_by_head(shape, halves, steps=4, longest=6)
  assert executed == cost.head_flops(CONFIG, shape, halves == 2, 4)


@pytest.mark.parametrize(
  ("steps", "depth", "halves"),
  [(1, 4, 2), (2, 4, 1), (8, 2, 2), (13, 1, 2), (25, 4, 1), (25, 4, 2)],
)
def test_cached_head(steps: int, depth: int, halves: int) -> None:
  config = dataclasses.replace(CONFIG, diffloss_d=depth)
  shape = HeadShape(5, steps, cached=True)
  executed = executed_by_head(shape, halves, steps=steps, longest=25, config=config)
  assert executed == cost.head_flops(config, shape, halves == 2, steps)


@pytest.mark.parametrize(
  ("predicted", "steps", "fewest"), [(1, 12, 12), (1, 9, 4), (30, 5, 5), (300, 7, 1)]
)
def test_head_with_steps_of_the_row(predicted: int, steps: int, fewest: int) -> None:
  """Steps that are row data: modulations are taken by whole products, all else as often as due."""
  longest, rows = 12, 2 * predicted
  shape = HeadShape(predicted, None, fewest=fewest)
  executed = executed_by_head(shape, 2, steps=steps, longest=longest)
  together = head_sampler.steps_together(fewest, rows)
  padding = -(-steps // together) * together - steps
  modulation = rows * 2 * (3 * CONFIG.diffloss_d + 2) * CONFIG.diffloss_w**2
  assert executed == cost.head_flops(CONFIG, shape, True, steps) + padding * modulation


# ---- whole plans

PLANS: dict[str, dict[str, Any]] = {
  "no guidance": {"cfg": 1.0},
  "marche": {"policy": "marche", "active_size": 14},
  "condition cache": {
    "policy": "marche", "condition_cache": True, "selection": "carried", "active_size": 14,
  },
  "lazymar with its head": {"policy": "lazymar", "num_iter": 12, "head_cache": True},
  "gtr": {"policy": "gtr", "num_iter": 16},
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_a_whole_run(name: str) -> None:
  """Every row, loop and branch of `decode` against the plan's sum."""
  sample = SampleConfig(**{"num_iter": 6, "num_sampling_steps": 10, **PLANS[name]})
  draft = make_draft(CONFIG, sample)
  for iteration in draft.iterations:  # as many diffusion steps in every row: no padded products
    iteration.timesteps = draft.timesteps(10)
    iteration.detail_timesteps = draft.timesteps(10) if iteration.num_detail else ()
  plan = build(draft)
  rows, tables = state_lib.plan_rows(plan)

  def decode(params: dict, state: Any, keys: Any, rows: Any, tables: Any) -> Any:
    inputs = Inputs(jnp.zeros(1, jnp.int32), keys)
    static = {"config": CONFIG, "step_shapes": plan.step_shapes}
    return sampler.decode(params, state, rows, tables, inputs, **static)[0]

  executed = matmul_flops(decode, PARAMS, empty_state(plan), KEYS, rows, tables)
  prepare = functools.partial(head_sampler.prepare, config=CONFIG, dtype=jnp.float32)
  once = matmul_flops(
    lambda head, t: prepare(head, timesteps=t), PARAMS["head"], tables.coefficients.timestep
  )
  assert executed - once == plan.flops().total
