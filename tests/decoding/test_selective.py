"""Decoding with a cache: against recorded runs, and what must hold of every run of every policy."""

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

from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.decoding import given, sampler
from marche_jax.decoding import state as state_lib
from marche_jax.decoding.activity import CACHED, NOW, PREVIOUS, REFRESHED, UNSEEN
from marche_jax.decoding.recording import Trace
from marche_jax.decoding.state import DecodeState, Inputs, Noise
from marche_jax.models import mar
from marche_jax.planning.draft import build
from marche_jax.planning.plan import DecodePlan
from marche_jax.planning.policies import make_draft

RUN_TOLERANCE = 1e-3  # maximum absolute error over the standard deviation: whole runs,
Z_TOLERANCE = 1e-4  # and z of an iteration whose known tokens are the recorded ones

KEY = jax.random.key(3)
SMALL = ModelConfig(
  img_size=32, vae_stride=8, vae_embed_dim=2, encoder_embed_dim=16, encoder_depth=3,
  encoder_num_heads=2, decoder_embed_dim=24, decoder_depth=3, decoder_num_heads=3, class_num=8,
  buffer_size=2, diffloss_d=2, diffloss_w=16,
)  # fmt: skip

decode = quick_jit(sampler.decode, static_argnames=sampler.STATIC)


def small_plan(config: ModelConfig, sample: SampleConfig, num_known: int = 0) -> DecodePlan:
  """A plan with one step shape of each kind, however padded: fewer to compile."""
  return build(make_draft(config, sample, num_known), max_padding=np.inf)


# ---- recorded runs, one row at a time


class Recorded:
  """One of `golden.RUNS` under marche, all tokens active, no iteration being full instead."""

  def __init__(self, name: str, **fields) -> None:
    self.config, self.params = golden.model(name.split("/")[0])
    sample, self.golden = golden.sampling_run(name)
    found = small_plan(self.config, dataclasses.replace(sample, policy="marche", **fields))
    buffer, num_tokens = self.config.buffer_size, self.config.num_tokens

    def widen(shape):
      if shape.encoder.active is None:
        return shape
      encoder = dataclasses.replace(shape.encoder, active=buffer + shape.encoder.slots)
      decoder = dataclasses.replace(shape.decoder, active=num_tokens)
      return dataclasses.replace(shape, encoder=encoder, decoder=decoder)

    self.plan = dataclasses.replace(
      found,
      step_shapes=tuple(widen(shape) for shape in found.step_shapes),
      rows=tuple(
        dataclasses.replace(r, encoder_active=buffer + r.num_known, decoder_active=num_tokens)
        for r in found.rows
      ),
    )
    self.rows, self.tables = state_lib.plan_rows(self.plan)

  def start(self) -> DecodeState:
    batch = len(self.golden["labels"])
    tokens = jnp.zeros((batch, self.config.seq_len, self.config.token_dim))
    by_rank = jnp.asarray(self.golden["orders"][:, ::-1])
    return state_lib.empty_state(self.plan, tokens, by_rank, jnp.float32)

  def iterate(self, state: DecodeState, k: int) -> tuple[DecodeState, Trace]:
    g, batch = self.golden, len(self.golden["labels"])
    one = slice(k, k + 1)
    state, finite, trace = decode(
      self.params,
      state,
      jax.tree.map(lambda x: x[one], self.rows),
      self.tables,
      Inputs(
        g["labels"],
        state_lib.image_keys(KEY, np.arange(batch)),
        Noise(g["init_noise"][one], g["step_noise"][one]),
      ),
      config=self.config,
      step_shapes=self.plan.step_shapes,
      trace=True,
    )
    assert finite.all()
    return state, jax.tree.map(lambda x: x[0], trace)


