"""One stack of blocks, over all of its tokens or over some of them against a KV cache (MARché).

Selective refresh (arXiv 2506.12035): of the tokens that a stack sees, the **active** ones are
recomputed, the others only contribute the keys and values that the cache holds of them. Active are
  1. the **forced** tokens: those generated now (in the decoder) and those generated in the previous
     iteration, whose input has just changed; the buffer tokens where a policy says so;
  2. **refresh** tokens that fill the active set, those with the highest score.

Where the scores come from (`StackShape.source`):
  'none'     nowhere: there are forced tokens only.
  'scout'    a scout pass: the forced tokens alone run up to layer `layer`; the score of a token is
             the attention that they pay to it there (mean over heads, sum over queries).
  'carried'  the same attention, paid in the previous iteration: in the decoder by the tokens
             generated then, in the encoder by its forced ones.
  'lower'    all tokens run through the layers below `layer` and its attention (their keys and
             values are all rewritten); then, before its feed-forward, the active ones go on.
With 'lower' the score may also be 'value': how much a token's values changed against the cache,
minus the cosine similarity, mean over heads (LazyMAR, arXiv 2503.12450, section 3.2).

Shapes as in `cache.py`: X sequences, M tokens that the stack sees (those of the first ranks), A
slots of the active set. Layers are counted from 1 in options, from 0 in code.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import flax.struct
import jax
import jax.numpy as jnp

from marche_jax.decoding.cache import KVCache, merged_attention
from marche_jax.decoding.state import Array
from marche_jax.models.mar import Block, attention_output, attention_weights
from marche_jax.models.params import Params
from marche_jax.planning.shapes import StackShape

Carry = TypeVar("Carry")


@flax.struct.dataclass
class Span:
  """Which tokens of a stack an iteration is about, by rank."""

  valid: jax.Array | None  # bool [M]: the stack sees a token there; None: everywhere
  first_forced: Array  # int32: rank of the first forced image token
  num_forced: Array  # int32: forced image tokens, of consecutive ranks
  num_active: Array  # int32: active tokens
  first_carried: Array  # int32: rank of the first token whose attention is carried
  num_carried: Array  # int32: tokens whose attention is carried, of consecutive ranks


@flax.struct.dataclass
class ActiveSet:
  """The tokens that are recomputed, each in a slot: the forced ones first, in order of rank."""

  ranks: jax.Array  # int32 [X, A]: of the token in every slot, without repetition
  filled: jax.Array  # bool [A]: the slot holds an active token
  shift: Array  # int32: rank of a forced image token minus its slot
  scores: jax.Array  # float32 [X, M]: what chose the refresh tokens

  def slot_of(self, rank: Array) -> Array:
    """Slots of forced image tokens, given their ranks."""
    return rank - self.shift

  def ranks_or(self, dropped: int) -> jax.Array:
    """Ranks to write the slots to, int32 [X, A]; `dropped`, out of range, for empty slots."""
    return jnp.where(self.filled, self.ranks, dropped)


@flax.struct.dataclass
class StackRun:
  """What running a stack gave."""

  x: jax.Array  # [X, A, width] by slot, or [X, M, width] by rank where all were recomputed
  cache: KVCache | None
  carried: jax.Array | None  # float32 [X, N]: attention for the next iteration's selection
  active: ActiveSet | None  # None: all tokens were recomputed


def fold_layers(
  params: Params,
  first: int,
  last: int,
  layer: Callable[[Params, jax.Array, Carry], Carry],
  carry: Carry,
) -> Carry:
  """Folds `layer(parameters of layer l, l, carry)` over a range of a stack."""

  def body(number: jax.Array, carry: Carry) -> Carry:
    one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), params)
    return layer(one, number, carry)

  return jax.lax.fori_loop(first, last, body, carry)


def take(x: jax.Array, active: ActiveSet | None, ranks: Array) -> jax.Array:
  """Tokens of a run by rank; ranks beyond its last slot give what lies there.

  Args:
    x: [X, A, ...] by slot of `active`, or [X, M, ...] by rank where that is None.
    active: of the run.
    ranks: int [P], of forced image tokens where there is an active set.

  Returns:
    [X, P, ...].
  """
  slots = ranks if active is None else active.slot_of(ranks)
  return x[:, jnp.minimum(slots, x.shape[1] - 1)]


def take_active(x: jax.Array, active: ActiveSet) -> jax.Array:
  """x by rank [X, M, ...] -> by slot [X, A, ...]."""
  return jnp.take_along_axis(x, active.ranks[..., None], axis=1)


def store(
  cache: KVCache | None,
  number: jax.Array,
  active: ActiveSet | None,
  k: jax.Array,
  v: jax.Array,
  seen: int,
) -> tuple[jax.Array, jax.Array, KVCache | None]:
  """Stores what a layer recomputed, and gives what it attends to.

  Args:
    cache: of the stack, if any; there is one with an active set.
    number: of the layer.
    active: the tokens recomputed; None: all that the stack sees.
    k, v: their keys and values, each [X, A, width] or [X, M, width].
    seen: M.

  Returns:
    Keys and values of all tokens that the stack sees, each [X, M, width]; the cache.
  """
  if active is not None:
    assert cache is not None
    cache = cache.scatter(number, active.ranks_or(cache.k.shape[2]), k, v)
    return *cache.read(number, k.shape[0], seen), cache
  return k, v, None if cache is None else cache.write(number, k, v)


def forced_ranks(shape: StackShape, span: Span, buffer: int) -> tuple[Array, jax.Array]:
  """Ranks int [F] of the forced tokens in order, and bool [F] whether there is one."""
  ranks = span.first_forced + jnp.arange(shape.forced)
  filled = jnp.arange(shape.forced) < span.num_forced
  if shape.buffer:
    ranks = jnp.concatenate([jnp.arange(buffer), ranks])
    filled = jnp.concatenate([jnp.ones(buffer, bool), filled])
  return ranks, filled


def choose(shape: StackShape, span: Span, scores: jax.Array, buffer: int) -> ActiveSet:
  """The active set: forced tokens, then those of the highest score.

  Args:
    shape: of the stack; `shape.active` is the number A of slots.
    span: of the iteration; `span.num_active` slots are filled, as far as there are tokens.
    scores: finite float [X, M].
    buffer: number of buffer tokens.
  """
  assert shape.active is not None
  rank = jnp.arange(scores.shape[1])
  end = span.first_forced + span.num_forced
  forced = (rank >= span.first_forced) & (rank < end)
  if shape.buffer:
    forced |= rank < buffer
  # Forced tokens come first, in order of rank, and that is what `slot_of` relies on: nothing else
  # is infinite, and of equal values `top_k` gives the one of the lower index first. The buffer has
  # the lowest ranks and the forced image tokens consecutive ones, so that slots follow from ranks.
  priority = jnp.where(forced, jnp.inf, scores)
  shift = span.first_forced - (buffer if shape.buffer else 0)
  num_active = span.num_active
  if span.valid is not None:
    priority = jnp.where(span.valid, priority, -jnp.inf)
    num_active = jnp.minimum(num_active, span.valid.sum())
  _, ranks = jax.lax.top_k(priority, shape.active)
  return ActiveSet(ranks, jnp.arange(shape.active) < num_active, shift, scores)


def attention_scores(
  q: jax.Array, k: jax.Array, heads: int, keys: jax.Array | None, queries: jax.Array
) -> jax.Array:
  """The attention that queries pay to keys: mean over heads, sum over queries.

  Args:
    q: [X, Nq, width].
    k: [X, Nk, width].
    heads: number of heads.
    keys: valid keys, bool [Nk]; None: all.
    queries: queries that count, bool [Nq].

  Returns:
    float32 [X, Nk].
  """
  weights = attention_weights(q, k, heads, None if keys is None else keys[None])
  return (weights.mean(axis=1) * queries[:, None]).sum(axis=1)


def value_scores(new: jax.Array, old: jax.Array, heads: int) -> jax.Array:
  """How much values [X, M, width] changed: minus their cosine similarity, mean over heads."""
  split = lambda x: x.astype(jnp.float32).reshape(*x.shape[:2], heads, -1)
  a, b = split(new), split(old)
  norm = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  return -jnp.mean((a * b).sum(axis=-1) / jnp.maximum(norm, 1e-8), axis=-1)


class Attended(NamedTuple):
  """What the attention of one layer gave, Nq queries being those of the tokens recomputed."""

  x: jax.Array  # [X, Nq, width]: the input plus what was attended
  q: jax.Array  # queries [X, Nq, width]
  k: jax.Array  # keys of all that the stack sees [X, M, width]
  weights: jax.Array  # float32 [X, heads, Nq, M]
  cache: KVCache | None  # with the new keys and values


@dataclasses.dataclass(frozen=True, eq=False)
class _Stack:
  """A stack in one iteration: what all ways of running it share."""

  block: Block  # one layer
  params: Params  # of the layers, stacked
  shape: StackShape
  span: Span
  sequences: int  # X
  seen: int  # M
  depth: int  # layers to run
  buffer: int  # buffer tokens

  def layer(self, number: int) -> Params:
    """The parameters of one layer."""
    return jax.tree.map(lambda p: p[number], self.params)

  def attend(
    self,
    one: Params,
    number: jax.Array,
    x: jax.Array,
    cache: KVCache | None,
    active: ActiveSet | None,
  ) -> Attended:
    """The attention of a layer: tokens recomputed attend to all that the stack sees.

    Args:
      one: parameters of the layer.
      number: of the layer.
      x, cache, active: as in `StackRun`.
    """
    apply = functools.partial(self.block.apply, {"params": one})
    q, k, v = apply(x, method="qkv")
    k, v, cache = store(cache, number, active, k, v, self.seen)
    keys = None if self.span.valid is None else self.span.valid[None]
    weights = attention_weights(q, k, self.block.heads, keys)
    x = apply(x, attention_output(weights, v), method="project")
    return Attended(x, q, k, weights, cache)

  def feed_forward(self, one: Params, x: jax.Array) -> jax.Array:
    """The rest of a layer, [X, Nq, width]."""
    return self.block.apply({"params": one}, x, method="feed_forward")

  def run_layers(
    self, first: int, last: int, x: jax.Array, cache: KVCache | None, active: ActiveSet | None
  ) -> tuple[jax.Array, KVCache | None]:
    """Layers first to last - 1; x, cache and active as in `StackRun`."""

    def layer(
      one: Params, number: jax.Array, carry: tuple[jax.Array, KVCache | None]
    ) -> tuple[jax.Array, KVCache | None]:
      done = self.attend(one, number, *carry, active)
      return self.feed_forward(one, done.x), done.cache

    return fold_layers(self.params, first, last, layer, (x, cache))

  def carry(
    self, done: Attended, active: ActiveSet | None, carried: jax.Array | None
  ) -> jax.Array | None:
    """Attention to carry to the next iteration, [X, N]: `carried`, replaced where it is asked."""
    if not self.shape.carried:
      return carried
    assert carried is not None
    slots = jnp.arange(self.shape.carried)
    queries = take(done.q, active, self.span.first_carried + slots)
    paid = attention_scores(
      queries, done.k, self.block.heads, self.span.valid, slots < self.span.num_carried
    )
    return carried.at[: self.sequences, : self.seen].set(paid[: carried.shape[0]])

  # ---- the tokens that are recomputed are the same in all layers

  def run(
    self,
    x: jax.Array,
    cache: KVCache | None,
    carried: jax.Array | None,
    active: ActiveSet | None,
  ) -> StackRun:
    """All layers; where attention is carried, that of layer `shape.layer` is looked at."""
    if not self.shape.carried:
      x, cache = self.run_layers(0, self.depth, x, cache, active)
      return StackRun(x, cache, carried, active)
    at = self.shape.layer - 1
    one = self.layer(at)
    x, cache = self.run_layers(0, at, x, cache, active)
    done = self.attend(one, jnp.int32(at), x, cache, active)
    carried = self.carry(done, active, carried)
    x = self.feed_forward(one, done.x)
    x, cache = self.run_layers(at + 1, self.depth, x, done.cache, active)
    return StackRun(x, cache, carried, active)

  def scores_before(self, x: jax.Array, cache: KVCache, carried: jax.Array | None) -> jax.Array:
    """Scores float32 [X, M] that are known before any layer runs: all but those of 'lower'."""
    if self.shape.source == "scout":
      return self.scout(x, cache)
    if self.shape.source == "carried":
      assert carried is not None
      return carried[: self.sequences, : self.seen]
    return jnp.zeros((self.sequences, self.seen))

  def scout(self, x: jax.Array, cache: KVCache) -> jax.Array:
    """Scores float32 [X, M] by a scout pass of the forced tokens; the cache stays as it is."""
    ranks, filled = forced_ranks(self.shape, self.span, self.buffer)
    stale = jnp.ones(self.seen, bool) if self.span.valid is None else self.span.valid
    stale = stale.at[jnp.where(filled, ranks, self.seen)].set(False, mode="drop")
    x = take(x, None, ranks)

    def layer(one: Params, number: jax.Array, x: jax.Array) -> jax.Array:
      apply = functools.partial(self.block.apply, {"params": one})
      q, k, v = apply(x, method="qkv")
      cached = (*cache.read(number, self.sequences, self.seen), stale[None])
      attended = merged_attention(q, [cached, (k, v, filled[None])], self.block.heads)
      return self.feed_forward(one, apply(x, attended, method="project"))

    last = self.shape.layer - 1
    x = fold_layers(self.params, 0, last, layer, x)
    q, k = self.block.apply({"params": self.layer(last)}, x, method="queries_keys")
    cached, _ = cache.read(jnp.int32(last), self.sequences, self.seen)
    keys = jnp.concatenate([cached, k], axis=1)
    valid = jnp.concatenate([stale, filled])
    return attention_scores(q, keys, self.block.heads, valid, filled)[:, : self.seen]

  # ---- all tokens in the lower layers, the active ones above

  def run_lower(self, x: jax.Array, cache: KVCache, carried: jax.Array | None) -> StackRun:
    """All tokens up to the attention of layer `shape.layer`, which gives the scores."""
    at = self.shape.layer - 1
    one, number = self.layer(at), jnp.int32(at)
    values = lambda cache: cache.read(number, self.sequences, self.seen)[1]
    x, below = self.run_layers(0, at, x, cache, None)
    old = values(below) if self.shape.score == "value" else None
    done = self.attend(one, number, x, below, None)
    carried = self.carry(done, None, carried)
    if old is not None:
      scores = value_scores(values(done.cache), old, self.block.heads)
    else:
      ranks, filled = forced_ranks(self.shape, self.span, self.buffer)
      of_forced = take(done.weights.mean(axis=1), None, ranks)
      scores = (of_forced * filled[:, None]).sum(axis=1)
    active = choose(self.shape, self.span, scores, self.buffer)
    x = self.feed_forward(one, take_active(done.x, active))
    x, above = self.run_layers(at + 1, self.depth, x, done.cache, active)
    return StackRun(x, above, carried, active)


def run_stack(
  block: Block,
  params: Params,
  shape: StackShape,
  span: Span,
  x: jax.Array,
  cache: KVCache | None,
  carried: jax.Array | None,
  *,
  depth: int,
  buffer: int,
) -> StackRun:
  """Runs the first `depth` layers of a stack.

  Args:
    block: one layer.
    params: of the layers, stacked.
    shape: static: which tokens are recomputed.
    span: of the iteration.
    x: input of all tokens that the stack sees, [X, M, width].
    cache: of the stack; None: nothing is kept, and all tokens are recomputed.
    carried: attention from the previous iteration, float32 [X, N]; None without such.
    depth: layers to run.
    buffer: number of buffer tokens.
  """
  sequences, seen = x.shape[:2]
  stack = _Stack(block, params, shape, span, sequences, seen, depth, buffer)
  if shape.active is None:
    return stack.run(x, cache, carried, None)
  assert cache is not None
  if shape.source == "lower":
    return stack.run_lower(x, cache, carried)
  active = choose(shape, span, stack.scores_before(x, cache, carried), buffer)
  return stack.run(take_active(x, active), cache, carried, active)
