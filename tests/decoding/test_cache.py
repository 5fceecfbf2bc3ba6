"""The KV cache: attention in parts against attention over everything, and what is written where."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import exact_matmuls as exact_matmuls
from golden import quick_jit
from hypothesis import given, settings
from hypothesis import strategies as st

from marche_jax.decoding.cache import KVCache, empty_cache, merged_attention
from marche_jax.models.mar import attention_output, attention_weights

TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2}

# (sequences, heads, head width, queries, keys of every part): few, since each is compiled
SIZES = ((1, 1, 4, 1, (1,)), (2, 3, 2, 5, (4, 3)), (3, 2, 8, 2, (1, 9)), (2, 2, 4, 3, (2, 5, 6)))

merged = quick_jit(merged_attention, static_argnames="heads")


@quick_jit
def scattered(cache: KVCache, ranks: jax.Array, k: jax.Array, v: jax.Array) -> KVCache:
  return cache.scatter(jnp.int32(1), ranks, k, v)


def attention(q, k, v, heads, valid):
  """Attention over all keys at once, in float64 [X, Nq, width]."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  split = lambda x: x.reshape(*x.shape[:2], heads, -1)
  logits = np.einsum("bqhd,bkhd->bhqk", split(q), split(k)) / np.sqrt(q.shape[-1] // heads)
  logits = np.where(valid[:, None, None], logits, -np.inf)
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
  weights /= weights.sum(axis=-1, keepdims=True)
  return np.einsum("bhqk,bkhd->bqhd", weights, split(v)).reshape(q.shape)


@st.composite
def problems(draw):
  """(heads, queries, parts), every sequence with a valid key somewhere, some parts with none."""
  sequences, heads, width, queries, sizes = draw(st.sampled_from(SIZES))
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  scale = draw(st.sampled_from([0.1, 1.0, 2.0]))  # of queries: flat and sharp attention
  normal = lambda n: rng.standard_normal((sequences, n, heads * width)).astype(np.float32)
  empty = draw(st.integers(-1, len(sizes) - 1)) if len(sizes) > 1 else -1
  parts = [
    (normal(n), normal(n), rng.random((sequences, n)) < (0 if i == empty else 0.6))
    for i, n in enumerate(sizes)
  ]
  kept = (empty + 1) % len(sizes)
  parts[kept][2][:, rng.integers(sizes[kept])] = True
  return heads, scale * normal(queries), parts


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(deadline=None, max_examples=60)
@given(problems())
def test_attention_in_parts_is_attention_over_all(dtype, problem):
  heads, q, parts = problem
  q = jnp.asarray(q, dtype)
  parts = [(jnp.asarray(k, dtype), jnp.asarray(v, dtype), valid) for k, v, valid in parts]
  ours = merged(q, parts, heads=heads)
  assert ours.dtype == dtype
  k, v, valid = (np.concatenate(x, axis=1) for x in zip(*parts))
  expected = attention(q, k, v, heads, valid)
  np.testing.assert_allclose(np.float64(ours), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(deadline=None, max_examples=8)
@given(st.data())
def test_attention_of_any_size_in_parts(dtype, data):
  """As above, sizes drawn too, up to those of MAR-B, compiled as users' programs are."""
  size = lambda most: data.draw(st.integers(1, most))
  sequences, heads, width, queries = size(2), size(12), size(64), size(64)
  sizes = data.draw(st.lists(st.integers(1, 256), min_size=1, max_size=3))
  rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
  normal = lambda n: jnp.asarray(rng.standard_normal((sequences, n, heads * width)), dtype)
  q, parts = normal(queries), [(normal(n), normal(n), rng.random((sequences, n))) for n in sizes]
  share = data.draw(st.floats(0, 1))
  parts = [(k, v, chance < share) for k, v, chance in parts]
  parts[0][2][:, rng.integers(sizes[0])] = True
  ours = jax.jit(merged_attention, static_argnums=2)(q, parts, heads)
  k, v, valid = (np.concatenate(x, axis=1) for x in zip(*parts))
  expected = attention(q, k, v, heads, valid)
  np.testing.assert_allclose(np.float64(ours), expected, rtol=0, atol=TOLERANCE[dtype])


@settings(deadline=None, max_examples=30)
@given(problems())
def test_invalid_keys_are_never_attended(problem):
  """Whatever they hold, the result is the same to the bit."""
  heads, q, parts = problem
  expected = merged(q, parts, heads=heads)
  spoilt = []
  for k, v, valid in parts:
    huge = np.where(np.arange(k.shape[-1]) % 2, 3e38, -3e38).astype(np.float32)
    spoil = lambda x, valid=valid, huge=huge: np.where(valid[..., None], x, huge)
    spoilt.append((spoil(k), spoil(v), valid))
  np.testing.assert_array_equal(merged(q, spoilt, heads=heads), expected)
  k, v, valid = (np.concatenate(x, axis=1) for x in zip(*spoilt))
  whole = attention_output(attention_weights(q, k, heads, valid), v)
  np.testing.assert_allclose(whole, expected, rtol=0, atol=2e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_scattering_the_active_part_and_attending_once_is_the_same(seed, filled):
  """The two ways to attend: active and cached parts merged, or one buffer that is updated."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  cache = KVCache(*(jnp.asarray(normal(2, 2, 9, 6)) for _ in range(2)))
  index = np.stack([rng.permutation(9)[:4] for _ in range(2)])
  active = np.arange(4) < filled
  q, k, v = normal(2, 3, 6), normal(2, 4, 6), normal(2, 4, 6)
  stale = np.ones((2, 9), bool)
  np.put_along_axis(stale, index[:, :filled], False, axis=1)
  old = cache.read(jnp.int32(1), 2, 9)
  parts = [(*old, stale), (k, v, np.broadcast_to(active, (2, 4)))]
  expected = merged(q, parts, heads=3)
  updated = scattered(cache, np.where(active, index, 9), k, v)
  weights = attention_weights(q, updated.k[1], 3, None)
  np.testing.assert_allclose(
    attention_output(weights, updated.v[1]), expected, rtol=0, atol=TOLERANCE[jnp.float32]
  )


# ---- reading and writing


def numbered() -> tuple[KVCache, np.ndarray, np.ndarray]:
  """3 layers, 4 sequences, 5 tokens, width 2; every value another."""
  k = np.arange(120, dtype=np.float32).reshape(3, 4, 5, 2)
  return KVCache(jnp.asarray(k), jnp.asarray(-k)), k, -k


def test_an_empty_cache():
  cache = empty_cache(3, 4, 5, 2, jnp.bfloat16)
  for x in (cache.k, cache.v):
    assert x.shape == (3, 4, 5, 2) and x.dtype == jnp.bfloat16
    assert not x.any()


def test_reading_gives_the_first_sequences_and_ranks():
  cache, k, v = numbered()
  for layer in range(3):
    for found, whole in zip(cache.read(jnp.int32(layer), 2, 3), (k, v)):
      np.testing.assert_array_equal(found, whole[layer, :2, :3])


def test_writing_the_first_ranks_of_a_layer():
  cache, k, v = numbered()
  new = 1000 + np.arange(24, dtype=np.float32).reshape(4, 3, 2)
  found = jax.jit(KVCache.write)(cache, jnp.int32(1), new, -new)
  k[1, :, :3], v[1, :, :3] = new, -new
  np.testing.assert_array_equal(found.k, k)
  np.testing.assert_array_equal(found.v, v)


def test_writing_drops_sequences_that_the_cache_has_not():
  """A condition cache keeps the conditional half alone."""
  cache, k, v = numbered()
  new = 1000 + np.arange(80, dtype=np.float32).reshape(8, 5, 2)
  found = jax.jit(KVCache.write)(cache, jnp.int32(2), new, -new)
  k[2], v[2] = new[:4], -new[:4]
  np.testing.assert_array_equal(found.k, k)
  np.testing.assert_array_equal(found.v, v)


@pytest.mark.parametrize("sequences", [2, 4, 6])
def test_scattering_drops_what_is_out_of_range(sequences):
  """Ranks that a cache has not (padding), and sequences; fewer sequences leave the others."""
  cache, k, v = numbered()
  rng = np.random.default_rng(sequences)
  index = np.stack([rng.permutation(5)[:3] for _ in range(sequences)])
  index[:, -1] = 5
  new = 1000 + np.arange(sequences * 6, dtype=np.float32).reshape(sequences, 3, 2)
  found = scattered(cache, index, new, -new)
  for sequence in range(min(sequences, 4)):
    k[1, sequence, index[sequence, :2]] = new[sequence, :2]
    v[1, sequence, index[sequence, :2]] = -new[sequence, :2]
  np.testing.assert_array_equal(found.k, k)
  np.testing.assert_array_equal(found.v, v)