@pytest.mark.parametrize(
  ("name", "fields"),
  [
    ("mar_tiny/sample_nocfg.npz", {"selection": "carried"}),
    ("mar_tiny/sample_cfg_linear.npz", {"selection": "scout", "refresh_interval": 2}),
    ("mar_tiny/sample_cfg_constant.npz", {"selection": "lower", "refresh_interval": 9}),
    ("mar_patch2/sample_cfg_linear.npz", {"selection": "scout"}),
  ],
)
def test_all_active_replays_the_recorded_run(name, fields):
  """Through scatter and top-k, not a full iteration: the whole run; z with the tokens recorded."""
  run = Recorded(name, **fields)
  selective = [
    run.plan.step_shapes[row.shape_id].decoder.active is not None for row in run.plan.rows
  ]
  assert len(run.plan.step_shapes) == 2 and any(selective)
  g = run.golden
  state = run.start()
  for k in range(len(selective)):
    state, trace = run.iterate(state, k)
    activity = np.asarray(trace.activity)
    assert not (activity == CACHED).any()
  assert error(mar.unpatchify(state.tokens, run.config), g["latents"]) <= RUN_TOLERANCE

  state = run.start()
  halves = {"z_cond": 0, "z_uncond": 1} if g["z_uncond"].size else {"z_cond": 0}
  for k, now in enumerate(g["pred_mask"]):
    state, trace = run.iterate(state, k)
    for key, half in halves.items():
      assert error(trace.z[half], g[key][k], now) <= Z_TOLERANCE, (key, k)
    known = g["pred_mask"][: k + 1].any(axis=0)[..., None]
    recorded = g["sampled"][: k + 1].sum(axis=0)  # each token is sampled once
    state = dataclasses.replace(state, tokens=jnp.asarray(np.where(known, recorded, 0)))


@functools.partial(quick_jit, static_argnums=(0, 6))
def fresh_projections(config, params, tokens, positions, labels, dropped, num_known):
  """Q, K, V of both stacks by the modules, the decoder's in raster order: each [L, B, n, width]."""
  apply = functools.partial(mar.MAR(config).apply, {"params": params})

  def run(stack, x):
    block, kept = mar.make_block(config, stack), []
    for layer in range(getattr(config, f"{stack}_depth")):
      one = {"params": jax.tree.map(lambda p, i=layer: p[i], params[f"{stack}_blocks"])}
      kept.append(block.apply(one, x, method="qkv"))
      x, _ = block.apply(one, x, None, True)
    return x, [jnp.stack(part) for part in zip(*kept)]

  known = jnp.take_along_axis(tokens, positions[:, :num_known, None], axis=1)
  embedding = apply(labels, dropped, method="class_embedding")
  x = apply(known, positions[:, :num_known], embedding, method="encoder_input")
  x, encoder = run("encoder", x)
  embedded = apply(x, method="decoder_embedding")
  valid = jnp.ones((len(tokens), num_known), bool)
  x = apply(embedded, positions[:, :num_known], valid, method="decoder_input")
  return encoder, run("decoder", x)[1]


