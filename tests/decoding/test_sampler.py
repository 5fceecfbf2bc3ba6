"""Decoding: recorded runs of the PyTorch reference replayed, and what must hold of every run."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import error, quick_jit
from golden import exact_matmuls as exact_matmuls
from hypothesis import given
from hypothesis import strategies as st

from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.decoding import head_sampler, sampler
from marche_jax.decoding import state as state_lib
from marche_jax.decoding.state import DecodeState, Inputs, Noise, Rows
from marche_jax.models import diffusion, mar
from marche_jax.models.head import Head
from marche_jax.planning.plan import DecodePlan
from marche_jax.planning.policies import make_plan

RUN_TOLERANCE = 1e-3  # maximum absolute error over the reference's standard deviation

SMALL = ModelConfig(
  img_size=32, vae_stride=8, vae_embed_dim=2, encoder_embed_dim=16, encoder_depth=2,
  encoder_num_heads=2, decoder_embed_dim=24, decoder_depth=2, decoder_num_heads=3, class_num=8,
  buffer_size=2, diffloss_d=1, diffloss_w=16,
)  # fmt: skip
SAMPLE = SampleConfig(num_iter=3, cfg=2.0, num_sampling_steps=4, max_timestep=500)
KEY = jax.random.key(3)

decode = quick_jit(sampler.decode, static_argnames=sampler.STATIC)


@pytest.fixture(scope="module")
def params():
  return golden.random_params(SMALL)


def run(params, image_ids, labels, sample=SAMPLE, **kwargs):
  """All rows of a plan for some images of the run KEY: (state, finite, trace)."""
  plan = make_plan(SMALL, sample)
  rows, tables = state_lib.plan_rows(plan)
  keys = state_lib.image_keys(KEY, np.asarray(image_ids))
  inputs = Inputs(np.asarray(labels), keys)
  return decode(
    params,
    start(keys, plan),
    rows,
    tables,
    inputs,
    config=SMALL,
    step_shapes=plan.step_shapes,
    **kwargs,
  )


def start(keys, plan: DecodePlan | None = None) -> DecodeState:
  """The state before the first iteration, by default of the policy full."""
  tokens = np.zeros((len(keys), SMALL.seq_len, SMALL.token_dim), np.float32)
  plan = make_plan(SMALL, SAMPLE) if plan is None else plan
  by_rank = state_lib.random_order(keys, SMALL.seq_len)[:, ::-1]
  return state_lib.empty_state(plan, tokens, state_lib.arrange(plan, by_rank), jnp.float32)


# ---- recorded runs


# The last two recompute everything in every iteration, and so are the same program.
@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"policy": "marche", "refresh_interval": 1},
    {"policy": "marche", "active_size": 72, "encoder_active_size": 72, "select_layer": 1},
  ],
  ids=["full", "refreshed always", "all active"],
)
@pytest.mark.parametrize("name", golden.RUNS)
def test_replay(name, fields):
  """Every iteration's z and tokens, and the final latents, with the recorded order and noise."""
  config, params = golden.model(name.split("/")[0])
  sample, g = golden.sampling_run(name)
  plan = make_plan(config, dataclasses.replace(sample, **fields))
  rows, tables = state_lib.plan_rows(plan)
  batch = len(g["labels"])
  empty = np.zeros((batch, config.seq_len, config.token_dim), np.float32)
  state, finite, trace = sampler.jitted_decode(
    params,
    state_lib.empty_state(plan, empty, g["orders"][:, ::-1], jnp.float32),
    rows,
    tables,
    Inputs(
      g["labels"],
      state_lib.image_keys(jax.random.key(0), np.arange(batch)),
      Noise(g["init_noise"], g["step_noise"]),
    ),
    config=config,
    step_shapes=plan.step_shapes,
    trace=True,
  )
  assert finite.all()
  predicted = g["pred_mask"]
  np.testing.assert_array_equal(np.any(trace.sampled != 0, axis=-1), predicted)
  halves = {"z_cond": 0, "z_uncond": 1} if g["z_uncond"].size else {"z_cond": 0}
  assert trace.z.shape[1] == len(halves)
  for k, now in enumerate(predicted):  # every iteration on its own scale
    for key, half in halves.items():
      assert error(trace.z[k, half], g[key][k], now) <= RUN_TOLERANCE, (key, k)
    assert error(trace.sampled[k], g["sampled"][k], now) <= RUN_TOLERANCE, k
  assert error(mar.unpatchify(state.tokens, config), g["latents"]) <= RUN_TOLERANCE


