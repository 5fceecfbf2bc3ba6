"""The encoder and the decoder of one iteration, over a state and its caches.

Steps 1 and 2 of `sampler.py`, which says what they are for. Shapes as in `state.py`, and
A tokens recomputed, H guidance halves of z, P tokens predicted.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from marche_jax.config import ModelConfig
from marche_jax.decoding.stack import Span, run_stack, take
from marche_jax.decoding.state import DecodeState, Rows
from marche_jax.models.mar import MAR, make_block
from marche_jax.models.params import Params, subtree
from marche_jax.planning.shapes import StackShape, StepShape


class Recomputed(NamedTuple):
  """Which tokens a stack recomputed, and why."""

  index: Any  # int32 [X, A]: positions by rank; None: all
  active: Any  # bool [A]: the slot holds a token; None: all
  scores: Any  # float32 [X, M]: what chose them; None: nothing did


@dataclasses.dataclass(frozen=True, eq=False)
class Transformer:
  """Both stacks of a MAR, as decoding runs them."""

  params: Params
  config: ModelConfig
  dtype: Any  # of activations

  def apply(self, *args: Any, method: str) -> Any:
    """A method of `MAR`."""
    return MAR(self.config, self.dtype).apply({"params": self.params}, *args, method=method)

  def run_encoder(
    self, shape: StackShape, row: Rows, state: DecodeState, embedding: jax.Array
  ) -> tuple[DecodeState, jax.Array, Recomputed]:
    """Steps 1 and 2a: known tokens through the encoder to the decoder's input.

    Args:
      shape: of the encoder.
      row: of the iteration.
      state: before it.
      embedding: class embedding [X, De].

    Returns:
      The state, with the encoder's cache; the decoder's input of all positions [X, N, Dd]; and
      which tokens were recomputed.
    """
    batch, sequences = state.tokens.shape[0], embedding.shape[0]
    config, apply = self.config, self.apply
    slots, buffer = shape.slots, config.buffer_size
    positions = state.by_rank
    valid = jnp.arange(slots) < row.num_known
    known = jnp.take_along_axis(state.tokens, positions[:, :slots, None], axis=1)
    repeat = lambda x: jnp.tile(x, (sequences // batch,) + (1,) * (x.ndim - 1))

    x = apply(repeat(known), repeat(positions[:, :slots]), embedding, method="encoder_input")
    first = buffer + row.num_known - row.num_previous
    span = Span(
      jnp.concatenate([jnp.ones(buffer, bool), valid]), first, row.num_previous, row.encoder_active,
      first, row.num_previous,
    )  # fmt: skip
    run = run_stack(
      make_block(config, "encoder", self.dtype), subtree(self.params, "encoder_blocks"), shape,
      span, x, state.encoder_cache, None if state.scores is None else state.scores[0],
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
    state = dataclasses.replace(state, encoder_cache=run.cache, decoder_input=stored, scores=scores)
    return state, x, Recomputed(run.index, run.active, run.selected_by)

  def run_decoder(
    self, shape: StackShape, row: Rows, state: DecodeState, x: jax.Array, asked: int
  ) -> tuple[DecodeState, jax.Array, Recomputed]:
    """Step 2b: the decoder's input of all positions [X, N, Dd] -> its output before the final norm.

    In the last layer only the tokens asked for need queries and the feed-forward.

    Args:
      shape, row, state: as in `run_encoder`; the shape is the decoder's.
      x: decoder input.
      asked: number of tokens asked for, in rank order from the first to be predicted.

    Returns:
      The state, with the decoder's cache; output [X, asked, Dd]; which tokens were recomputed.
    """
    config, params = self.config, subtree(self.params, "decoder_blocks")
    block = make_block(config, "decoder", self.dtype)
    buffer, depth = config.buffer_size, config.decoder_depth
    sequences, positions = x.shape[:2]
    now = buffer + row.num_known
    span = Span(
      None, now - row.num_previous, row.num_previous + row.num_predict, row.decoder_active, now,
      row.num_predict,
    )  # fmt: skip
    run = run_stack(
      block, params, shape, span, x, state.decoder_cache,
      None if state.scores is None else state.scores[1], depth=depth - 1, buffer=buffer,
    )  # fmt: skip

    last, cache = jnp.int32(depth - 1), run.cache
    apply = functools.partial(block.apply, {"params": jax.tree.map(lambda p: p[depth - 1], params)})
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
    state = dataclasses.replace(state, decoder_cache=cache, scores=scores)
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
