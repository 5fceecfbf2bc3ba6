"""Decoding: ONE `jax.lax.scan` over the rows of a plan.

In every iteration
  1. the encoder runs over buffer and known tokens,
  2. the decoder runs over all tokens, known ones filled in, mask tokens elsewhere,
  3. its output z of the tokens to predict conditions the diffusion head, which samples them,
  4. the sampled tokens become known.
In a selective iteration both stacks recompute some tokens only and read the rest from the cache,
which every full one has filled (see `stack.py`). With one guidance half computed, the unconditional
output is the conditional one plus the difference that the last full iteration stored.

A row names its step shape. Each distinct shape is a loop of zero or one trips, chosen by the row:
unlike `lax.switch` that copies no state.

Reference: `MAR.sample_tokens`. Shapes as in `models/mar.py`; X = guidance halves times images, the
conditional half first; ranks as in `cache.py`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from marche_jax.config import NUM_TRAIN_TIMESTEPS, ModelConfig
from marche_jax.decoding import head_sampler
from marche_jax.decoding.recording import Trace, empty_trace, trace_iteration
from marche_jax.decoding.state import (
  NOISE_STREAM,
  Array,
  DecodeState,
  Inputs,
  Noise,
  Rows,
  Tables,
  state_specs,
)
from marche_jax.decoding.transformer import Transformer, apply_difference
from marche_jax.models.params import Params
from marche_jax.planning.plan import DecodePlan
from marche_jax.planning.shapes import HeadShape, StepShape


def token_noise(
  inputs: Inputs, predict: jax.Array, channels: int, temperature: jax.Array
) -> head_sampler.TokenNoise:
  """The noise of the tokens at positions int [B, P], B * P of them.

  It depends on an image's key, the position and the timestep alone; or it is the given one.
  """
  if inputs.noise is not None:
    given = inputs.noise
    flat = (predict.size, channels)
    pick = lambda x: jnp.take_along_axis(x, predict[..., None], axis=1).reshape(flat)
    of_step = lambda i, timestep: pick(given.diffusion_steps[i])
    return head_sampler.TokenNoise(pick(given.initial), of_step, temperature)
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
  stream = jax.vmap(lambda k: jax.random.fold_in(k, NOISE_STREAM))(inputs.keys)
  token_keys = fold(stream, predict).reshape(-1)

  def draw(timestep: jax.Array | int) -> jax.Array:
    one = lambda k: jax.random.normal(jax.random.fold_in(k, timestep), (channels,))
    return jax.vmap(one)(token_keys)

  of_step = lambda i, timestep: draw(timestep)
  return head_sampler.TokenNoise(draw(NUM_TRAIN_TIMESTEPS), of_step, temperature)


def sample_tokens(
  weights: head_sampler.HeadWeights,
  shape: HeadShape,
  row: Rows,
  tables: Tables,
  inputs: Inputs,
  predict: jax.Array,
  z: jax.Array,
) -> jax.Array:
  """Has the diffusion head sample tokens given z.

  Args:
    weights: of `head_sampler.prepare`.
    shape: of the head.
    row: of the iteration, each [].
    tables: of the run.
    inputs: of the run; given noise is that of the iteration (without its leading [R]).
    predict: positions of the tokens, int [B, P].
    z: output of the decoder there, float32 [H, B, P, Dd].

  Returns:
    float32 [B, P, C].
  """
  halves, batch = z.shape[:2]
  channels = weights.input_proj["kernel"].shape[0]
  guidance = head_sampler.Guidance(halves, jnp.asarray(row.cfg))

  def draw(
    z: jax.Array, predict: jax.Array, process: Array, num_steps: int | jax.Array, cached: bool
  ) -> jax.Array:
    run = head_sampler.DiffusionRun(
      process=process,
      coefficients=jax.tree.map(lambda x: x[process], tables.coefficients),
      num_steps=num_steps,
      fewest=shape.fewest,
      solver=shape.solver,
      cached=cached,
    )
    noise = token_noise(inputs, predict, channels, jnp.asarray(tables.temperature))
    flat = z.reshape(halves * predict.size, -1)
    drawn = head_sampler.sample(weights, flat, run, noise, guidance)
    return drawn.reshape(*predict.shape, channels)

  static = shape.diffusion_steps
  num_steps = jnp.asarray(row.diffusion_steps) if static is None else static
  sampled = draw(z, predict, row.process, num_steps, shape.cached)
  if not shape.detail:
    return sampled
  # Tokens of much detail get more diffusion steps; see `head_sampler.detail_scores`.
  scores = head_sampler.detail_scores(z[0])
  scores = jnp.where(jnp.arange(predict.shape[1]) < row.num_predict, scores, -jnp.inf)
  _, chosen = jax.lax.top_k(scores, shape.detail)
  fine = draw(
    jnp.take_along_axis(z, chosen[None, ..., None], axis=2),
    jnp.take_along_axis(predict, chosen, axis=1),
    row.detail_process,
    shape.detail_diffusion_steps,
    False,
  )
  kept = jnp.arange(shape.detail) < row.num_detail
  slots = jnp.where(kept, chosen, predict.shape[1])  # out of range: dropped
  return sampled.at[jnp.arange(batch)[:, None], slots].set(fine, mode="drop")


def run_iteration(
  transformer: Transformer,
  weights: head_sampler.HeadWeights,
  shape: StepShape,
  row: Rows,
  tables: Tables,
  inputs: Inputs,
  state: DecodeState,
) -> tuple[DecodeState, Trace]:
  """One iteration of one step shape; see the module's docstring."""
  batch, seq_len, _ = state.tokens.shape
  slots = shape.head.slots
  labels = jnp.tile(inputs.labels, shape.halves)
  dropped = jnp.arange(shape.halves * batch) >= batch  # the second half is unconditional
  embedding = transformer.apply(labels, dropped, method="class_embedding")
  ranks = row.num_known + jnp.arange(slots)  # of the image tokens to predict
  predict = state.by_rank[:, jnp.minimum(ranks, seq_len - 1)]
  valid = jnp.arange(slots) < row.num_predict

  state, x, encoder_active = transformer.run_encoder(shape.encoder, row, state, embedding)
  num_asked = max(slots, shape.difference)
  state, x, decoder_active = transformer.run_decoder(shape.decoder, row, state, x, num_asked)
  state, x = apply_difference(shape, row, state, x)
  halves = x.shape[0] // batch
  z = transformer.apply(x, jnp.tile(predict, (halves, 1)), method="condition").astype(jnp.float32)
  z = z.reshape(halves, batch, slots, -1)
  sampled = sample_tokens(weights, shape.head, row, tables, inputs, predict, z)

  positions = jnp.where(valid, predict, seq_len)  # out of range: dropped
  images = jnp.arange(batch)[:, None]
  written = sampled
  if inputs.teacher is not None:
    written = jnp.take_along_axis(inputs.teacher, predict[..., None], axis=1)
  tokens = state.tokens.at[images, positions].set(written, mode="drop")

  active = (encoder_active, decoder_active)
  trace = trace_iteration(transformer.config, row, batch, active, positions, z, sampled)
  return dataclasses.replace(state, tokens=tokens), trace