def test_head_in_the_loop_equals_the_head():
  """The loop's layout of the head (`prepare`, `modulations`, `denoise`) against the module."""
  config, params = golden.model("mar_tiny")
  f = golden.load("mar_tiny/forward.npz")

  @jax.jit
  def both(params, x, t, z):
    weights = head_sampler.prepare(params["head"], config, t[None], jnp.float32)
    cond = z @ weights.cond_embed["kernel"] + weights.cond_embed["bias"]
    # Of all pairs (t, z).
    modulation = head_sampler.modulations(weights.modulation, weights.time[0], cond)
    own = modulation[jnp.arange(len(t)), jnp.arange(len(t))]
    module = Head(config).apply({"params": params["head"]}, x, t, z)
    return head_sampler.denoise(weights, x, own), module

  ours, module = both(params, f["net_x"], f["net_t"], f["net_c"])
  assert error(ours, np.asarray(module)) <= 1e-5
  assert error(ours, f["net_out"]) <= 1e-5


@pytest.mark.parametrize("modulation_rows", [1, 12, 256])
def test_diffusion_steps_taken_together_change_nothing(params, monkeypatch, modulation_rows):
  """Static or traced number of them, any number of modulations at a time, a padded table."""
  process = diffusion.make_process(np.asarray([0, 125, 250, 375, 500]))
  exact = jax.tree.map(np.asarray, process.coefficients())
  padded = jax.tree.map(lambda x: np.pad(x, (0, 3)), exact)
  z, noise = (np.random.default_rng(0).standard_normal((4, n), np.float32) for n in (24, 2))

  def sample(params, coefficients, steps):
    timesteps = coefficients.timestep[None]
    weights = head_sampler.prepare(params["head"], SMALL, timesteps, jnp.float32)
    run = head_sampler.DiffusionRun(jnp.int32(0), coefficients, steps)
    drawn = head_sampler.TokenNoise(
      noise[:2], lambda i, t: jnp.sin(i + noise[2:] * t), jnp.float32(1)
    )
    guidance = head_sampler.Guidance(2, jnp.float32(2))
    return head_sampler.sample(weights, z, run, drawn, guidance)

  expected = quick_jit(lambda p: sample(p, exact, 5))(params)
  monkeypatch.setattr(head_sampler, "MODULATION_ROWS", modulation_rows)
  static = quick_jit(lambda p: sample(p, exact, 5))(params)
  traced = quick_jit(lambda p, steps: sample(p, padded, steps))(params, 5)
  for found in (static, traced):
    assert error(found, np.asarray(expected)) <= 1e-5


# ---- an image depends on the key, its number and its label alone


def test_images_do_not_depend_on_their_batch(params):
  ids, labels = [0, 1, 2, 7], [3, 3, 5, 6]
  together, _, _ = run(params, ids, labels)
  scale = float(together.tokens.std())
  for some in ([0], [2], [3], [1, 3], [2, 0]):
    part, _, _ = run(params, [ids[i] for i in some], [labels[i] for i in some])
    np.testing.assert_array_equal(part.by_rank, together.by_rank[np.asarray(some)])
    difference = np.abs(part.tokens - together.tokens[np.asarray(some)]).max()
    assert difference <= RUN_TOLERANCE * scale, some
  assert np.abs(together.tokens[0] - together.tokens[1]).max() > 0.1 * scale  # other number
  relabelled, _, _ = run(params, ids, [3, 4, 5, 6])
  assert np.abs(relabelled.tokens[1] - together.tokens[1]).max() > 2 * RUN_TOLERANCE * scale


def test_noise_depends_on_image_position_and_timestep_alone(params):
  """With a head that predicts zero, the result is a known function of the draws."""
  silent = {**params["head"]["final_linear"]}
  silent = {name: np.zeros_like(leaf) for name, leaf in silent.items()}
  muted = {**params, "head": {**params["head"], "final_linear": silent}}
  ids = [0, 1, 2, 7]
  together, _, _ = run(muted, ids, [0, 1, 2, 3])
  for some in ([2], [3, 1]):
    part, _, _ = run(muted, [ids[i] for i in some], [4] * len(some))
    np.testing.assert_array_equal(part.tokens, together.tokens[np.asarray(some)])

  process = make_plan(SMALL, SAMPLE).processes[0]
  fold = jax.random.fold_in
  for image, position in ((2, 0), (7, 11)):
    token_key = fold(fold(fold(KEY, image), 1), position)
    x = jax.random.normal(fold(token_key, 1000), (SMALL.token_dim,))
    for index in reversed(range(len(process.timesteps))):
      c = process.coefficients().at(index)
      noise = jax.random.normal(fold(token_key, int(c.timestep)), x.shape)
      x = diffusion.ancestral_step(c, x, jnp.zeros(2 * len(x)), noise, SAMPLE.temperature)
    np.testing.assert_allclose(together.tokens[ids.index(image), position], x, rtol=1e-5)


