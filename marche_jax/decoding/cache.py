"""The KV cache and attention over it.

A cache is explicit state: one array of keys and one of values for every stack, which an iteration
takes, updates in place and hands on. What a full iteration computes is written as one block, what a
selective one computes is scattered; attention then reads the layer as a whole. `merged_attention`
is the other way, that of MARché: an active and a cached part, attended apart and merged by an
online softmax. It is what a scout pass uses, whose keys and values must not stay.

Tokens lie by **rank**: the buffer tokens, then the image tokens in the order in which they are
revealed. Attention does not care about order, and so the known tokens, those generated last and
those generated now are each one contiguous range, the same one in all images.

Shapes: L layers, X sequences (guidance halves times images), N = buffer + S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from marche_jax.models.mar import attention_logits


@flax.struct.dataclass
class KVCache:
  """Keys and values of one stack, each [L, X, N, width] (heads are split where they are used)."""

  k: jax.Array
  v: jax.Array

  def read(self, layer: jax.Array, sequences: int, ranks: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values of a layer: of the first sequences and ranks, each [X, n, width]."""
    size, at = (1, sequences, ranks, self.k.shape[-1]), (layer, 0, 0, 0)

    def get(x: jax.Array) -> jax.Array:
      return _row_major(jax.lax.dynamic_slice(_row_major(x), at, size))[0]

    return get(self.k), get(self.v)

  def write(self, layer: jax.Array, k: jax.Array, v: jax.Array) -> KVCache:
    """Stores keys and values [X, n, width] of a layer's first n ranks.

    Sequences beyond the cache's are dropped: with a condition cache only the conditional half has
    one.
    """
    sequences = self.k.shape[1]
    at = (layer, 0, 0, 0)

    def put(to: jax.Array, x: jax.Array) -> jax.Array:
      return jax.lax.dynamic_update_slice(_row_major(to), _row_major(x[None, :sequences]), at)

    return KVCache(put(self.k, k), put(self.v, v))

  def scatter(self, layer: jax.Array, ranks: jax.Array, k: jax.Array, v: jax.Array) -> KVCache:
    """Stores keys and values [X, A, width] at ranks int [X, A]; those out of range drop."""
    sequence = jnp.arange(ranks.shape[0])[:, None]
    put = lambda to, x: to.at[layer, sequence, ranks].set(x, mode="drop")
    return KVCache(put(self.k, k), put(self.v, v))


def _row_major(x: jax.Array) -> jax.Array:
  """Pins the layout: a TPU would write in one and read in another, and copy all in between."""
  return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def empty_cache(
  layers: int, sequences: int, num_tokens: int, width: int, dtype: DTypeLike
) -> KVCache:
  """A cache of zeros."""
  shape = (layers, sequences, num_tokens, width)
  return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def merged_attention(
  q: jax.Array, parts: Sequence[tuple[jax.Array, jax.Array, jax.Array]], heads: int
) -> jax.Array:
  """Attention over the union of parts, merged by an online softmax (arXiv 2506.12035).

  Equal to attention over the concatenated keys; no array of the union is built. At least one key
  must be valid in every sequence.

  Args:
    q: queries [X, Nq, width], heads packed in the last axis.
    parts: (keys [X, Nk, width], values [X, Nk, width], valid bool [X or 1, Nk]) of each.
    heads: number of heads.

  Returns:
    [X, Nq, width].
  """
  best = jnp.full((q.shape[0], heads, q.shape[1], 1), -jnp.inf)
  total, out = jnp.zeros_like(best), jnp.zeros((*q.shape[:2], heads, q.shape[-1] // heads))
  for k, v, valid in parts:
    logits = attention_logits(q, k, heads, valid)
    top = jnp.maximum(best, logits.max(axis=-1, keepdims=True))
    safe = jnp.where(jnp.isfinite(top), top, 0.0)  # nothing valid so far
    weights, scale = jnp.exp(logits - safe), jnp.exp(best - safe)
    split_v = v.reshape(*v.shape[:2], heads, -1)
    part = jnp.einsum(
      "bhqk,bkhd->bqhd", weights.astype(v.dtype), split_v, preferred_element_type=jnp.float32
    )
    out = out * scale.swapaxes(1, 2) + part
    total, best = total * scale + weights.sum(axis=-1, keepdims=True), top
  return (out / total.swapaxes(1, 2)).astype(q.dtype).reshape(q.shape)
