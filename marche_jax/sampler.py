"""Decoding: ONE `jax.lax.scan` over the rows of a plan.

For every row (iteration) k:
  1. the encoder runs over buffer and known tokens,
  2. the decoder runs over all positions, known ones filled in, mask tokens elsewhere,
  3. its output z at the positions to predict conditions the diffusion head, which samples them,
  4. the sampled tokens become known.

A row names its step shape. Each distinct shape is a loop of zero or one trips, chosen by the row:
unlike `lax.switch` that copies no state (see the DecodePlan in `plan.py`).

Reference: `MAR.sample_tokens`. Shapes as in `models/mar.py`; H guidance halves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from marche_jax import diffusion, head_sampler
from marche_jax.config import NUM_TRAIN_TIMESTEPS, ModelConfig
from marche_jax.models.mar import MAR, Params, make_block
from marche_jax.plan import DecodePlan, StepShape

# Streams of an image's random numbers.
_ORDER, _NOISE = 0, 1


@flax.struct.dataclass
class DecodeState:
  """What one iteration maps to the next."""

  tokens: jax.Array  # float32 [B, S, C]; zero where unknown
  order: jax.Array  # int32 [B, S]; tokens are revealed from its end


@flax.struct.dataclass
class Rows:
  """Row data of a plan on the device, each [R]."""

  shape: Any  # int32; -1 runs nothing (padding)
  num_known: Any  # int32
  num_predict: Any  # int32
  cfg: Any  # float32
  table: Any  # int32
  steps: Any  # int32


@flax.struct.dataclass
class Tables:
  """Diffusion tables of a plan, padded to the longest."""

  coefficients: diffusion.Coefficients  # each [tables, T]
  temperature: Any  # float32 []


@flax.struct.dataclass
class Noise:
  """Recorded noise that replaces drawn noise."""

  initial: Any  # float32 [R, B, S, C]: x_T
  steps: Any  # float32 [R, T, B, S, C]: index 0 is the first executed step


@flax.struct.dataclass
class Inputs:
  """What a batch is decoded from."""

  labels: Any  # int32 [B]
  keys: Any  # typed keys [B], one per image
  noise: Noise | None = None
  teacher: Any = None  # float32 [B, S, C]: these values replace what the head samples


@flax.struct.dataclass
class Trace:
  """What an iteration did, zero where nothing was predicted; each with leading [R] in the end."""

  z: Any  # float32 [H, B, S, D]; H = 1 or 2, the conditional half first
  sampled: Any  # float32 [B, S, C]


def image_keys(key: jax.Array, image_ids: jax.Array) -> jax.Array:
  """Key of every image [B]: depends on the run's key and the image's number alone."""
  return jax.vmap(functools.partial(jax.random.fold_in, key))(image_ids)


def random_order(keys: jax.Array, seq_len: int) -> jax.Array:
  """A uniformly random order of the tokens of every image, int32 [B, S]."""
  fold = functools.partial(jax.random.permutation, x=seq_len)
  return jax.vmap(lambda k: fold(jax.random.fold_in(k, _ORDER)))(keys).astype(jnp.int32)


def plan_rows(plan: DecodePlan) -> tuple[Rows, Tables]:
  """A plan's rows and tables as device data (numpy)."""
  lengths = [len(p.timesteps) for p in plan.processes]
  longest = max(lengths)
  padded = [
    jax.tree.map(lambda x: np.pad(x, (0, longest - len(x))), p.coefficients())
    for p in plan.processes
  ]
  rows = Rows(
    shape=np.asarray([r.shape for r in plan.rows], np.int32),
    num_known=np.asarray([r.num_known for r in plan.rows], np.int32),
    num_predict=np.asarray([r.num_predict for r in plan.rows], np.int32),
    cfg=np.asarray([r.cfg for r in plan.rows], np.float32),
    table=np.asarray([r.process for r in plan.rows], np.int32),
    steps=np.asarray([lengths[r.process] for r in plan.rows], np.int32),
  )
  coefficients = jax.tree.map(lambda *x: np.stack(x), *padded)
  return rows, Tables(coefficients, np.float32(plan.temperature))


def chunks(rows: Rows, size: int) -> Iterator[tuple[int, Rows]]:
  """Splits rows into (rows done after it, chunk of exactly `size` rows), the last one padded."""
  total = len(rows.shape)
  for start in range(0, total, size):
    end = min(start + size, total)
    pad = size - (end - start)
    chunk = jax.tree.map(lambda x, s=start, e=end, p=pad: np.pad(x[s:e], (0, p)), rows)
    if pad:
      chunk.shape[-pad:] = -1
    yield end, chunk


def _run_layers(params: Params, first: int, last: int, layer: Callable, carry: Any) -> Any:
  """Folds `layer(parameters of layer l, l, carry)` over a range of a stack."""

  def body(index: jax.Array, carry: Any) -> Any:
    one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), params)
    return layer(one, index, carry)

  return jax.lax.fori_loop(first, last, body, carry)


