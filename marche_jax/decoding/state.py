"""What decoding works on: the state that iterations hand on, a plan's rows, and a batch's inputs.

Reference: `MAR.sample_tokens`. Shapes as in `models/mar.py`; X = guidance halves times images, the
conditional half first; N tokens by rank as in `cache.py`; R rows of a plan, T diffusion steps of
its longest process.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from marche_jax.decoding.cache import KVCache, empty_cache
from marche_jax.models import diffusion
from marche_jax.planning.plan import DecodePlan

Array = jax.Array | np.ndarray
"""Numpy on the host, of jax on the device."""

# Streams of an image's random numbers.
ORDER_STREAM, NOISE_STREAM = 0, 1

IDLE = -1
"""Shape id of a row that runs nothing."""


@flax.struct.dataclass
class DecodeState:
  """What one iteration maps to the next. What a plan does not need is None."""

  tokens: jax.Array  # float32 [B, S, C]; zero where unknown
  by_rank: jax.Array  # int32 [B, S]: position of the image token of each rank
  encoder_cache: KVCache | None = None  # [L, X, N, De]; X of the plan's cache_halves
  decoder_cache: KVCache | None = None  # [L, X, N, Dd]
  decoder_input: jax.Array | None = None  # [X, N, Dd]: what the decoder's first layer sees
  difference: jax.Array | None = None  # [B, S, Dd] by rank: unconditional minus conditional half
  encoder_carried: jax.Array | None = None  # float32 [X, N]: attention of the last iteration,
  decoder_carried: jax.Array | None = None  # float32 [X, N]: by which the next one may select


@flax.struct.dataclass
class Rows:
  """Row data of a plan on the device, each [R]."""

  shape_id: Array  # int32; IDLE: padding
  num_known: Array  # int32
  num_previous: Array  # int32
  num_predict: Array  # int32
  encoder_active: Array  # int32
  decoder_active: Array  # int32
  cfg: Array  # float32
  process: Array  # int32
  diffusion_steps: Array  # int32
  num_detail: Array  # int32
  detail_process: Array  # int32


@flax.struct.dataclass
class Tables:
  """Tables of a plan's diffusion processes, padded to the longest."""

  coefficients: diffusion.Coefficients  # each [processes, T]
  temperature: Array  # float32 []


@flax.struct.dataclass
class Noise:
  """Given noise, which replaces drawn noise."""

  initial: Array  # float32 [R, B, S, C]: x_T
  diffusion_steps: Array  # float32 [R, T, B, S, C]: index 0 is the first executed one


@flax.struct.dataclass
class Inputs:
  """What a batch is decoded from."""

  labels: Array  # int32 [B]
  keys: jax.Array  # typed keys [B], one per image
  noise: Noise | None = None
  teacher: Array | None = None  # float32 [B, S, C]: these values replace what the head samples


GENERATOR = "threefry2x32"
"""Of jax's random number generators the one whose draws under vmap are those of each key alone.
What `rbg` and `unsafe_rbg` draw for an image depends on the others of its batch."""


def run_key(seed: int) -> jax.Array:
  """The key of a run: of one random number generator, whatever jax's default is."""
  return jax.random.key(seed, impl=GENERATOR)


def check_key(key: jax.Array) -> None:
  """Raises ValueError for anything but one typed key of `GENERATOR`."""
  typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
  if not typed or key.ndim:
    raise ValueError(f'key: expected one typed key, jax.random.key(seed, impl="{GENERATOR}")')
  if (found := str(jax.random.key_impl(key))) != GENERATOR:
    raise ValueError(
      f"key: found one of {found}, whose draws couple the images of a batch; expected "
      f'jax.random.key(seed, impl="{GENERATOR}")'
    )


def image_keys(key: jax.Array, image_ids: jax.Array) -> jax.Array:
  """Key of every image [B]: depends on the run's key and the image's number alone.

  Raises:
    ValueError: as `check_key`.
  """
  check_key(key)
  return jax.vmap(functools.partial(jax.random.fold_in, key))(image_ids)


def random_order(keys: jax.Array, seq_len: int) -> jax.Array:
  """A uniformly random order of every image, int32 [B, S]: positions, revealed from its end."""
  fold = functools.partial(jax.random.permutation, x=seq_len)
  return jax.vmap(lambda k: fold(jax.random.fold_in(k, ORDER_STREAM)))(keys).astype(jnp.int32)