def decode(
  params: Params,
  state: DecodeState,
  rows: Rows,
  tables: Tables,
  inputs: Inputs,
  *,
  config: ModelConfig,
  step_shapes: tuple[StepShape, ...],
  dtype: DTypeLike = jnp.float32,
  head_dtype: DTypeLike = jnp.float32,
  trace: bool = False,
) -> tuple[DecodeState, jax.Array, Trace | None]:
  """Folds rows over a state; see the module's docstring. Pure: jit it, shard it.

  Args:
    params: of `MAR`.
    state: before the first of the rows.
    rows: all of a plan's, or some consecutive ones.
    tables: of the plan.
    inputs: of the batch; given noise has one entry per row (on one device only).
    config, step_shapes: static: sizes, and the plan's step shapes.
    dtype: of the transformer's activations.
    head_dtype: of the head's matrix operands, but for its last layer's.
    trace: also return what every iteration did.

  Returns:
    The state afterwards; bool [R, B], whether all tokens are finite after the row; and the trace.
  """
  transformer = Transformer(params, config, dtype)
  weights = head_sampler.prepare(params["head"], config, tables.coefficients.timestep, head_dtype)

  def iterate(
    state: DecodeState, xs: tuple[Rows, Noise | None]
  ) -> tuple[DecodeState, tuple[jax.Array, Trace | None]]:
    row, noise = xs
    now = dataclasses.replace(inputs, noise=noise)
    nothing = empty_trace(config, step_shapes[0].guided, state.tokens.shape[0]) if trace else None
    carry = (state, nothing)
    for shape_id, shape in enumerate(step_shapes):

      def run(
        _: jax.Array, carry: tuple[DecodeState, Trace | None], shape: StepShape = shape
      ) -> tuple[DecodeState, Trace | None]:
        state, done = run_iteration(transformer, weights, shape, row, tables, now, carry[0])
        return state, done if trace else None

      carry = jax.lax.fori_loop(0, (row.shape_id == shape_id).astype(jnp.int32), run, carry)
    state, done = carry
    return state, (jnp.isfinite(state.tokens).all(axis=(1, 2)), done)

  state, (finite, traces) = jax.lax.scan(iterate, state, (rows, inputs.noise))
  return state, finite, traces


STATIC = ("config", "step_shapes", "dtype", "head_dtype", "trace")

jitted_decode = jax.jit(decode, static_argnames=STATIC, donate_argnums=1)


def sharded_decode(
  mesh: Mesh,
  plan: DecodePlan,
  *,
  step_shapes: tuple[StepShape, ...] | None = None,
  dtype: DTypeLike = jnp.float32,
  head_dtype: DTypeLike = jnp.float32,
) -> jax.stages.Wrapped:
  """`decode` over the `data` axis of a mesh: every device decodes its images on its own.

  Args:
    mesh: the devices.
    plan: what will be run.
    step_shapes: some of the plan's, where not all of its rows are run.
    dtype, head_dtype: as in `decode`.

  Returns:
    A jitted (params, state, rows, tables, inputs) -> (state, finite, None); the number of images
    must be a multiple of the mesh's size.
  """
  data, everywhere = PartitionSpec("data"), PartitionSpec()
  state = state_specs(plan, "data")
  mapped = jax.shard_map(
    functools.partial(
      decode,
      config=plan.config,
      step_shapes=plan.step_shapes if step_shapes is None else step_shapes,
      dtype=dtype,
      head_dtype=head_dtype,
    ),
    mesh=mesh,
    in_specs=(everywhere, state, everywhere, everywhere, data),
    out_specs=(state, PartitionSpec(None, "data"), everywhere),
    check_vma=False,
  )
  return jax.jit(mapped, donate_argnums=1)