def run_encoder(
  params: Params,
  config: ModelConfig,
  dtype: Any,
  state: DecodeState,
  embedding: jax.Array,
  slots: int,
  num_known: jax.Array,
) -> jax.Array:
  """Steps 1 and 2a: known tokens through the encoder to the decoder's input [H * B, N, Dd]."""
  halves = embedding.shape[0] // state.tokens.shape[0]
  apply = functools.partial(MAR(config, dtype).apply, {"params": params})
  positions = state.order[:, ::-1][:, :slots]
  valid = jnp.broadcast_to(jnp.arange(slots) < num_known, positions.shape)
  known = jnp.take_along_axis(state.tokens, positions[..., None], axis=1)
  repeat = lambda x: jnp.tile(x, (halves,) + (1,) * (x.ndim - 1))  # noqa: E731
  known, positions, valid = repeat(known), repeat(positions), repeat(valid)

  x = apply(known, positions, embedding, method="encoder_input")
  buffer = jnp.ones((x.shape[0], config.buffer_size), bool)
  keys = jnp.concatenate([buffer, valid], axis=1)
  block = make_block(config, "encoder", dtype)

  def layer(one: Params, _: jax.Array, x: jax.Array) -> jax.Array:
    p = {"params": one}
    x = block.apply(p, x, *block.apply(p, x, method="qkv"), keys, method="attend")
    return block.apply(p, x, method="feed_forward")

  x = _run_layers(params["encoder_blocks"], 0, config.encoder_depth, layer, x)
  embedded = apply(x, method="decoder_embedding")
  return apply(embedded, positions, valid, method="decoder_input")


def run_decoder(
  params: Params, config: ModelConfig, dtype: Any, x: jax.Array, predict: jax.Array
) -> jax.Array:
  """Step 2b: decoder input [H * B, N, Dd] -> z [H * B, P, Dd] at image positions [H * B, P].

  In the last layer only the tokens to predict need queries and the feed-forward.
  """
  block = make_block(config, "decoder", dtype)

  def layer(one: Params, _: jax.Array, x: jax.Array) -> jax.Array:
    p = {"params": one}
    x = block.apply(p, x, *block.apply(p, x, method="qkv"), None, method="attend")
    return block.apply(p, x, method="feed_forward")

  def last_layer(one: Params, _: jax.Array, x: jax.Array) -> jax.Array:
    p = {"params": one}
    asked = jnp.take_along_axis(x, config.buffer_size + predict[..., None], axis=1)
    q = block.apply(p, asked, method="queries")
    asked = block.apply(
      p, asked, q, *block.apply(p, x, method="keys_values"), None, method="attend"
    )
    return block.apply(p, asked, method="feed_forward")

  stack, depth = params["decoder_blocks"], config.decoder_depth
  x = _run_layers(stack, 0, depth - 1, layer, x)
  x = last_layer(jax.tree.map(lambda p: p[depth - 1], stack), jnp.int32(depth - 1), x)
  return MAR(config, dtype).apply({"params": params}, x, predict, method="condition")