def arrange(plan: DecodePlan, by_rank: Array) -> jax.Array:
  """Positions by rank, int [B, S], under the plan's rule, int32 [B, S].

  Positions of a lower stage come first, each stage in the order given; then the tokens of every
  raster group are put into raster order. The plan's known tokens, of the first ranks, stay.
  """
  by_rank = jnp.asarray(by_rank, jnp.int32)
  sort = lambda key: jnp.take_along_axis(by_rank, jnp.argsort(key, axis=1, stable=True), axis=1)
  if plan.stages is not None:
    known = np.arange(by_rank.shape[1]) < plan.rows[0].num_known
    by_rank = sort(jnp.where(known, -1, jnp.asarray(plan.stages, jnp.int32)[by_rank]))
  if plan.raster_groups:
    size = plan.config.seq_len
    group, raster = np.arange(size, dtype=np.int32), np.zeros(size, np.int32)
    for start, end in plan.raster_groups:
      group[start:end], raster[start:end] = start, 1
    by_rank = sort(group * size + raster * by_rank)
  return by_rank


def empty_state(
  plan: DecodePlan, tokens: jax.Array, by_rank: jax.Array, dtype: DTypeLike
) -> DecodeState:
  """The state before the first iteration.

  Args:
    plan: what will be run: says which caches are needed.
    tokens: float32 [B, S, C], zero where unknown.
    by_rank: int32 [B, S], as `arrange` gives it.
    dtype: of the transformer's activations, and so of the caches.
  """
  config, halves = plan.config, plan.cache_halves
  state = DecodeState(tokens, by_rank)
  if not halves:
    return state
  batch, num_tokens = tokens.shape[0], config.num_tokens
  wide = config.decoder_embed_dim
  sequences = halves * batch
  attention = lambda: jnp.zeros((sequences, num_tokens)) if plan.carries_scores else None
  return dataclasses.replace(
    state,
    encoder_cache=empty_cache(
      config.encoder_depth, sequences, num_tokens, config.encoder_embed_dim, dtype
    ),
    decoder_cache=empty_cache(config.decoder_depth, sequences, num_tokens, wide, dtype),
    decoder_input=jnp.zeros((sequences, num_tokens, wide), dtype),
    difference=jnp.zeros((batch, config.seq_len, wide), dtype) if plan.stores_difference else None,
    encoder_carried=attention(),
    decoder_carried=attention(),
  )


def state_specs(plan: DecodePlan, axis: str) -> DecodeState:
  """How a state is laid out over a mesh axis of devices that decode images of their own.

  The sequences of a device's caches are its images' guidance halves; nobody else looks at them.
  """
  state = jax.eval_shape(
    lambda: empty_state(plan, jnp.zeros((1, 1, 1)), jnp.zeros((1, 1), jnp.int32), jnp.float32)
  )
  data = lambda tree: jax.tree.map(lambda _: PartitionSpec(axis), tree)
  caches = lambda tree: jax.tree.map(lambda _: PartitionSpec(None, axis), tree)
  return dataclasses.replace(
    data(state),
    encoder_cache=caches(state.encoder_cache),
    decoder_cache=caches(state.decoder_cache),
  )


def plan_rows(plan: DecodePlan) -> tuple[Rows, Tables]:
  """A plan's rows and tables as device data (numpy)."""
  lengths = [len(p.timesteps) for p in plan.processes]
  longest = max(lengths)
  padded = [
    jax.tree.map(lambda x: np.pad(x, (0, longest - len(x))), p.coefficients())
    for p in plan.processes
  ]
  columns: dict[str, list[float]] = {
    field.name: [getattr(row, field.name) for row in plan.rows]
    for field in dataclasses.fields(Rows)
    if field.name != "diffusion_steps"
  }
  columns["diffusion_steps"] = [plan.diffusion_steps(row) for row in plan.rows]
  rows = Rows(
    **{k: np.asarray(v, np.float32 if k == "cfg" else np.int32) for k, v in columns.items()}
  )
  coefficients = jax.tree.map(lambda *x: np.stack(x), *padded)
  return rows, Tables(coefficients, np.asarray(plan.temperature, np.float32))


def chunks(rows: Rows, size: int) -> Iterator[tuple[int, Rows]]:
  """Splits rows into (rows done after it, chunk of exactly `size` rows), the last one padded."""
  total = len(rows.shape_id)
  for start in range(0, total, size):
    end = min(start + size, total)
    pad = size - (end - start)
    chunk = jax.tree.map(lambda x, s=start, e=end, p=pad: np.pad(x[s:e], (0, p)), rows)
    if pad:
      chunk.shape_id[-pad:] = IDLE
    yield end, chunk
