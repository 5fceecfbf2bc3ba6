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

Shapes as in `cache.py`: X sequences, M tokens that the stack sees (buffer first, in rank order), A
active ones. Layers are counted from 1 in options, from 0 in code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from marche_jax.decoding.cache import KVCache, merged_attention
from marche_jax.models.mar import Block, Params, attention_output, attention_weights
from marche_jax.planning.shapes import StackShape


@flax.struct.dataclass
class Span:
  """Which tokens of a stack an iteration is about; positions count from the first buffer token."""

  valid: Any  # bool [M]: the stack sees a token there; None: everywhere
  first: Any  # int32: position of the first forced image token
  forced: Any  # int32: number of forced image tokens, which are consecutive
  count: Any  # int32: number of active tokens
  carried_first: Any  # int32: first of the tokens whose attention is carried to the next iteration
  carried: Any  # int32: number of them


@flax.struct.dataclass
class StackRun:
  """What running a stack gave."""

  x: Any  # [X, A or M, width]
  index: Any  # int32 [X, A]: positions of x; None: all, in order
  active: Any  # bool [A]: the slot holds an active token; None: all
  cache: KVCache | None
  scores: Any  # float32 [X, N] to carry; None where nothing is carried
  selected_by: Any = None  # float32 [X, M]: the scores that chose the active tokens; None: none


def run_layers(params: Params, first: int, last: int, layer: Callable, carry: Any) -> Any:
  """Folds `layer(parameters of layer l, l, carry)` over a range of a stack."""

  def body(index: jax.Array, carry: Any) -> Any:
    one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), params)
    return layer(one, index, carry)

  return jax.lax.fori_loop(first, last, body, carry)


def take(x: jax.Array, index: jax.Array) -> jax.Array:
  """x [X, M, ...] at positions int [X, A] (or [A], the same everywhere): [X, A, ...]."""
  if index.ndim == 1:
    return x[:, index]
  return jnp.take_along_axis(x, index[..., None], axis=1)


def forced_positions(shape: StackShape, span: Span, buffer: int) -> tuple[jax.Array, jax.Array]:
  """Positions int [F] of the forced tokens, and bool [F] whether a slot holds one."""
  image = span.first + jnp.arange(shape.forced)
  valid = jnp.arange(shape.forced) < span.forced
  if shape.buffer:
    image = jnp.concatenate([jnp.arange(buffer), image])
    valid = jnp.concatenate([jnp.ones(buffer, bool), valid])
  return image, valid


def choose(
  shape: StackShape, span: Span, scores: jax.Array, buffer: int
) -> tuple[jax.Array, jax.Array]:
  """The active set: forced tokens first, in order, then those of the highest score.

  Args:
    shape: of the stack; `shape.active` is the number A of slots.
    span: of the iteration; `span.count` of the slots are filled, as far as there are tokens.
    scores: finite float [X, M].
    buffer: number of buffer tokens.

  Returns:
    int32 [X, A], positions without repetition; bool [A], whether the slot is filled.
  """
  assert shape.active is not None
  position = jnp.arange(scores.shape[1])
  forced = (position >= span.first) & (position < span.first + span.forced)
  if shape.buffer:
    forced |= position < buffer
  priority = jnp.where(forced, jnp.inf, scores)
  count = span.count
  if span.valid is not None:
    priority = jnp.where(span.valid, priority, -jnp.inf)
    count = jnp.minimum(count, span.valid.sum())
  _, index = jax.lax.top_k(priority, shape.active)  # of equal ones, the lower position first
  return index, jnp.arange(shape.active) < count


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


def _scout(
  block: Block,
  params: Params,
  shape: StackShape,
  span: Span,
  x: jax.Array,
  cache: KVCache,
  buffer: int,
) -> jax.Array:
  """Scores float32 [X, M] by a scout pass of the forced tokens; the cache stays as it is."""
  sequences, seen = x.shape[:2]
  position, filled = forced_positions(shape, span, buffer)
  stale = jnp.ones(seen, bool) if span.valid is None else span.valid
  stale = stale.at[jnp.where(filled, position, seen)].set(False, mode="drop")
  x = take(x, jnp.minimum(position, seen - 1))

  def layer(one: Params, number: jax.Array, x: jax.Array) -> jax.Array:
    apply = functools.partial(block.apply, {"params": one})
    q, k, v = apply(x, method="qkv")
    cached = (*cache.read(number, sequences, seen), stale[None])
    attended = merged_attention(q, [cached, (k, v, filled[None])], block.heads)
    x = apply(x, attended, method="project")
    return apply(x, method="feed_forward")

  last = shape.layer - 1
  x = run_layers(params, 0, last, layer, x)
  apply = functools.partial(block.apply, {"params": jax.tree.map(lambda p: p[last], params)})
  q, k = apply(x, method="queries_keys")
  cached, _ = cache.read(jnp.int32(last), sequences, seen)
  keys = jnp.concatenate([cached, k], axis=1)
  valid = jnp.concatenate([stale, filled])
  return attention_scores(q, keys, block.heads, valid, filled)[:, :seen]