def test_orders_are_permutations_and_differ(params):
  keys = state_lib.image_keys(KEY, np.arange(200))
  orders = np.asarray(state_lib.random_order(keys, SMALL.seq_len))
  np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(16), (200, 1)))
  assert len({tuple(order) for order in orders}) == 200
  first = np.bincount(orders[:, 0], minlength=16)
  assert first.min() > 0 and first.max() < 40  # 12.5 expected


def test_a_broken_image_is_named_and_spoils_no_other(params):
  embedding = np.array(params["class_emb"]["embedding"])
  embedding[5] = np.nan
  broken = {**params, "class_emb": {"embedding": embedding}}
  state, finite, _ = run(broken, [0, 1, 2, 7], [3, 3, 5, 6])
  np.testing.assert_array_equal(finite, [[True, True, False, True]] * SAMPLE.num_iter)
  whole, _, _ = run(params, [0, 1, 2, 7], [3, 3, 5, 6])
  np.testing.assert_array_equal(state.tokens[3], whole.tokens[3])


# ---- chunks, known tokens, teacher forcing, bfloat16, devices


@given(st.integers(1, 40), st.integers(1, 50))
def test_chunks_hold_all_rows_once(total, size):
  fields = {f.name: np.arange(total) for f in dataclasses.fields(Rows)}
  parts = list(state_lib.chunks(Rows(**fields), size))
  assert [end for end, _ in parts] == [min(i + size, total) for i in range(0, total, size)]
  assert all(len(leaf) == size for _, part in parts for leaf in jax.tree.leaves(part))
  shapes = np.concatenate([part.shape_id for _, part in parts])
  np.testing.assert_array_equal(shapes[:total], np.arange(total))
  assert (shapes[total:] == -1).all()
  known = np.concatenate([part.num_known for _, part in parts])
  np.testing.assert_array_equal(known[:total], np.arange(total))


def test_chunks_decode_the_same(params):
  ids, labels = [2, 7], np.asarray([5, 6])
  whole, _, _ = run(params, ids, labels)
  plan = make_plan(SMALL, SAMPLE)
  rows, tables = state_lib.plan_rows(plan)
  keys = state_lib.image_keys(KEY, np.asarray(ids))
  state, inputs = start(keys), Inputs(labels, keys)
  for _, part in state_lib.chunks(rows, 2):  # the second is padded by one row
    state, finite, _ = decode(
      params, state, part, tables, inputs, config=SMALL, step_shapes=plan.step_shapes
    )
    assert finite.shape == (2, 2) and finite.all()
  assert error(state.tokens, np.asarray(whole.tokens)) <= 1e-5


def test_known_tokens_stay_and_a_teacher_replaces_the_rest(params):
  plan = make_plan(SMALL, SAMPLE, num_known=6)
  rows, tables = state_lib.plan_rows(plan)
  keys = state_lib.image_keys(KEY, np.arange(2))
  by_rank = np.asarray(state_lib.random_order(keys, SMALL.seq_len))[:, ::-1]
  rng = np.random.default_rng(0)
  tokens, teacher = rng.standard_normal((2, 2, SMALL.seq_len, SMALL.token_dim), np.float32)
  known = np.zeros((2, SMALL.seq_len), bool)
  np.put_along_axis(known, by_rank[:, :6], True, axis=1)
  tokens *= known[..., None]
  state, _, trace = decode(
    params,
    DecodeState(tokens, by_rank),
    rows,
    tables,
    Inputs(np.asarray([1, 2]), keys, teacher=teacher),
    config=SMALL,
    step_shapes=plan.step_shapes,
    trace=True,
  )
  np.testing.assert_array_equal(state.tokens, np.where(known[..., None], tokens, teacher))
  for done in (trace.sampled, trace.z[:, 0], trace.z[:, 1]):
    times = np.any(done != 0, axis=-1).sum(axis=0)
    np.testing.assert_array_equal(times, ~known)  # each unknown position once, no known one
  # z of an iteration is that of the model, given the tokens known before it.
  for k in (0, 2):
    row = plan.rows[k]
    mask = np.ones((2, SMALL.seq_len), np.float32)
    np.put_along_axis(mask, by_rank[:, : row.num_known], 0, axis=1)
    now = np.any(trace.sampled[k] != 0, axis=-1)
    given_now = (1 - mask)[..., None] * np.asarray(state.tokens)
    for half, dropped in ((0, False), (1, True)):
      z = _z(params, given_now, mask, np.asarray([1, 2]), np.full(2, dropped))
      assert error(trace.z[k, half], np.asarray(z), now) <= 1e-5


