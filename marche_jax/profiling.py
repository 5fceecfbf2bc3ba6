"""Where decoding spends its time: encoder, decoder and head, each measured on its own.

Every part of every step shape is compiled apart and timed, and counts as often as the plan has rows
of that shape.
"""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from marche_jax import head_sampler, sampler
from marche_jax.config import ModelConfig
from marche_jax.models.mar import Params
from marche_jax.plan import DecodePlan, StepShape


def seconds(run: Callable[[], Any], repeats: int) -> list[float]:
  """Seconds of each of some calls, after one that warms up."""
  each = []
  for _ in range(repeats + 1):
    clock = time.perf_counter()
    jax.block_until_ready(run())
    each.append(time.perf_counter() - clock)
  return each[1:]


def split(
  plan: DecodePlan, params: Params, batch_size: int, dtype: Any, head_dtype: Any
) -> dict[str, float]:
  """Measures a plan's parts on one device.

  Args:
    plan: of the decoding.
    params: of `MAR`.
    batch_size: images decoded together.
    dtype, head_dtype: as in `sampler.decode`.

  Returns:
    Seconds per image of 'encoder', 'decoder' and 'head', compile time apart.
  """
  _, tables = sampler.plan_rows(plan)
  timesteps = tables.coefficients.timestep
  prepare = functools.partial(head_sampler.prepare, config=plan.config, dtype=head_dtype)
  weights = jax.jit(prepare)(params["head"], timesteps=timesteps)
  total = dict.fromkeys(("encoder", "decoder", "head"), 0.0)
  rows = collections.Counter((plan.shapes[row.shape], row.process) for row in plan.rows)
  for (shape, process), count in rows.items():
    steps = len(plan.processes[process].timesteps)
    pieces = _pieces(plan.config, params, weights, tables, shape, process, steps, batch_size, dtype)
    for name, run in pieces.items():
      total[name] += count * min(seconds(run, 2)) / batch_size
  return total


def _pieces(
  config: ModelConfig,
  params: Params,
  weights: head_sampler.HeadWeights,
  tables: sampler.Tables,
  shape: StepShape,
  process: int,
  steps: int,
  batch: int,
  dtype: Any,
) -> dict[str, Callable[[], jax.Array]]:
  """What one row of a step shape runs, each part compiled when it is first called."""
  halves, slots = shape.guidance_halves, shape.predict_slots
  order = jnp.broadcast_to(jnp.arange(config.seq_len), (batch, config.seq_len))
  state = sampler.DecodeState(jnp.ones((batch, config.seq_len, config.token_dim)), order)
  embedding = jnp.ones((halves * batch, config.encoder_embed_dim))
  predict = jnp.broadcast_to(jnp.arange(slots), (halves * batch, slots))
  coefficients = jax.tree.map(lambda x: jnp.asarray(x[process]), tables.coefficients)

  encode = jax.jit(
    lambda p: sampler.run_encoder(
      p, config, dtype, state, embedding, shape.encoder_slots, jnp.int32(shape.encoder_slots)
    )
  )
  decode = jax.jit(lambda p, x: sampler.run_decoder(p, config, dtype, x, predict))

  @jax.jit
  def head(weights: head_sampler.HeadWeights, z: jax.Array, noise: jax.Array) -> jax.Array:
    return head_sampler.sample(
      weights, z, halves, table=jnp.int32(process), coefficients=coefficients, steps=steps,
      cfg=jnp.float32(2.0), temperature=jnp.float32(1.0), initial_noise=noise,
      step_noise=lambda i, timestep: noise,
    )  # fmt: skip

  x = encode(params)
  z = decode(params, x).astype(jnp.float32).reshape(halves * batch * slots, -1)
  noise = jax.random.normal(jax.random.key(0), (batch * slots, config.token_dim))
  return {
    "encoder": lambda: encode(params),
    "decoder": lambda: decode(params, x),
    "head": lambda: head(weights, z, noise),
  }
