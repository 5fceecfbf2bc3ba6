"""Analytic FLOPs against the matrix products that the sampler traces."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from marche_jax import cost, head_sampler, sampler
from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.models.mar import abstract_params
from marche_jax.policies import make_plan

# Every width, depth and count differs, so that no two terms can be mistaken for each other.
CONFIG = ModelConfig(
  img_size=20,
  vae_stride=1,
  patch_size=4,
  vae_embed_dim=3,
  encoder_embed_dim=32,
  encoder_depth=2,
  encoder_num_heads=2,
  decoder_embed_dim=24,
  decoder_depth=3,
  decoder_num_heads=3,
  mlp_ratio=3.0,
  class_num=5,
  buffer_size=7,
  diffloss_d=4,
  diffloss_w=40,
)


def matmul_flops(function: Callable, *args: object) -> float:
  """FLOPs of all matrix products of a traced function, those of a loop times its length."""

  def count(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
      inner = sum(count(getattr(j, "jaxpr", j)) for j in core.jaxprs_in_params(eqn.params))
      total += inner * eqn.params.get("length", 1)
      assert eqn.primitive.name != "while" or inner == 0  # its length is not known
      if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)
    return total

  return count(jax.make_jaxpr(function)(*args).jaxpr)


@pytest.fixture(scope="module")
def params() -> dict:
  return jax.tree.map(lambda x: jnp.zeros(x.shape), abstract_params(CONFIG))


@pytest.mark.parametrize("slots", [0, 3, 25])
def test_encoder(params: dict, slots: int) -> None:
  state = sampler.DecodeState(jnp.zeros((1, 25, 48)), jnp.arange(25)[None])

  def encode(p: dict, embedding: jax.Array) -> jax.Array:
    return sampler.run_encoder(p, CONFIG, jnp.float32, state, embedding, slots, jnp.int32(0))

  traced = matmul_flops(encode, params, jnp.zeros((1, 32)))
  assert traced == cost.encoder_flops(CONFIG, slots)
  assert matmul_flops(encode, params, jnp.zeros((2, 32))) == 2 * traced  # guidance


@pytest.mark.parametrize("predicted", [1, 9])
def test_decoder(params: dict, predicted: int) -> None:
  def decode(p: dict, x: jax.Array) -> jax.Array:
    return sampler.run_decoder(p, CONFIG, jnp.float32, x, jnp.arange(predicted)[None])

  traced = matmul_flops(decode, params, jnp.zeros((1, 7 + 25, 24)))
  assert traced == cost.decoder_flops(CONFIG, predicted)


@pytest.mark.parametrize(("predicted", "steps"), [(1, 12), (5, 12), (300, 7)])
def test_head(params: dict, predicted: int, steps: int) -> None:
  plan = make_plan(CONFIG, SampleConfig(num_iter=3, num_sampling_steps=steps))
  _, tables = sampler.plan_rows(plan)
  weights = head_sampler.prepare(params["head"], CONFIG, tables.coefficients.timestep, jnp.float32)

  def head(weights: head_sampler.HeadWeights, z: jax.Array, noise: jax.Array) -> jax.Array:
    return head_sampler.sample(
      weights, z, 1, table=0, coefficients=jax.tree.map(lambda x: x[0], tables.coefficients),
      steps=steps, cfg=1.0, temperature=1.0, initial_noise=noise, step_noise=lambda *_: noise,
    )  # fmt: skip

  traced = matmul_flops(head, weights, jnp.zeros((predicted, 24)), jnp.zeros((predicted, 48)))
  assert traced == cost.head_flops(CONFIG, predicted, steps)


def test_a_plan_adds_its_rows_up() -> None:
  """Guidance doubles everything; without padding every row costs what its tokens cost."""
  sample = SampleConfig(num_iter=6, num_sampling_steps=10)
  plan = make_plan(CONFIG, sample)
  exact = plan.flops(padded=False)
  assert exact.encoder == 2 * sum(cost.encoder_flops(CONFIG, r.num_known) for r in plan.rows)
  assert exact.decoder == 2 * sum(cost.decoder_flops(CONFIG, r.num_predict) for r in plan.rows)
  assert exact.head == 2 * sum(cost.head_flops(CONFIG, r.num_predict, 10) for r in plan.rows)
  assert exact.total == exact.encoder + exact.decoder + exact.head
  unguided = make_plan(CONFIG, SampleConfig(num_iter=6, num_sampling_steps=10, cfg=1.0))
  assert plan.flops() == unguided.flops() + unguided.flops()


def test_mar_base() -> None:
  """MAR-B's published shares, counted before the last decoder layer is cut to what is asked."""
  config = ModelConfig()
  plan = make_plan(config, SampleConfig(num_iter=64, cfg=3.0, num_sampling_steps=100))
  exact = plan.flops(padded=False)
  everywhere = cost.decoder_flops(config, config.buffer_size + config.seq_len)
  decoder = 2 * len(plan.rows) * everywhere
  assert exact.decoder < decoder
  whole = exact.encoder + decoder + exact.head
  for part, low, high in ((exact.encoder, 24, 25), (decoder, 51, 53), (exact.head, 22, 25)):
    assert low - 0.5 <= 100 * part / whole <= high + 0.5
  assert exact.total < plan.flops().total <= 1.25 * exact.total
  assert max(plan.padding()) <= 1.25