def _step(
  params: Params,
  weights: head_sampler.HeadWeights,
  config: ModelConfig,
  dtype: Any,
  shape: StepShape,
  row: Rows,
  tables: Tables,
  inputs: Inputs,
  noise: Noise | None,
  state: DecodeState,
) -> tuple[DecodeState, Trace]:
  """One iteration of one step shape."""
  batch, seq_len, channels = state.tokens.shape
  halves, slots = shape.guidance_halves, shape.predict_slots
  apply = functools.partial(MAR(config, dtype).apply, {"params": params})
  labels = jnp.tile(inputs.labels, halves)
  dropped = jnp.arange(halves * batch) >= batch  # the second half is unconditional
  embedding = apply(labels, dropped, method="class_embedding")

  index = row.num_known + jnp.arange(slots)
  predict = state.order[:, ::-1][:, jnp.minimum(index, seq_len - 1)]
  valid = jnp.arange(slots) < row.num_predict
  x = run_encoder(params, config, dtype, state, embedding, shape.encoder_slots, row.num_known)
  z = run_decoder(params, config, dtype, x, jnp.tile(predict, (halves, 1))).astype(jnp.float32)

  flat = (batch * slots, channels)
  if noise is None:
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
    stream = jax.vmap(lambda k: jax.random.fold_in(k, _NOISE))(inputs.keys)
    token_keys = fold(stream, predict).reshape(-1)

    def draw(timestep: jax.Array | int) -> jax.Array:
      one = lambda k: jax.random.normal(jax.random.fold_in(k, timestep), (channels,))  # noqa: E731
      return jax.vmap(one)(token_keys)

    initial_noise = draw(NUM_TRAIN_TIMESTEPS)
    step_noise = lambda i, timestep: draw(timestep)  # noqa: E731
  else:
    pick = lambda x: jnp.take_along_axis(x, predict[..., None], axis=1).reshape(flat)  # noqa: E731
    initial_noise = pick(noise.initial)
    step_noise = lambda i, timestep: pick(noise.steps[i])  # noqa: E731

  sampled = head_sampler.sample(
    weights,
    z.reshape(halves * batch * slots, -1),
    halves,
    table=row.table,
    coefficients=jax.tree.map(lambda x: x[row.table], tables.coefficients),
    steps=row.steps if shape.diffusion_steps is None else shape.diffusion_steps,
    cfg=row.cfg,
    temperature=tables.temperature,
    initial_noise=initial_noise,
    step_noise=step_noise,
  ).reshape(batch, slots, channels)

  places = jnp.where(valid, predict, seq_len)  # out of range: dropped
  images = jnp.arange(batch)[:, None]
  written = sampled
  if inputs.teacher is not None:
    written = jnp.take_along_axis(inputs.teacher, predict[..., None], axis=1)
  tokens = state.tokens.at[images, places].set(written, mode="drop")

  scatter = lambda to, x: to.at[images, places].set(x, mode="drop")  # noqa: E731
  split_z = z.reshape(halves, batch, slots, -1)
  trace = Trace(
    z=jax.vmap(lambda x: scatter(jnp.zeros((batch, seq_len, x.shape[-1])), x))(split_z),
    sampled=scatter(jnp.zeros_like(state.tokens), sampled),
  )
  return dataclasses.replace(state, tokens=tokens), trace


def _empty_trace(config: ModelConfig, shapes: tuple[StepShape, ...], batch: int) -> Trace:
  halves = shapes[0].guidance_halves
  return Trace(
    z=jnp.zeros((halves, batch, config.seq_len, config.decoder_embed_dim)),
    sampled=jnp.zeros((batch, config.seq_len, config.token_dim)),
  )


def decode(
  params: Params,
  state: DecodeState,
  rows: Rows,
  tables: Tables,
  inputs: Inputs,
  *,
  config: ModelConfig,
  shapes: tuple[StepShape, ...],
  dtype: Any = jnp.float32,
  head_dtype: Any = jnp.float32,
  trace: bool = False,
) -> tuple[DecodeState, jax.Array, Trace | None]:
  """Folds rows over a state; see the module's docstring. Pure: jit it, shard it.

  Args:
    params: of `MAR`.
    state: before the first of the rows.
    rows: all of a plan's, or some consecutive ones.
    tables: of the plan.
    inputs: of the batch; recorded noise has one entry per row.
    config, shapes: static: sizes, and the plan's step shapes.
    dtype: of the transformer's activations.
    head_dtype: of the head's matrix operands, but for its last layer's.
    trace: also return what every iteration did.

  Returns:
    The state afterwards; bool [R, B], whether all tokens are finite after the row; and the trace.
  """
  weights = head_sampler.prepare(params["head"], config, tables.coefficients.timestep, head_dtype)

  def iterate(state: DecodeState, xs: tuple[Rows, Noise | None]) -> tuple[DecodeState, Any]:
    row, noise = xs
    carry = (state, _empty_trace(config, shapes, state.tokens.shape[0]) if trace else None)
    for number, shape in enumerate(shapes):

      def step(_: jax.Array, carry: Any, shape: StepShape = shape) -> Any:
        state, done = _step(
          params, weights, config, dtype, shape, row, tables, inputs, noise, carry[0]
        )
        return state, done if trace else None

      carry = jax.lax.fori_loop(0, (row.shape == number).astype(jnp.int32), step, carry)
    state = carry[0]
    return state, (jnp.isfinite(state.tokens).all(axis=(1, 2)), carry[1])

  state, (finite, traces) = jax.lax.scan(iterate, state, (rows, inputs.noise))
  return state, finite, traces


STATIC = ("config", "shapes", "dtype", "head_dtype", "trace")

jitted_decode = jax.jit(decode, static_argnames=STATIC, donate_argnums=1)


def sharded_decode(mesh: Mesh, **static: Any) -> Callable:
  """`decode` over the `data` axis of a mesh: every device decodes its images on its own.

  Returns a jitted (params, state, rows, tables, inputs) -> (state, finite, None); the number of
  images must be a multiple of the mesh's size.
  """
  data, everywhere = PartitionSpec("data"), PartitionSpec()
  mapped = jax.shard_map(
    functools.partial(decode, **static),
    mesh=mesh,
    in_specs=(everywhere, data, everywhere, everywhere, data),
    out_specs=(data, PartitionSpec(None, "data"), everywhere),
    check_vma=False,
  )
  return jax.jit(mapped, donate_argnums=1)
