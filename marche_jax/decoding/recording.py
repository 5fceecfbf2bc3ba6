"""The trace: what decoding did, recorded for whoever looks at it (`visualization/trace.py`, tests).

`sampler.decode` traces only where it is asked to; otherwise nothing of this is in the program.
Shapes as in `state.py`; H guidance halves of z, P slots for tokens predicted.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from marche_jax.config import ModelConfig
from marche_jax.decoding.activity import CACHED, NOW, PREVIOUS, REFRESHED, UNSEEN
from marche_jax.decoding.stack import ActiveSet
from marche_jax.decoding.state import Array, Rows


@flax.struct.dataclass
class Trace:
  """What an iteration did, zero where nothing was predicted; each with leading [R] in the end."""

  z: Array | None  # float32 [H, B, S, D]; H = 1 or 2, the conditional half first
  sampled: Array  # float32 [B, S, C]
  activity: Array  # int32 [2, B, N] by rank: `Activity` in encoder and decoder (cond. half)
  scores: Array  # float32 [2, B, N] by rank: what chose the refresh (cond. half); 0: nothing did


def empty_trace(config: ModelConfig, guided: bool, batch: int) -> Trace:
  """A trace of nothing, of `batch` images."""
  halves = 2 if guided else 1
  return Trace(
    z=jnp.zeros((halves, batch, config.seq_len, config.decoder_embed_dim)),
    sampled=jnp.zeros((batch, config.seq_len, config.token_dim)),
    activity=jnp.zeros((2, batch, config.num_tokens), jnp.int32),
    scores=jnp.zeros((2, batch, config.num_tokens)),
  )


def trace_iteration(
  config: ModelConfig,
  row: Rows,
  batch: int,
  active: Sequence[ActiveSet | None],
  positions: jax.Array,
  z: jax.Array,
  sampled: jax.Array,
) -> Trace:
  """The trace of an iteration.

  Args:
    config: of the model.
    row: of the iteration.
    batch: number of images.
    active: what encoder and decoder recomputed.
    positions: of the tokens predicted, int [B, P]; out of range: none.
    z: there, float32 [H, B, P, Dd].
    sampled: tokens there, float32 [B, P, C].
  """
  images = jnp.arange(batch)[:, None]

  def scatter(x: jax.Array) -> jax.Array:
    empty = jnp.zeros((batch, config.seq_len, x.shape[-1]))
    return empty.at[images, positions].set(x, mode="drop")

  seen = (config.buffer_size + row.num_known, jnp.int32(config.num_tokens))
  return Trace(
    z=jax.vmap(scatter)(z),
    sampled=scatter(sampled),
    activity=jnp.stack([_activity(config, row, batch, a, n) for a, n in zip(active, seen)]),
    scores=jnp.stack([_scores(config, batch, a, n) for a, n in zip(active, seen)]),
  )


def _activity(
  config: ModelConfig, row: Rows, batch: int, active: ActiveSet | None, seen: jax.Array
) -> jax.Array:
  """What every token was to a stack, int32 [B, N] by rank."""
  rank = jnp.arange(config.num_tokens)
  shape = (batch, config.num_tokens)
  if active is None:
    found = jnp.full(shape, REFRESHED)
  else:
    images, ranks = jnp.arange(batch)[:, None], active.ranks_or(config.num_tokens)[:batch]
    found = jnp.full(shape, CACHED).at[images, ranks].set(REFRESHED, mode="drop")
  now = config.buffer_size + row.num_known
  recomputed = found == REFRESHED  # a forced token that is not would be a bug, and would show
  found = jnp.where(recomputed & (rank >= now - row.num_previous) & (rank < now), PREVIOUS, found)
  found = jnp.where(recomputed & (rank >= now) & (rank < now + row.num_predict), NOW, found)
  return jnp.where(rank < seen, found, UNSEEN)


def _scores(
  config: ModelConfig, batch: int, active: ActiveSet | None, seen: jax.Array
) -> jax.Array:
  """What chose the refresh in a stack, float32 [B, N] by rank; zero where nothing did."""
  if active is None:
    return jnp.zeros((batch, config.num_tokens))
  found = active.scores[:batch]
  found = jnp.pad(found, ((0, 0), (0, config.num_tokens - found.shape[1])))
  return jnp.where(jnp.arange(config.num_tokens) < seen, found, 0.0)
