"""The encoder and the decoder of one iteration, over a state and its caches.

The first two things that an iteration does in `sampler.py`, which says what they are for. Shapes as
in `state.py`, and H guidance halves of z, P slots for tokens predicted.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from marche_jax.config import ModelConfig
from marche_jax.decoding.stack import ActiveSet, Span, run_stack, store, take, take_active
from marche_jax.decoding.state import DecodeState, Rows
from marche_jax.models.mar import MAR, make_block
from marche_jax.models.params import Params
from marche_jax.planning.shapes import StackShape, StepShape


@dataclasses.dataclass(frozen=True, eq=False)
class Transformer:
  """Both stacks of a MAR, as decoding runs them."""

  params: Params
  config: ModelConfig
  dtype: DTypeLike  # of activations

  def apply(self, *args: jax.Array, method: str) -> jax.Array:
    """A method of `MAR`."""
    return MAR(self.config, self.dtype).apply({"params": self.params}, *args, method=method)

  def run_encoder(
    self, shape: StackShape, row: Rows, state: DecodeState, embedding: jax.Array
  ) -> tuple[DecodeState, jax.Array, ActiveSet | None]:
    """Known tokens through the encoder, to the decoder's input.

    Args:
      shape: of the encoder.
      row: of the iteration.
      state: before it.
      embedding: class embedding [X, De].

    Returns:
      The state, with the encoder's cache; the decoder's input of all tokens [X, N, Dd]; and which
      of them the encoder recomputed (None: all that it sees).
    """
    batch, sequences = state.tokens.shape[0], embedding.shape[0]
    config, apply = self.config, self.apply
    slots, buffer = shape.slots, config.buffer_size
    valid = jnp.arange(slots) < row.num_known
    positions = state.by_rank[:, :slots]  # of the known tokens
    known = jnp.take_along_axis(state.tokens, positions[..., None], axis=1)
    repeat = lambda x: jnp.tile(x, (sequences // batch,) + (1,) * (x.ndim - 1))

    x = apply(repeat(known), repeat(positions), embedding, method="encoder_input")
    previous = buffer + row.num_known - row.num_previous  # rank of the first
    span = Span(
      valid=jnp.concatenate([jnp.ones(buffer, bool), valid]),
      first_forced=previous,
      num_forced=row.num_previous,
      num_active=row.encoder_active,
      first_carried=previous,
      num_carried=row.num_previous,
    )
    run = run_stack(
      make_block(config, "encoder", self.dtype), self.params["encoder_blocks"], shape, span,
      x, state.encoder_cache, state.encoder_carried, depth=config.encoder_depth, buffer=buffer,
    )  # fmt: skip
    embedded = apply(run.x, method="decoder_embedding")

    # By rank: the buffer and the known tokens are embedded, the others are mask tokens.
    where = apply(repeat(state.by_rank), method="decoder_positions")
    if run.active is None:
      masked = apply(repeat(state.by_rank), method="masked_input")
      visible = embedded + where[:, : buffer + slots]
      is_known = (jnp.arange(config.seq_len) < row.num_known)[:, None]
      padded = jnp.pad(visible[:, buffer:], ((0, 0), (0, config.seq_len - slots), (0, 0)))
      x = jnp.concatenate([visible[:, :buffer], jnp.where(is_known, padded, masked)], axis=1)
    else:
      assert state.decoder_input is not None
      sequence, ranks = jnp.arange(sequences)[:, None], run.active.ranks_or(where.shape[1])
      visible = embedded + take_active(where, run.active)
      x = state.decoder_input[:sequences].at[sequence, ranks].set(visible, mode="drop")
    stored = state.decoder_input
    if stored is not None:
      stored = x[: len(stored)] if sequences >= len(stored) else stored.at[:sequences].set(x)
    state = dataclasses.replace(
      state, encoder_cache=run.cache, encoder_carried=run.carried, decoder_input=stored
    )
    return state, x, run.active

  def run_decoder(
    self, shape: StackShape, row: Rows, state: DecodeState, x: jax.Array, num_asked: int
  ) -> tuple[DecodeState, jax.Array, ActiveSet | None]:
    """The decoder's input of all tokens [X, N, Dd] -> its output before the final norm.

    In the last layer only the tokens asked for need queries and the feed-forward.

    Args:
      shape, row, state: as in `run_encoder`; the shape is the decoder's.
      x: decoder input.
      num_asked: tokens asked for, by rank from the first to be predicted.

    Returns:
      The state, with the decoder's cache; output [X, num_asked, Dd]; and which tokens the decoder
      recomputed (None: all).
    """
    config, params = self.config, self.params["decoder_blocks"]
    block = make_block(config, "decoder", self.dtype)
    buffer, depth = config.buffer_size, config.decoder_depth
    now = buffer + row.num_known  # rank of the first token predicted
    span = Span(
      valid=None,
      first_forced=now - row.num_previous,
      num_forced=row.num_previous + row.num_predict,
      num_active=row.decoder_active,
      first_carried=now,
      num_carried=row.num_predict,
    )
    run = run_stack(
      block, params, shape, span, x, state.decoder_cache, state.decoder_carried,
      depth=depth - 1, buffer=buffer,
    )  # fmt: skip

    apply = functools.partial(block.apply, {"params": jax.tree.map(lambda p: p[depth - 1], params)})
    k, v = apply(run.x, method="keys_values")
    k, v, cache = store(run.cache, jnp.int32(depth - 1), run.active, k, v, x.shape[1])
    x = take(run.x, run.active, now + jnp.arange(num_asked))
    x = apply(x, apply(x, method="queries"), k, v, None, method="attend")
    x = apply(x, method="feed_forward")
    state = dataclasses.replace(state, decoder_cache=cache, decoder_carried=run.carried)
    return state, x, run.active


def apply_difference(
  shape: StepShape, row: Rows, state: DecodeState, x: jax.Array
) -> tuple[DecodeState, jax.Array]:
  """Stores or applies the difference of the halves; [X, num_asked, Dd] -> [H * B, P, Dd]."""
  batch, slots = state.tokens.shape[0], shape.head.slots
  if shape.difference:
    assert state.difference is not None
    ranks = row.num_known + jnp.arange(x.shape[1])
    found = x[batch:] - x[:batch]
    difference = state.difference.at[:, ranks].set(found, mode="drop")
    state = dataclasses.replace(state, difference=difference)
  x = x[:, :slots]
  if shape.guided and shape.halves == 1:
    assert state.difference is not None
    ranks = jnp.minimum(row.num_known + jnp.arange(slots), state.difference.shape[1] - 1)
    x = jnp.concatenate([x, x + state.difference[:, ranks]])
  return state, x
