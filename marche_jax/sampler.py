"""Decoding: ONE `jax.lax.scan` over the rows of a plan.

For every row (iteration) k:
  1. the encoder runs over buffer and known tokens,
  2. the decoder runs over all positions, known ones filled in, mask tokens elsewhere,
  3. its output z at the positions to predict conditions the diffusion head, which samples them,
  4. the sampled tokens become known.
In a selective row both stacks recompute some tokens only and read the rest from the cache, which
every other row has filled (see `stack.py`). With one guidance half computed, the unconditional
output is the conditional one plus the difference that the last full row stored.

A row names its step shape. Each distinct shape is a loop of zero or one trips, chosen by the row:
unlike `lax.switch` that copies no state (see the DecodePlan in `plan.py`).

Reference: `MAR.sample_tokens`. Shapes as in `models/mar.py`; X = guidance halves times images, the
conditional half first; rank order as in `cache.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from marche_jax import diffusion, head_sampler
from marche_jax.cache import KVCache, empty_cache
from marche_jax.config import NUM_TRAIN_TIMESTEPS, ModelConfig
from marche_jax.models.mar import MAR, Params, make_block
from marche_jax.plan import DecodePlan, HeadShape, StackShape, StepShape
from marche_jax.stack import Span, run_stack, take

# Streams of an image's random numbers.
_ORDER, _NOISE = 0, 1

# What a token is to an iteration, in `Trace.activity`.
UNSEEN, CACHED, REFRESHED, PREVIOUS, NOW = range(5)


@flax.struct.dataclass
class DecodeState:
  """What one iteration maps to the next. What a plan does not need is None."""

  tokens: jax.Array  # float32 [B, S, C]; zero where unknown
  order: jax.Array  # int32 [B, S]; tokens are revealed from its end
  encoder: KVCache | None = None  # [L, X, N, De]; X of the plan's cache_halves
  decoder: KVCache | None = None  # [L, X, N, Dd]
  decoder_input: Any = None  # [X, N, Dd]: what the decoder's first layer sees, by rank
  difference: Any = None  # [B, S, Dd]: unconditional minus conditional, before the decoder's norm
  scores: Any = None  # (encoder's, decoder's), float32 [X, N]: attention of the last iteration


@flax.struct.dataclass
class Rows:
  """Row data of a plan on the device, each [R]."""

  shape: Any  # int32; -1 runs nothing (padding)
  num_known: Any  # int32
  num_previous: Any  # int32
  num_predict: Any  # int32
  encoder_active: Any  # int32
  decoder_active: Any  # int32
  cfg: Any  # float32
  table: Any  # int32
  steps: Any  # int32
  num_detail: Any  # int32
  detail_table: Any  # int32


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
  activity: Any  # int32 [2, B, N] by rank: what a token was to encoder and decoder (cond. half)
  scores: Any  # float32 [2, B, N] by rank: what chose the refresh (cond. half); 0: nothing did


class Recomputed(NamedTuple):
  """Which tokens a stack recomputed, and why."""

  index: Any  # int32 [X, A]: positions by rank; None: all
  active: Any  # bool [A]: the slot holds a token; None: all
  scores: Any  # float32 [X, M]: what chose them; None: nothing did


def image_keys(key: jax.Array, image_ids: jax.Array) -> jax.Array:
  """Key of every image [B]: depends on the run's key and the image's number alone."""
  return jax.vmap(functools.partial(jax.random.fold_in, key))(image_ids)


def random_order(keys: jax.Array, seq_len: int) -> jax.Array:
  """A uniformly random order of the tokens of every image, int32 [B, S]."""
  fold = functools.partial(jax.random.permutation, x=seq_len)
  return jax.vmap(lambda k: fold(jax.random.fold_in(k, _ORDER)))(keys).astype(jnp.int32)


def arrange(plan: DecodePlan, order: Any) -> jax.Array:
  """Orders int [B, S] under the plan's rule, int32 [B, S].

  Positions of a lower stage come first, each stage in the order given; then the tokens of every
  raster group are put into raster order. The plan's known tokens, at the end of the order, stay.
  """
  by_rank = jnp.asarray(order, jnp.int32)[:, ::-1]
  sort = lambda key: jnp.take_along_axis(by_rank, jnp.argsort(key, axis=1, stable=True), axis=1)  # noqa: E731
  if plan.stages is not None:
    known = np.arange(by_rank.shape[1]) < plan.rows[0].num_known
    by_rank = sort(jnp.where(known, -1, jnp.asarray(plan.stages, jnp.int32)[by_rank]))
  if plan.raster_groups:
    size = plan.config.seq_len
    group, raster = np.arange(size, dtype=np.int32), np.zeros(size, np.int32)
    for start, end in plan.raster_groups:
      group[start:end], raster[start:end] = start, 1
    by_rank = sort(group * size + raster * by_rank)
  return by_rank[:, ::-1]


def empty_state(plan: DecodePlan, tokens: Any, order: Any, dtype: Any) -> DecodeState:
  """The state before the first iteration.

  Args:
    plan: what will be run: says which caches are needed.
    tokens: float32 [B, S, C], zero where unknown.
    order: int32 [B, S], as `arrange` gives it.
    dtype: of the transformer's activations, and so of the caches.
  """
  config, halves = plan.config, plan.cache_halves
  state = DecodeState(tokens, order)
  if not halves:
    return state
  batch, positions = tokens.shape[0], config.buffer_size + config.seq_len
  wide = config.decoder_embed_dim
  sequences = halves * batch
  score = lambda: jnp.zeros((sequences, positions))  # noqa: E731
  return dataclasses.replace(
    state,
    encoder=empty_cache(
      config.encoder_depth, sequences, positions, config.encoder_embed_dim, dtype
    ),
    decoder=empty_cache(config.decoder_depth, sequences, positions, wide, dtype),
    decoder_input=jnp.zeros((sequences, positions, wide), dtype),
    difference=jnp.zeros((batch, config.seq_len, wide), dtype) if plan.stores_difference else None,
    scores=(score(), score()) if plan.carries_scores else None,
  )


def state_specs(plan: DecodePlan, axis: str) -> DecodeState:
  """How a state is laid out over a mesh axis of devices that decode images of their own.

  The sequences of a device's caches are its images' guidance halves; nobody else looks at them.
  """
  state = jax.eval_shape(
    lambda: empty_state(plan, jnp.zeros((1, 1, 1)), jnp.zeros((1, 1), jnp.int32), jnp.float32)
  )
  data = lambda tree: jax.tree.map(lambda _: PartitionSpec(axis), tree)  # noqa: E731
  caches = lambda tree: jax.tree.map(lambda _: PartitionSpec(None, axis), tree)  # noqa: E731
  return dataclasses.replace(
    data(state), encoder=caches(state.encoder), decoder=caches(state.decoder)
  )


def plan_rows(plan: DecodePlan) -> tuple[Rows, Tables]:
  """A plan's rows and tables as device data (numpy)."""
  lengths = [len(p.timesteps) for p in plan.processes]
  longest = max(lengths)
  padded = [
    jax.tree.map(lambda x: np.pad(x, (0, longest - len(x))), p.coefficients())
    for p in plan.processes
  ]
  column = lambda dtype, values: np.asarray(list(values), dtype)  # noqa: E731
  integers = {
    name: column(np.int32, (getattr(row, name) for row in plan.rows))
    for name in ("shape", "num_known", "num_previous", "num_predict", "encoder_active",
                 "decoder_active", "num_detail")
  }  # fmt: skip
  rows = Rows(
    **integers,
    cfg=column(np.float32, (r.cfg for r in plan.rows)),
    table=column(np.int32, (r.process for r in plan.rows)),
    steps=column(np.int32, (lengths[r.process] for r in plan.rows)),
    detail_table=column(np.int32, (r.detail_process for r in plan.rows)),
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


def run_encoder(
  params: Params,
  config: ModelConfig,
  dtype: Any,
  shape: StackShape,
  row: Rows,
  state: DecodeState,
  embedding: jax.Array,
) -> tuple[DecodeState, jax.Array, Recomputed]:
  """Steps 1 and 2a: known tokens through the encoder to the decoder's input.

  Args:
    params, config, dtype: as in `decode`.
    shape: of the encoder.
    row: of the iteration.
    state: before it.
    embedding: class embedding [X, De].

  Returns:
    The state, with the encoder's cache; the decoder's input of all positions [X, N, Dd]; and which
    tokens were recomputed.
  """
  batch, sequences = state.tokens.shape[0], embedding.shape[0]
  slots, buffer = shape.slots, config.buffer_size
  apply = functools.partial(MAR(config, dtype).apply, {"params": params})
  positions = state.order[:, ::-1]
  valid = jnp.arange(slots) < row.num_known
  known = jnp.take_along_axis(state.tokens, positions[:, :slots, None], axis=1)
  repeat = lambda x: jnp.tile(x, (sequences // batch,) + (1,) * (x.ndim - 1))  # noqa: E731

  x = apply(repeat(known), repeat(positions[:, :slots]), embedding, method="encoder_input")
  first = buffer + row.num_known - row.num_previous
  span = Span(
    jnp.concatenate([jnp.ones(buffer, bool), valid]), first, row.num_previous, row.encoder_active,
    first, row.num_previous,
  )  # fmt: skip
  run = run_stack(
    make_block(config, "encoder", dtype), params["encoder_blocks"], shape, span, x, state.encoder,
    None if state.scores is None else state.scores[0],
    depth=config.encoder_depth, buffer=buffer,
  )  # fmt: skip
  embedded = apply(run.x, method="decoder_embedding")

  # By rank: the buffer and the known tokens are embedded, the others are mask tokens.
  where = apply(repeat(positions), method="decoder_positions")
  if run.index is None:
    masked = apply(repeat(positions), method="masked_input")
    visible = embedded + where[:, : buffer + slots]
    is_known = (jnp.arange(config.seq_len) < row.num_known)[:, None]
    padded = jnp.pad(visible[:, buffer:], ((0, 0), (0, config.seq_len - slots), (0, 0)))
    x = jnp.concatenate([visible[:, :buffer], jnp.where(is_known, padded, masked)], axis=1)
  else:
    places = jnp.where(run.active, run.index, where.shape[1])  # out of range: dropped
    sequence = jnp.arange(sequences)[:, None]
    visible = embedded + take(where, run.index)
    x = state.decoder_input[:sequences].at[sequence, places].set(visible, mode="drop")
  stored = state.decoder_input
  if stored is not None:
    stored = x[: len(stored)] if sequences >= len(stored) else stored.at[:sequences].set(x)
  scores = None if state.scores is None else (run.scores, state.scores[1])
  state = dataclasses.replace(state, encoder=run.cache, decoder_input=stored, scores=scores)
  return state, x, Recomputed(run.index, run.active, run.selected_by)


def run_decoder(
  params: Params,
  config: ModelConfig,
  dtype: Any,
  shape: StackShape,
  row: Rows,
  state: DecodeState,
  x: jax.Array,
  asked: int,
) -> tuple[DecodeState, jax.Array, Recomputed]:
  """Step 2b: the decoder's input of all positions [X, N, Dd] -> its output before the final norm.

  In the last layer only the tokens asked for need queries and the feed-forward.

  Args:
    params, config, dtype, shape, row, state: as in `run_encoder`.
    x: decoder input.
    asked: number of tokens asked for, in rank order from the first to be predicted.

  Returns:
    The state, with the decoder's cache; output [X, asked, Dd]; which tokens were recomputed.
  """
  block = make_block(config, "decoder", dtype)
  buffer, depth = config.buffer_size, config.decoder_depth
  sequences, positions = x.shape[:2]
  now = buffer + row.num_known
  span = Span(
    None, now - row.num_previous, row.num_previous + row.num_predict, row.decoder_active, now,
    row.num_predict,
  )  # fmt: skip
  run = run_stack(
    block, params["decoder_blocks"], shape, span, x, state.decoder,
    None if state.scores is None else state.scores[1], depth=depth - 1, buffer=buffer,
  )  # fmt: skip

  last, cache = jnp.int32(depth - 1), run.cache
  apply = functools.partial(
    block.apply, {"params": jax.tree.map(lambda p: p[depth - 1], params["decoder_blocks"])}
  )
  k, v = apply(run.x, method="keys_values")
  place = now + jnp.arange(asked)
  if run.index is not None:
    places = jnp.where(run.active, run.index, positions)
    assert cache is not None
    cache = cache.scatter(last, places, k, v)
    k, v = cache.read(last, sequences, positions)
    place += (buffer if shape.buffer else 0) - span.first  # forced tokens come first, in order
  elif cache is not None:
    cache = cache.write(last, k, v)
  x = take(run.x, jnp.minimum(place, run.x.shape[1] - 1))
  x = apply(x, apply(x, method="queries"), k, v, None, method="attend")
  x = apply(x, method="feed_forward")
  scores = None if state.scores is None else (state.scores[0], run.scores)
  state = dataclasses.replace(state, decoder=cache, scores=scores)
  return state, x, Recomputed(run.index, run.active, run.selected_by)


def apply_difference(
  shape: StepShape, row: Rows, state: DecodeState, x: jax.Array
) -> tuple[DecodeState, jax.Array]:
  """Stores or applies the difference of the guidance halves; [X, asked, Dd] -> [H * B, P, Dd]."""
  batch, slots = state.tokens.shape[0], shape.head.slots
  if shape.difference:
    ranks = row.num_known + jnp.arange(x.shape[1])
    found = x[batch:] - x[:batch]
    difference = state.difference.at[:, ranks].set(found, mode="drop")
    state = dataclasses.replace(state, difference=difference)
  x = x[:, :slots]
  if shape.guided and shape.halves == 1:
    ranks = jnp.minimum(row.num_known + jnp.arange(slots), state.difference.shape[1] - 1)
    x = jnp.concatenate([x, x + state.difference[:, ranks]])
  return state, x


def sample_tokens(
  weights: head_sampler.HeadWeights,
  shape: HeadShape,
  row: Rows,
  tables: Tables,
  inputs: Inputs,
  noise: Noise | None,
  predict: jax.Array,
  z: jax.Array,
) -> jax.Array:
  """Step 3: z float32 [H, B, P, Dd] at image positions int [B, P] -> tokens float32 [B, P, C]."""
  halves, batch = z.shape[:2]

  def run(
    z: jax.Array, predict: jax.Array, table: jax.Array, steps: Any, cached: bool
  ) -> jax.Array:
    channels = weights.input_proj["kernel"].shape[0]
    flat = (predict.size, channels)
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
    return head_sampler.sample(
      weights,
      z.reshape(halves * predict.size, -1),
      halves,
      table=table,
      coefficients=jax.tree.map(lambda x: x[table], tables.coefficients),
      steps=steps,
      cfg=row.cfg,
      temperature=tables.temperature,
      initial_noise=initial_noise,
      step_noise=step_noise,
      solver=shape.solver,
      cached=cached,
    ).reshape(*predict.shape, channels)

  steps = row.steps if shape.steps is None else shape.steps
  sampled = run(z, predict, row.table, steps, shape.cached)
  if not shape.detail:
    return sampled
  # Tokens of much detail get more diffusion steps; see `head_sampler.detail_scores`.
  scores = head_sampler.detail_scores(z[0])
  scores = jnp.where(jnp.arange(predict.shape[1]) < row.num_predict, scores, -jnp.inf)
  _, chosen = jax.lax.top_k(scores, shape.detail)
  fine = run(
    jax.vmap(take, (0, None))(z, chosen),
    jnp.take_along_axis(predict, chosen, axis=1),
    row.detail_table,
    shape.detail_steps,
    False,
  )
  kept = jnp.arange(shape.detail) < row.num_detail
  places = jnp.where(kept, chosen, predict.shape[1])  # out of range: dropped
  return sampled.at[jnp.arange(batch)[:, None], places].set(fine, mode="drop")


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
  batch, seq_len, _ = state.tokens.shape
  slots = shape.head.slots
  apply = functools.partial(MAR(config, dtype).apply, {"params": params})
  labels = jnp.tile(inputs.labels, shape.halves)
  dropped = jnp.arange(shape.halves * batch) >= batch  # the second half is unconditional
  embedding = apply(labels, dropped, method="class_embedding")
  index = row.num_known + jnp.arange(slots)
  predict = state.order[:, ::-1][:, jnp.minimum(index, seq_len - 1)]
  valid = jnp.arange(slots) < row.num_predict

  state, x, encoded = run_encoder(params, config, dtype, shape.encoder, row, state, embedding)
  state, x, decoded = run_decoder(
    params, config, dtype, shape.decoder, row, state, x, max(slots, shape.difference)
  )
  state, x = apply_difference(shape, row, state, x)
  halves = len(x) // batch
  z = apply(x, jnp.tile(predict, (halves, 1)), method="condition").astype(jnp.float32)
  z = z.reshape(halves, batch, slots, -1)
  sampled = sample_tokens(weights, shape.head, row, tables, inputs, noise, predict, z)

  places = jnp.where(valid, predict, seq_len)  # out of range: dropped
  images = jnp.arange(batch)[:, None]
  written = sampled
  if inputs.teacher is not None:
    written = jnp.take_along_axis(inputs.teacher, predict[..., None], axis=1)
  tokens = state.tokens.at[images, places].set(written, mode="drop")

  scatter = lambda to, x: to.at[images, places].set(x, mode="drop")  # noqa: E731
  seen = (config.buffer_size + row.num_known, config.buffer_size + seq_len)
  stacks = list(zip((encoded, decoded), seen))
  trace = Trace(
    z=jax.vmap(lambda x: scatter(jnp.zeros((batch, seq_len, x.shape[-1])), x))(z),
    sampled=scatter(jnp.zeros_like(state.tokens), sampled),
    activity=jnp.stack([_activity(config, row, batch, *stack) for stack in stacks]),
    scores=jnp.stack([_scores(config, batch, *stack) for stack in stacks]),
  )
  return dataclasses.replace(state, tokens=tokens), trace


def _activity(
  config: ModelConfig, row: Rows, batch: int, which: Recomputed, seen: Any
) -> jax.Array:
  """What every token was to a stack, int32 [B, N] by rank."""
  positions = config.buffer_size + config.seq_len
  rank = jnp.arange(positions)
  shape = (batch, positions)
  index, active, _ = which
  if index is None:
    found = jnp.full(shape, REFRESHED)
  else:
    places = jnp.where(active, index[:batch], positions)
    found = (
      jnp.full(shape, CACHED).at[jnp.arange(batch)[:, None], places].set(REFRESHED, mode="drop")
    )
  now = config.buffer_size + row.num_known
  recomputed = found == REFRESHED  # a forced token that is not would be a bug, and would show
  found = jnp.where(recomputed & (rank >= now - row.num_previous) & (rank < now), PREVIOUS, found)
  found = jnp.where(recomputed & (rank >= now) & (rank < now + row.num_predict), NOW, found)
  return jnp.where(rank < seen, found, UNSEEN)


def _scores(config: ModelConfig, batch: int, recomputed: Recomputed, seen: Any) -> jax.Array:
  """What chose the refresh in a stack, float32 [B, N] by rank; zero where nothing did."""
  positions = config.buffer_size + config.seq_len
  if recomputed.scores is None:
    return jnp.zeros((batch, positions))
  found = recomputed.scores[:batch]
  found = jnp.pad(found, ((0, 0), (0, positions - found.shape[1])))
  return jnp.where(jnp.arange(positions) < seen, found, 0.0)


def _empty_trace(config: ModelConfig, shapes: tuple[StepShape, ...], batch: int) -> Trace:
  halves = 2 if shapes[0].guided else 1
  return Trace(
    z=jnp.zeros((halves, batch, config.seq_len, config.decoder_embed_dim)),
    sampled=jnp.zeros((batch, config.seq_len, config.token_dim)),
    activity=jnp.zeros((2, batch, config.buffer_size + config.seq_len), jnp.int32),
    scores=jnp.zeros((2, batch, config.buffer_size + config.seq_len)),
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


def sharded_decode(mesh: Mesh, plan: DecodePlan, **static: Any) -> Callable:
  """`decode` over the `data` axis of a mesh: every device decodes its images on its own.

  Returns a jitted (params, state, rows, tables, inputs) -> (state, finite, None); the number of
  images must be a multiple of the mesh's size.
  """
  data, everywhere = PartitionSpec("data"), PartitionSpec()
  state = state_specs(plan, "data")
  mapped = jax.shard_map(
    functools.partial(decode, config=plan.config, shapes=plan.shapes, **static),
    mesh=mesh,
    in_specs=(everywhere, state, everywhere, everywhere, data),
    out_specs=(state, PartitionSpec(None, "data"), everywhere),
    check_vma=False,
  )
  return jax.jit(mapped, donate_argnums=1)
