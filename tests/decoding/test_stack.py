"""One stack, over all of its tokens or some of them: which are chosen, and what that leaves."""

from __future__ import annotations

import dataclasses
import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import error, quick_jit
from golden import exact_matmuls as exact_matmuls
from hypothesis import given, settings
from hypothesis import strategies as st

from marche_jax.config import ModelConfig
from marche_jax.decoding import stack
from marche_jax.decoding.cache import KVCache
from marche_jax.decoding.stack import Span
from marche_jax.models.mar import attention_weights, make_block
from marche_jax.planning.shapes import StackShape

CONFIG = ModelConfig(
  img_size=32, vae_stride=8, encoder_embed_dim=16, encoder_depth=4, encoder_num_heads=2,
  class_num=2, buffer_size=2, diffloss_d=1, diffloss_w=8, decoder_depth=1, decoder_embed_dim=8,
  decoder_num_heads=1,
)  # fmt: skip
BUFFER, SLOTS, TOKENS, DEPTH = 2, 10, 18, 3  # DEPTH of 4 layers run
SEEN = BUFFER + SLOTS
BLOCK = make_block(CONFIG, "encoder")
TOLERANCE = 1e-5  # maximum absolute error over the standard deviation

run_stack = quick_jit(
  functools.partial(stack.run_stack, BLOCK, depth=DEPTH, buffer=BUFFER), static_argnames="shape"
)


@pytest.fixture(scope="module")
def params():
  return golden.random_params(CONFIG)["encoder_blocks"]


def normal(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X = normal(0, 3, SEEN, 16)
STALE = KVCache(normal(1, 4, 3, TOKENS, 16), normal(2, 4, 3, TOKENS, 16))
CARRIED = np.abs(normal(3, 3, TOKENS))


def span(count: int, first: int = 5, forced: int = 3, valid: int | None = None) -> Span:
  """`forced` tokens from rank `first` on, which are also those whose attention is carried."""
  return Span(
    valid=None if valid is None else np.arange(SEEN) < valid,
    first_forced=np.int32(first),
    num_forced=np.int32(forced),
    num_active=np.int32(count),
    first_carried=np.int32(first),
    num_carried=np.int32(forced),
  )


def by_rank(run: stack.StackRun) -> tuple[np.ndarray, np.ndarray]:
  """What a run gave of every token [X, M, width], and of which, bool [X, M]."""
  if run.active is None:
    return np.asarray(run.x), np.ones(run.x.shape[:2], bool)
  found, where = np.zeros_like(X), np.zeros(X.shape[:2], bool)
  slots = np.flatnonzero(run.active.filled)
  for sequence, ranks in enumerate(np.asarray(run.active.ranks)):
    found[sequence, ranks[slots]] = run.x[sequence, slots]
    where[sequence, ranks[slots]] = True
  return found, where


# ---- the active set

choose = quick_jit(stack.choose, static_argnames=("shape", "buffer"))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_the_active_set(data):
  slots = data.draw(st.sampled_from([1, 5, SEEN]))
  keep_buffer = slots > BUFFER and data.draw(st.booleans())
  held = BUFFER if keep_buffer else 0
  valid = data.draw(st.sampled_from([None, *range(BUFFER + 1, SEEN + 1)]))
  seen = SEEN if valid is None else valid
  forced = data.draw(st.integers(0, min(slots - held, seen - BUFFER)))
  first = data.draw(st.integers(BUFFER, seen - forced))
  count = data.draw(st.integers(held + forced, slots))
  # Few values, so that there are ties.
  scores = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 4, (3, SEEN))
  shape = StackShape(SLOTS, active=slots, forced=max(1, forced), buffer=keep_buffer)
  now = span(count, first, forced, valid)
  active = choose(shape, now, scores.astype(np.float32), buffer=BUFFER)
  filled = np.asarray(active.filled)
  assert active.ranks.shape == (3, slots)
  assert filled.tolist() == [i < min(count, seen) for i in range(slots)]
  always = [*range(held), *range(first, first + forced)]
  for chosen, score in zip(np.asarray(active.ranks), scores):
    assert len(set(chosen.tolist())) == slots
    assert chosen[: len(always)].tolist() == always  # what `forced_ranks` says
    assert active.slot_of(chosen[held : held + forced]).tolist() == [*range(held, held + forced)]
    chosen = chosen[filled]
    assert (chosen < seen).all()
    others = np.setdiff1d(np.arange(seen), chosen)
    if others.size and len(chosen) > len(always):
      assert score[chosen[len(always) :]].min() >= score[others].max()
  ranks, there = stack.forced_ranks(shape, now, BUFFER)
  assert np.asarray(ranks)[np.asarray(there)].tolist() == always


# ---- everything active is everything