class FullRefresh:
  """States around a full iteration after selective ones, tokens forced, and a fresh pass beside it.

  All by rank.
  """

  NUMBER = 3

  def __init__(self, **fields) -> None:
    self.config, self.params = golden.model("mar_patch2")
    sample, g = golden.sampling_run("mar_patch2/sample_cfg_linear.npz")
    marche = dataclasses.replace(sample, policy="marche", active_size=8, **fields)
    found = small_plan(self.config, marche)
    self.row = found.rows[self.NUMBER]
    assert found.step_shapes[self.row.shape_id].decoder.active is None
    assert found.rows[self.NUMBER - 1].decoder_active == 8
    rows, tables = state_lib.plan_rows(found)
    self.labels, self.batch = g["labels"], len(g["labels"])
    tokens = jnp.zeros((self.batch, self.config.seq_len, self.config.token_dim))
    self.positions = g["orders"][:, ::-1]
    state = state_lib.empty_state(found, tokens, jnp.asarray(self.positions), jnp.float32)
    keys = state_lib.image_keys(KEY, np.arange(self.batch))
    inputs = Inputs(self.labels, keys, teacher=g["sampled"].sum(axis=0))
    run = functools.partial(decode, config=self.config, step_shapes=found.step_shapes)
    first = jax.tree.map(lambda x: x[: self.NUMBER], rows)
    self.before, _, _ = run(self.params, state, first, tables, inputs)
    pad = (0, self.NUMBER - 1)
    one = jax.tree.map(lambda x: np.pad(x[self.NUMBER : self.NUMBER + 1], pad), rows)
    one.shape_id[1:] = state_lib.IDLE  # the same program
    self.after, _, _ = run(self.params, self.before, one, tables, inputs)

  def fresh(self, half: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Q, K, V of encoder and decoder, each [L, B, n, width]."""
    encoder, decoder = fresh_projections(
      self.config, self.params, self.before.tokens, self.positions, self.labels,
      np.full(self.batch, half == 1), self.row.num_known,
    )  # fmt: skip
    buffer = np.tile(np.arange(self.config.buffer_size), (self.batch, 1))
    by_rank = np.concatenate([buffer, self.config.buffer_size + self.positions], axis=1)
    take = lambda x: np.take_along_axis(np.asarray(x), by_rank[None, ..., None], axis=2)
    return [np.asarray(x) for x in encoder], [take(x) for x in decoder]

  def sequences(self, half: int) -> slice:
    return slice(half * self.batch, (half + 1) * self.batch)


def test_a_full_refresh_leaves_what_a_fresh_pass_computes():
  """Keys and values, after iterations that recomputed some of them only."""
  refresh, stale = FullRefresh(), 0.0
  for half in (0, 1):
    sequences = refresh.sequences(half)
    for kept, old, (_, *new) in zip(
      (refresh.after.encoder_cache, refresh.after.decoder_cache),
      (refresh.before.encoder_cache, refresh.before.decoder_cache),
      refresh.fresh(half),
    ):
      for ours, previous, expected in zip(jax.tree.leaves(kept), jax.tree.leaves(old), new):
        seen = expected.shape[2]
        assert error(np.asarray(ours)[:, sequences, :seen], expected) <= 1e-5
        stale = max(stale, error(np.asarray(previous)[:, sequences, :seen], expected))
  assert stale > 0.1  # before it they were others


def test_carried_scores_are_the_attention_of_new_tokens():
  """In the decoder of those generated now, in the encoder of those generated before."""
  refresh = FullRefresh(selection="carried", select_layer=1)
  config, row = refresh.config, refresh.row
  now = config.buffer_size + row.num_known
  assert row.num_previous and row.num_predict and row.num_previous != row.num_predict
  paid_by = slice(now - row.num_previous, now), slice(now, now + row.num_predict)
  for half in (0, 1):
    for scores, queries, heads, (q, k, _) in zip(
      (refresh.after.encoder_carried, refresh.after.decoder_carried),
      paid_by,
      (config.encoder_num_heads, config.decoder_num_heads),
      refresh.fresh(half),
    ):
      weights = mar.attention_weights(q[0][:, queries], k[0], heads, None)
      expected = np.asarray(weights).mean(axis=1).sum(axis=1)
      assert error(scores[refresh.sequences(half), : k.shape[2]], expected) <= 1e-5


# ---- every policy

# policy: (fields, known tokens); among them every selection, both head loops, one and two halves
CASES = {
  "marche": ({"num_iter": 8, "active_size": 7}, 5),
  "marche+disa+gtr": (
    {"num_iter": 11, "selection": "carried", "select_layer": 1, "condition_cache": True}, 5,
  ),
  "marche+gtr": ({"num_iter": 10, "cfg": 1.0, "selection": "lower", "active_size": 12}, 0),
  "recap": ({"num_iter": 7, "recap_raster": True}, 4),
  "lazymar": ({"num_iter": 10, "head_cache": True, "num_sampling_steps": 9}, 2),
}  # fmt: skip


class Run:
  """A policy's plan, and what was decoded with it."""

  def __init__(self, policy: str) -> None:
    fields, self.num_known = CASES[policy]
    fields = {"num_sampling_steps": 4, "max_timestep": 500, "cfg": 2.0, "policy": policy, **fields}
    self.plan = small_plan(SMALL, SampleConfig(**fields), self.num_known)
    self.params = golden.random_params(SMALL)
    self.rows, self.tables = state_lib.plan_rows(self.plan)

  def known(self, image: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [S, C], mask [S]) of an image, others for each."""
    rng = np.random.default_rng(image)
    mask = np.ones(SMALL.seq_len, int)
    mask[rng.permutation(SMALL.seq_len)[: self.num_known]] = 0
    return rng.standard_normal((SMALL.seq_len, SMALL.token_dim)), mask

  def __call__(self, ids: list[int], teacher=None, trace=True, **static):
    """(positions by rank, final tokens, trace) of some images; an image's label: its number % 8."""
    keys = state_lib.image_keys(KEY, np.asarray(ids))
    known = tuple(np.stack(x) for x in zip(*map(self.known, ids)))
    first = given.initial_state(self.plan, keys, known=known if self.num_known else None)
    dtype = static.get("dtype", jnp.float32)
    state = state_lib.empty_state(self.plan, first.tokens, first.by_rank, dtype)
    inputs = Inputs(np.asarray(ids) % 8, keys, teacher=teacher)
    static = {"config": SMALL, "step_shapes": self.plan.step_shapes, "trace": trace, **static}
    state, finite, found = decode(self.params, state, self.rows, self.tables, inputs, **static)
    assert finite.all()
    return np.asarray(state.by_rank), np.asarray(state.tokens), found


@functools.cache
def run_of(policy: str) -> tuple[Run, tuple]:
  run = Run(policy)
  return run, run([0, 1, 2, 7])


@pytest.mark.parametrize("policy", CASES)
def test_every_position_is_generated_once_and_forced_tokens_are_active(policy):
  run, (positions, _, trace) = run_of(policy)
  generated = np.any(np.asarray(trace.sampled) != 0, axis=-1)  # [iteration, image, position]
  by_rank = np.take_along_axis(generated, positions[None], axis=2)
  rank = np.arange(SMALL.seq_len)
  np.testing.assert_array_equal(by_rank.sum(axis=0), np.tile(rank >= run.num_known, (4, 1)))
  activity, of_stack = np.asarray(trace.activity), np.arange(SMALL.num_tokens)  # ranks there
  selected = 0
  for k, row in enumerate(run.plan.rows):
    new = (rank >= row.num_known) & (rank < row.num_known + row.num_predict)
    np.testing.assert_array_equal(by_rank[k], np.tile(new, (4, 1)))
    now = SMALL.buffer_size + row.num_known
    previous = (of_stack >= now - row.num_previous) & (of_stack < now)
    to_predict = (of_stack >= now) & (of_stack < now + row.num_predict)
    encoder, decoder = activity[k]
    for found, ranks in (
      (encoder == PREVIOUS, previous),
      (decoder == PREVIOUS, previous),
      (decoder == NOW, to_predict),
      (encoder == UNSEEN, of_stack >= now),
    ):
      np.testing.assert_array_equal(found, np.tile(ranks, (4, 1)), str(k))
    assert not (encoder == NOW).any() and not (decoder == UNSEEN).any()
    for found, active in ((encoder, row.encoder_active), (decoder, row.decoder_active)):
      assert ((found >= REFRESHED).sum(axis=1) == active).all()
      selected += ((found == CACHED).sum() > 0) & ((found == REFRESHED).sum() > 0)
    shape = run.plan.step_shapes[row.shape_id]
    for found, stack in ((encoder, shape.encoder), (decoder, shape.decoder)):
      if stack.buffer:
        assert (found[:, : SMALL.buffer_size] == REFRESHED).all()
  assert selected > 0  # some rows did choose


@pytest.mark.parametrize("policy", CASES)
def test_known_tokens_stay(policy):
  run, (positions, tokens, _) = run_of(policy)
  for image, ranks, found in zip((0, 1, 2, 7), positions, tokens):
    given, mask = run.known(image)
    if run.num_known:
      np.testing.assert_array_equal(np.sort(ranks[: run.num_known]), np.flatnonzero(mask == 0))
      np.testing.assert_array_equal(found[mask == 0], np.float32(given[mask == 0]))
      assert (np.abs(found - given).max(axis=-1)[mask == 1] > 0).all()
    unknown = ranks[run.num_known :]
    if run.plan.stages is not None:  # whatever is known, lower stages come first
      assert (np.diff(run.plan.stages[unknown]) >= 0).all()
    for start, end in run.plan.raster_groups:
      assert (np.diff(ranks[start:end]) > 0).all()


@pytest.mark.parametrize("policy", CASES)
def test_an_image_does_not_depend_on_its_neighbours(policy):
  run, (positions, tokens, _) = run_of(policy)
  others, found, _ = run([2, 9, 0, 5])
  scale = float(tokens.std())
  for here, there in ((0, 2), (2, 0)):
    np.testing.assert_array_equal(others[here], positions[there])
    assert np.abs(found[here] - tokens[there]).max() <= RUN_TOLERANCE * scale
  assert np.abs(found[1] - tokens[1]).max() > 0.1 * scale


def test_an_image_does_not_depend_on_the_size_of_its_batch():
  run, (positions, tokens, _) = run_of("marche")
  alone_positions, alone, _ = run([2], trace=False)
  np.testing.assert_array_equal(alone_positions, positions[2:3])
  assert np.abs(alone - tokens[2:3]).max() <= RUN_TOLERANCE * tokens.std()


def test_a_teacher_under_bfloat16():
  """Forced to the tokens of the float32 run, z is a rounding away, and those tokens are written."""
  run, (_, tokens, trace) = run_of("marche")
  _, written, rounded = run(
    [0, 1, 2, 7], teacher=tokens, dtype=jnp.bfloat16, head_dtype=jnp.bfloat16
  )
  np.testing.assert_array_equal(written, tokens)
  assert rounded.z.dtype == jnp.float32
  z = np.asarray(trace.z)
  off = np.abs(np.asarray(rounded.z) - z)[z != 0] / z.std()
  assert 0 < np.sqrt((off**2).mean()) < 0.05


def test_temporary_memory_holds_no_second_cache():
  """Compiled from shapes alone: what a cache adds is less than another one."""
  config = dataclasses.replace(
    SMALL, img_size=64, encoder_embed_dim=64, encoder_depth=12, decoder_embed_dim=96,
    decoder_depth=12, buffer_size=16,
  )  # fmt: skip
  weights, batch, temporary = mar.abstract_params(config), 4, {}
  compiled = quick_jit(sampler.decode, static_argnames=sampler.STATIC, donate_argnums=1)
  for policy in ("full", "marche"):
    found = small_plan(config, SampleConfig(num_iter=8, num_sampling_steps=4, policy=policy))
    rows, tables = state_lib.plan_rows(found)

    def start(found: DecodePlan = found):
      tokens = jnp.zeros((batch, config.seq_len, config.token_dim))
      by_rank = jnp.zeros((batch, config.seq_len), jnp.int32)
      keys = state_lib.image_keys(KEY, jnp.arange(batch))
      state = state_lib.empty_state(found, tokens, by_rank, jnp.float32)
      return state, Inputs(jnp.zeros(batch, jnp.int32), keys)

    state, inputs = jax.eval_shape(start)
    lowered = compiled.lower(
      weights, state, rows, tables, inputs, config=config, step_shapes=found.step_shapes
    )
    memory = lowered.compile().memory_analysis()
    temporary[policy] = memory.temp_size_in_bytes
  leaves = jax.tree.leaves((state.encoder_cache, state.decoder_cache))
  cache = sum(x.size * x.dtype.itemsize for x in leaves)
  assert memory.alias_size_in_bytes >= cache  # updated in place
  assert temporary["marche"] < temporary["full"] + cache