@quick_jit
def _z(params, tokens, mask, labels, dropped):
  return mar.MAR(SMALL).apply({"params": params}, tokens, mask, labels, dropped)


def test_bfloat16_is_a_rounding_away(params):
  exact, _, _ = run(params, [2, 7], [5, 6])
  rounded, finite, _ = run(params, [2, 7], [5, 6], dtype=jnp.bfloat16, head_dtype=jnp.bfloat16)
  assert finite.all() and rounded.tokens.dtype == jnp.float32
  assert 0 < error(rounded.tokens, np.asarray(exact.tokens)) < 0.3


SHARDED = """
import dataclasses, sys
import jax, numpy as np
sys.path[:0] = sys.argv[1:]
import golden, test_sampler as t
from marche_jax.decoding import sampler, state as state_lib
from marche_jax.decoding.state import Inputs
from marche_jax.decoding.plan_runner import PlanRunner
assert len(jax.devices()) == 2
params, ids, labels = golden.random_params(t.SMALL), np.arange(4), np.asarray([3, 3, 5, 6])
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
for policy in ("full", "marche"):
  sample = dataclasses.replace(t.SAMPLE, policy=policy, active_size=9, selection="carried",
                               select_layer=1, num_iter=4)
  plan = t.make_plan(t.SMALL, sample)
  rows, tables = state_lib.plan_rows(plan)
  keys = state_lib.image_keys(t.KEY, ids)
  state = PlanRunner(plan, mesh=mesh).start(keys)
  with jax.default_matmul_precision("highest"):
    whole, _, _ = t.run(params, ids, labels, sample)
    sharded = sampler.sharded_decode(mesh, plan)
    lowered = sharded.lower(params, state, rows, tables, Inputs(labels, keys))
    compiled = lowered.compile(compiler_options=golden.QUICK)
    placed = jax.device_put((params, rows, tables, Inputs(labels, keys)),
                            (*compiled.input_shardings[0][:1], *compiled.input_shardings[0][2:]))
    parts, finite, _ = compiled(placed[0], state, *placed[1:])
  assert len(parts.tokens.sharding.device_set) == 2
  assert finite.shape == (4, 4) and finite.all()
  np.testing.assert_array_equal(parts.by_rank, whole.by_rank)
  assert t.error(parts.tokens, np.asarray(whole.tokens)) <= t.RUN_TOLERANCE
  caches = jax.tree.leaves((parts.encoder_cache, parts.decoder_cache))
  assert len(caches) == (4 if policy == "marche" else 0)
  for part, cache in zip(caches, jax.tree.leaves((whole.encoder_cache, whole.decoder_cache))):
    assert part.shape == cache.shape  # a device holds all of its own images' sequences
    assert [s.data.shape[1] for s in part.addressable_shards] == [4, 4]
    half = [np.asarray(x).reshape(len(x), -1, 2, *x.shape[2:]) for x in (part, cache)]
    # [L, (device, half), images of a device] of the one, [L, (half, device), ...] of the other
    assert t.error(half[0][:, [0, 2, 1, 3]], half[1]) <= t.RUN_TOLERANCE
  text = compiled.as_text()
  for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
    assert collective not in text, collective
print("sharded as unsharded")
"""


def test_two_devices_decode_the_same():
  """In a process of its own, since the number of devices is fixed when jax starts."""
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
  env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  here = pathlib.Path(__file__).parent
  command = [sys.executable, "-c", SHARDED, str(here), str(here.parent)]
  done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr
  assert done.stdout.endswith("sharded as unsharded\n")


def test_program_does_not_grow_with_depth():
  plan = make_plan(SMALL, SAMPLE)
  rows, tables = state_lib.plan_rows(plan)
  keys = state_lib.image_keys(KEY, np.arange(2))
  arguments = start(keys), rows, tables, Inputs(np.asarray([0, 1]), keys)

  def size(depth: int) -> int:
    config = dataclasses.replace(SMALL, encoder_depth=depth, decoder_depth=depth)
    static = functools.partial(sampler.decode, config=config, step_shapes=plan.step_shapes)
    lowered = jax.jit(static).lower(mar.abstract_params(config), *arguments)
    return len(lowered.as_text().splitlines())

  assert size(2) == size(8) > 100