EVERYTHING = {
  "none": {},
  "none with buffer": {"buffer": True},
  "scout": {"source": "scout", "layer": 2},
  "carried": {"source": "carried", "layer": 2, "carried": 4},
  "carried with buffer": {"source": "carried", "layer": 2, "carried": 4, "buffer": True},
  "lower": {"source": "lower", "layer": 2},
  "lower, values": {"source": "lower", "layer": 2, "score": "value"},
}


@pytest.fixture(scope="module")
def full(params):
  """Everything recomputed, where the cache held something else; attention carried from layer 2."""
  shape = StackShape(SLOTS, carried=4, layer=2)
  return {n: run_stack(params, shape, span(SEEN, valid=n), X, STALE, CARRIED) for n in (None, 9)}


@pytest.mark.parametrize("name", EVERYTHING)
def test_all_active_is_full(params, full, name):
  """Through top-k, gather and scatter: the same output, cache and carried attention."""
  shape = StackShape(SLOTS, active=SEEN, forced=3, **EVERYTHING[name])
  for valid in (9,) if name == "scout" else (None, 9):
    seen = valid or SEEN
    found = run_stack(params, shape, span(SEEN, valid=valid), X, STALE, CARRIED)
    x, where = by_rank(found)
    assert where[:, :seen].all() and not where[:, seen:].any()
    assert error(x[:, :seen], np.asarray(full[valid].x)[:, :seen]) <= TOLERANCE
    for ours, theirs in zip(*(jax.tree.leaves(r.cache) for r in (found, full[valid]))):
      rows = (slice(DEPTH), slice(None), slice(seen))
      assert error(ours[rows], np.asarray(theirs)[rows]) <= TOLERANCE
    if shape.carried:
      assert error(found.carried, np.asarray(full[valid].carried)) <= TOLERANCE
    else:
      np.testing.assert_array_equal(found.carried, CARRIED)


def test_a_full_run_writes_what_it_computes(params, full):
  """Only the layers that run and the tokens that are seen; with or without a cache."""
  alone = run_stack(params, StackShape(SLOTS), span(SEEN), X, None, None)
  assert error(full[None].x, np.asarray(alone.x)) <= TOLERANCE
  for new, old in zip(jax.tree.leaves(full[None].cache), jax.tree.leaves(STALE)):
    changed = (np.asarray(new) != old).any(axis=-1)
    assert changed[:DEPTH, :, :SEEN].all()
    assert not changed[DEPTH:].any() and not changed[:, :, SEEN:].any()


# ---- some active


@pytest.mark.parametrize("name", EVERYTHING)
def test_only_the_active_rows_of_the_cache_change(params, name):
  shape = StackShape(SLOTS, active=7, forced=3, **EVERYTHING[name])
  found = run_stack(params, shape, span(6, valid=9), X, STALE, CARRIED)
  _, where = by_rank(found)
  assert (where.sum(axis=1) == 6).all()
  assert where[:, 5:8].all()  # forced
  if shape.buffer:
    assert where[:, :BUFFER].all()
  for new, old in zip(jax.tree.leaves(found.cache), jax.tree.leaves(STALE)):
    changed = (np.asarray(new) != old).any(axis=-1)
    for layer in range(4):
      if layer >= DEPTH:
        expected = np.zeros_like(where)
      elif shape.source == "lower" and layer < shape.layer:  # where all tokens run
        expected = np.ones_like(where)
      else:
        expected = where
      np.testing.assert_array_equal(changed[layer, :, :SEEN], expected, str(layer))
    assert not changed[:, :, SEEN:].any()


def test_a_scout_pass_leaves_no_trace(params):
  """With no more active than forced ones, it decides on nothing: the same as without it."""
  shape = StackShape(SLOTS, active=3, forced=3)
  now = span(3)
  plain = run_stack(params, shape, now, X, STALE, CARRIED)
  scout = dataclasses.replace(shape, source="scout", layer=3)
  found = run_stack(params, scout, now, X, STALE, CARRIED)
  np.testing.assert_array_equal(found.active.ranks, plain.active.ranks)
  for ours, theirs in zip(
    jax.tree.leaves((found.x, found.cache)), jax.tree.leaves((plain.x, plain.cache))
  ):
    assert error(ours, np.asarray(theirs)) <= 1e-6


def test_a_selective_run_is_attention_over_active_and_cached(params):
  """Against the first layer written out: the active ones over fresh and stale keys."""
  shape = StackShape(SLOTS, active=5, forced=3, source="carried", layer=1)
  found = run_stack(params, shape, span(5), X, STALE, CARRIED)
  _, where = by_rank(found)
  apply = functools.partial(BLOCK.apply, {"params": jax.tree.map(lambda p: p[0], params)})
  _, k, v = apply(X, method="qkv")
  for ours, fresh, stale in ((found.cache.k, k, STALE.k), (found.cache.v, v, STALE.v)):
    expected = np.where(where[..., None], fresh, stale[0][:, :SEEN])
    assert error(np.asarray(ours)[0, :, :SEEN], expected) <= TOLERANCE
  chosen = np.argsort(-CARRIED[:, :SEEN] - 1e9 * np.isin(np.arange(SEEN), [5, 6, 7]), axis=1)[:, :5]
  np.testing.assert_array_equal(np.sort(chosen), np.nonzero(where)[1].reshape(3, 5))


