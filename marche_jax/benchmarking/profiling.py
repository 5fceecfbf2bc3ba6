"""Where decoding spends its time: encoder, decoder and head, each on its own; and on what machine.

Every part of every step shape is compiled apart and timed, and counts as often as the plan has rows
of that shape. The head of rows that differ in their diffusion steps is interpolated, as an estimate
is (see `timing.py`).
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from marche_jax.benchmarking import timing
from marche_jax.benchmarking.reports import Environment
from marche_jax.decoding import head_sampler, sampler
from marche_jax.decoding import state as state_lib
from marche_jax.decoding.state import DecodeState, Inputs, Rows, Tables
from marche_jax.decoding.transformer import Transformer
from marche_jax.models.mar import Params
from marche_jax.planning.plan import DecodePlan
from marche_jax.planning.shapes import StepShape
from marche_jax.versions import versions


def seconds(run: Callable[[], object], repeats: int) -> list[float]:
  """Seconds of each of some calls, after one that warms up."""
  each = []
  for _ in range(repeats + 1):
    clock = time.perf_counter()
    jax.block_until_ready(run())
    each.append(time.perf_counter() - clock)
  return each[1:]


def environment() -> Environment:
  """The device, the CPUs that this process may use, and the versions of what decodes."""
  device = jax.devices()[0]
  return {
    "device": f"{device.device_kind} ({device.platform})",
    "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    "versions": versions(),
  }


def matmul_peak(dtype: DTypeLike, tries: int = 5) -> float:
  """FLOP/s of a square matrix product, the best of some tries."""
  size = 2048 if jax.default_backend() == "cpu" else 8192
  x = jnp.full((size, size), 1 / size, dtype)
  product = jax.jit(jnp.matmul).lower(x, x).compile()
  return 2 * size**3 / min(seconds(lambda: product(x, x), tries))


def split(
  plan: DecodePlan, params: Params, batch_size: int, dtype: DTypeLike, head_dtype: DTypeLike
) -> dict[str, float]:
  """Measures a plan's parts on one device.

  Args:
    plan: of the decoding.
    params: of `MAR`; where several devices hold a copy each, the first one of this process runs.
    batch_size: images decoded together.
    dtype, head_dtype: as in `sampler.decode`.

  Returns:
    Seconds per image of 'encoder', 'decoder' and 'head', compile time apart.
  """
  params = jax.tree.map(lambda leaf: jnp.asarray(leaf).addressable_data(0), params)
  rows, tables = state_lib.plan_rows(plan)
  tables = jax.tree.map(jnp.asarray, tables)
  timesteps = tables.coefficients.timestep
  prepare = functools.partial(head_sampler.prepare, config=plan.config, dtype=head_dtype)
  weights = jax.jit(prepare)(params["head"], timesteps=timesteps)
  measured: dict[str, dict[int, float]] = {"encoder": {}, "decoder": {}, "head": {}}
  for number, (few, many) in timing.rows_to_time(plan).items():
    shape = plan.step_shapes[number]
    row = {k: jax.tree.map(lambda x, k=k: jnp.asarray(x[k]), rows) for k in (few, many)}
    pieces = _pieces(plan, params, weights, tables, shape, row[many], batch_size, dtype)
    for name, run in (("encoder", pieces.encoder), ("decoder", pieces.decoder)):
      measured[name][few] = measured[name][many] = min(seconds(run, 2))
    for k in row:
      measured["head"][k] = min(seconds(functools.partial(pieces.head, row[k]), 2))
  return {name: timing.sum_over_rows(plan, m) / batch_size for name, m in measured.items()}


class Pieces(NamedTuple):
  """What one row of a step shape runs."""

  encoder: Callable[[], jax.Array]
  decoder: Callable[[], jax.Array]
  head: Callable[[Rows], jax.Array]  # of the row whose diffusion steps it takes


def _pieces(
  plan: DecodePlan,
  params: Params,
  weights: head_sampler.HeadWeights,
  tables: Tables,
  shape: StepShape,
  row: Rows,
  batch: int,
  dtype: DTypeLike,
) -> Pieces:
  """The parts of one row, each compiled when it is first called."""
  config = plan.config
  order = jnp.broadcast_to(jnp.arange(config.seq_len), (batch, config.seq_len))
  tokens = jnp.ones((batch, config.seq_len, config.token_dim))
  state = state_lib.empty_state(plan, tokens, order, dtype)
  embedding = jnp.ones((shape.halves * batch, config.encoder_embed_dim))
  asked = max(shape.head.slots, shape.difference)

  # The caches are handed back in place, as the sampler's loop carries them.
  @functools.partial(jax.jit, donate_argnums=1)
  def encode(p: Params, state: DecodeState, row: Rows) -> tuple[DecodeState, jax.Array]:
    return Transformer(p, config, dtype).run_encoder(shape.encoder, row, state, embedding)[:2]

  @functools.partial(jax.jit, donate_argnums=1)
  def decode(
    p: Params, state: DecodeState, row: Rows, x: jax.Array
  ) -> tuple[DecodeState, jax.Array]:
    return Transformer(p, config, dtype).run_decoder(shape.decoder, row, state, x, asked)[:2]

  @jax.jit
  def head(
    weights: head_sampler.HeadWeights, row: Rows, z: jax.Array, predict: jax.Array
  ) -> jax.Array:
    keys = state_lib.image_keys(state_lib.run_key(0), jnp.arange(batch))
    inputs = Inputs(jnp.zeros(batch, jnp.int32), keys)
    return sampler.sample_tokens(weights, shape.head, row, tables, inputs, predict, z)

  slots = shape.head.slots
  z = jnp.ones((2 if shape.guided else 1, batch, slots, config.decoder_embed_dim))
  predict = jnp.broadcast_to(jnp.arange(slots), (batch, slots))
  kept = [state]

  def run_encoder() -> jax.Array:
    kept[0], x = encode(params, kept[0], row)
    return x

  x = run_encoder()

  def run_decoder() -> jax.Array:
    kept[0], out = decode(params, kept[0], row, x)
    return out

  def run_head(row: Rows) -> jax.Array:
    return head(weights, row, z, predict)

  return Pieces(run_encoder, run_decoder, run_head)