def run_stack(
  block: Block,
  params: Params,
  shape: StackShape,
  span: Span,
  x: jax.Array,
  cache: KVCache | None,
  scores: jax.Array | None,
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
    scores: carried from the previous iteration, float32 [X, N]; None without such.
    depth: layers to run.
    buffer: number of buffer tokens.
  """
  sequences, seen = x.shape[:2]
  keys = None if span.valid is None else span.valid[None]
  index = active = found = None
  selective, lower = shape.active is not None, shape.source == "lower"
  if selective and not lower:
    assert cache is not None
    if shape.source == "scout":
      found = _scout(block, params, shape, span, x, cache, buffer)
    elif shape.source == "carried":
      assert scores is not None
      found = scores[:sequences, :seen]
    priority = jnp.zeros((sequences, seen)) if found is None else found
    index, active = choose(shape, span, priority, buffer)
    x = take(x, index)

  def attend(
    one: Params, number: jax.Array, x: jax.Array, cache: KVCache | None
  ) -> tuple[jax.Array, ...]:
    """Attention of a layer: (x, queries, all keys, weights, the cache with the new rows)."""
    apply = functools.partial(block.apply, {"params": one})
    q, k, v = apply(x, method="qkv")
    if cache is not None:
      if index is None or active is None:
        cache = cache.write(number, k, v)
      else:
        places = jnp.where(active, index, cache.k.shape[2])  # out of range: dropped
        cache = cache.scatter(number, places, k, v)
        k, v = cache.read(number, sequences, seen)
    weights = attention_weights(q, k, block.heads, keys)
    return apply(x, attention_output(weights, v), method="project"), q, k, weights, cache  # type: ignore[return-value]

  def layer(one: Params, number: jax.Array, carry: Any) -> Any:
    x, _, _, _, cache = attend(one, number, *carry)
    return block.apply({"params": one}, x, method="feed_forward"), cache

  at = shape.layer - 1  # the layer where attention is looked at
  if not (shape.carried or (selective and lower)):
    x, cache = run_layers(params, 0, depth, layer, (x, cache))
    return StackRun(x, index, active, cache, scores, found)

  x, cache = run_layers(params, 0, at, layer, (x, cache))
  one = jax.tree.map(lambda p: p[at], params)
  if selective and lower and shape.score == "value":
    assert cache is not None
    _, old = cache.read(jnp.int32(at), sequences, seen)
  x, q, k, weights, cache = attend(one, jnp.int32(at), x, cache)  # type: ignore[assignment]
  if shape.carried:
    assert scores is not None
    slots = jnp.arange(shape.carried)
    asked = span.carried_first + slots
    if index is not None:  # forced tokens come first, in order
      asked += (buffer if shape.buffer else 0) - span.first
    queries = take(q, jnp.clip(asked, 0, q.shape[1] - 1))
    paid = attention_scores(queries, k, block.heads, span.valid, slots < span.carried)
    scores = scores.at[:sequences, :seen].set(paid[: scores.shape[0]])
  if selective and lower:
    if shape.score == "value":
      assert cache is not None
      _, new = cache.read(jnp.int32(at), sequences, seen)
      found = value_scores(new, old, block.heads)
    else:
      position, filled = forced_positions(shape, span, buffer)
      of_forced = take(weights.mean(axis=1), jnp.minimum(position, seen - 1))
      found = (of_forced * filled[:, None]).sum(axis=1)
    index, active = choose(shape, span, found, buffer)
    x = take(x, index)
  x = block.apply({"params": one}, x, method="feed_forward")
  x, cache = run_layers(params, at + 1, depth, layer, (x, cache))
  return StackRun(x, index, active, cache, scores, found)