# ---- scores


def test_scores_agree_where_the_cache_is_fresh(params, full):
  """Scout pass, lower layers and what a full run carries: the attention that forced tokens pay."""
  valid, fresh = 9, full[9].cache
  carried = np.asarray(full[9].carried)
  np.testing.assert_allclose(carried[:, :valid].sum(axis=1), 3, rtol=1e-5)  # of three queries
  assert (carried[:, valid:SEEN] == 0).all()
  np.testing.assert_array_equal(carried[:, SEEN:], CARRIED[:, SEEN:])
  for source in ("scout", "lower"):
    shape = StackShape(SLOTS, active=7, forced=4, source=source, layer=2)
    found = run_stack(params, shape, span(7, valid=valid), X, fresh, CARRIED)
    scores = np.asarray(found.active.scores)
    if source == "scout":  # keys of the forced tokens are not the cache's: they count apart
      forced = np.isin(np.arange(SEEN), [5, 6, 7])
      assert (scores[:, forced] == 0).all()
      assert error(scores[:, ~forced], carried[:, :SEEN][:, ~forced]) <= TOLERANCE
    else:
      assert error(scores, carried[:, :SEEN]) <= TOLERANCE


def test_attention_scores_are_means_over_heads_and_sums_over_queries():
  q, k = normal(4, 2, 5, 6), normal(5, 2, 7, 6)
  keys, queries = np.arange(7) != 3, np.asarray([True, False, True, True, False])
  found = np.asarray(stack.attention_scores(q, k, 3, keys, queries))
  weights = np.asarray(attention_weights(q, k, 3, keys[None]))
  np.testing.assert_allclose(found, weights[:, :, queries].mean(axis=1).sum(axis=1), rtol=1e-5)
  np.testing.assert_allclose(found.sum(axis=1), 3, rtol=1e-5)
  assert (found[:, 3] == 0).all()


def test_value_scores_are_minus_the_mean_cosine():
  old = normal(6, 2, 4, 6)
  new = old * np.asarray([1, 3, -1, 1], np.float32)[:, None]
  new[:, 3, :3] = 0  # one of two heads is at right angles
  new[:, 3, :2], old[:, 3, 2] = [-old[0, 3, 1], old[0, 3, 0]], 0
  old[1, 3, :2] = old[0, 3, :2]
  found = stack.value_scores(jnp.asarray(new), jnp.asarray(old), 2)
  np.testing.assert_allclose(found, np.tile([-1, -1, 1, -0.5], (2, 1)), atol=1e-6)


def test_tokens_whose_values_changed_are_refreshed(params, full):
  """At layer 1 values depend on the token alone: exactly those that changed stand out."""
  shape = StackShape(SLOTS, active=5, forced=3, source="lower", score="value", layer=1)
  x = X.copy()
  for sequence, changed in enumerate(([0, 10], [3, 4], [8, 11])):
    x[sequence, changed] = normal(7, 2, 16)
    x[sequence, 2] = 1.7 * X[sequence, 2]  # a norm makes nothing of that
  found = run_stack(params, shape, span(5), x, full[None].cache, CARRIED)
  np.testing.assert_array_equal(
    np.sort(found.active.ranks, axis=1), [[0, 5, 6, 7, 10], [3, 4, 5, 6, 7], [5, 6, 7, 8, 11]]
  )


@pytest.mark.parametrize("name", ["none", "scout", "lower"])
def test_what_is_not_valid_does_not_matter(params, name):
  """Neither the input nor the cache at ranks that hold no token."""
  shape = StackShape(SLOTS, active=7, forced=3, **EVERYTHING[name])
  now = span(6, valid=9)
  expected = run_stack(params, shape, now, X, STALE, CARRIED)
  x, spoilt = X.copy(), jax.tree.map(np.copy, STALE)
  x[:, 9:] = 1e3 * normal(8, 3, 3, 16)
  for part in (spoilt.k, spoilt.v):
    part[:, :, 9:] = 3e38
  found = run_stack(params, shape, now, x, spoilt, CARRIED)
  np.testing.assert_array_equal(found.active.ranks[:, :6], expected.active.ranks[:, :6])
  np.testing.assert_array_equal(found.x[:, :6], expected.x[:, :6])
  for ours, theirs in zip(jax.tree.leaves(found.cache), jax.tree.leaves(expected.cache)):
    np.testing.assert_array_equal(ours[:, :, :9], theirs[:, :, :9])
