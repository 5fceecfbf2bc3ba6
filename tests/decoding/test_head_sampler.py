"""The head's sampling loop: its cache, its solvers, and tokens that get more diffusion steps."""

from __future__ import annotations

import dataclasses
import math

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import error, quick_jit
from golden import exact_matmuls as exact_matmuls
from hypothesis import given
from hypothesis import strategies as st

from marche_jax.config import ModelConfig
from marche_jax.decoding import head_sampler, sampler
from marche_jax.decoding import state as state_lib
from marche_jax.decoding.state import Inputs, Rows, Tables
from marche_jax.models import diffusion
from marche_jax.models.diffusion import make_process
from marche_jax.planning.head_schedule import INTERVAL, RECOMPUTE_ABOVE, CachedSteps
from marche_jax.planning.shapes import HeadShape

STEPS = 27  # some cached diffusion steps recompute, others do not
MODEL = ModelConfig(
  img_size=32, vae_stride=8, vae_embed_dim=2, encoder_embed_dim=16, encoder_depth=1,
  encoder_num_heads=1, decoder_embed_dim=12, decoder_depth=1, decoder_num_heads=1, class_num=2,
  buffer_size=1, diffloss_d=3, diffloss_w=16,
)  # fmt: skip
TOKENS = 4
TOLERANCE = 1e-5  # maximum absolute error over the standard deviation

PROCESS = make_process(np.arange(STEPS) * 30)
COEFFICIENTS = jax.tree.map(np.asarray, PROCESS.coefficients())
NOISE = np.random.default_rng(1).standard_normal((STEPS + 1, TOKENS, 2)).astype(np.float32)


def head(depth: int) -> tuple[ModelConfig, dict]:
  """A random head whose output is no larger than eps, so that errors do not grow."""
  config = dataclasses.replace(MODEL, diffloss_d=depth)
  params = golden.random_params(config)["head"]
  return config, {**params, "final_linear": jax.tree.map(lambda x: 0.1 * x, params["final_linear"])}


def conditions(halves: int) -> np.ndarray:
  shape = (halves * TOKENS, MODEL.decoder_embed_dim)
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def sample(config: ModelConfig, params: dict, z: np.ndarray, halves: int, **kwargs) -> np.ndarray:
  """The tokens drawn with given noise, guidance 2 and temperature 0.8."""

  @quick_jit
  def run(params: dict, z: jax.Array) -> jax.Array:
    weights = head_sampler.prepare(params, config, COEFFICIENTS.timestep[None], jnp.float32)
    run = head_sampler.DiffusionRun(jnp.int32(0), COEFFICIENTS, STEPS, **kwargs)
    noise = head_sampler.TokenNoise(
      NOISE[0], lambda i, t: jnp.asarray(NOISE)[1 + i], jnp.float32(0.8)
    )
    return head_sampler.sample(
      weights, z, run, noise, head_sampler.Guidance(halves, jnp.float32(2))
    )

  return np.asarray(run(params, z))


# ---- LazyMAR's head cache


@given(st.integers(1, 1000), st.integers(1, 12))
def test_schedule_of_the_cached_head(steps, depth):
  schedule = CachedSteps.of(steps, depth)
  executed = []
  for start, length in zip(schedule.starts, schedule.lengths):
    executed += range(start, start - length - 1, -1)
  assert executed == list(range(steps))[::-1]  # every step once, from the noisiest
  assert set(schedule.starts) == {steps - 1} | {i for i in range(steps) if i % INTERVAL == 0}
  for i, recomputed in enumerate(schedule.recomputed):
    assert recomputed == (i > RECOMPUTE_ABOVE * steps and i not in schedule.starts)
  assert schedule.kept == ((0, depth - 1) if depth > 1 else (0,))


def schedule(monkeypatch: pytest.MonkeyPatch, depth: int, **fields) -> CachedSteps:
  """Replaces some fields of the schedule that is used."""
  replaced = dataclasses.replace(CachedSteps.of(STEPS, depth), **fields)

  class Fixed:
    @staticmethod
    def of(steps: int, blocks: int) -> CachedSteps:
      assert (steps, blocks) == (STEPS, depth)
      return replaced

  monkeypatch.setattr(head_sampler, "CachedSteps", Fixed)
  return replaced


@pytest.mark.parametrize(("depth", "halves"), [(1, 1), (3, 2)])
def test_a_cache_of_full_steps_changes_nothing(monkeypatch, depth, halves):
  every = tuple(range(STEPS))[::-1]
  schedule(monkeypatch, depth, starts=every, lengths=(0,) * STEPS, recomputed=(False,) * STEPS)
  z = conditions(halves)
  expected = sample(*head(depth), z, halves)
  assert error(sample(*head(depth), z, halves, cached=True), expected) <= TOLERANCE


@pytest.mark.parametrize(("depth", "halves"), [(1, 2), (2, 1)])
def test_kept_blocks_that_are_always_recomputed_change_nothing(monkeypatch, depth, halves):
  """There are no others; and the halves do not differ, since their conditions are the same."""
  schedule(monkeypatch, depth, recomputed=(True,) * STEPS)
  z = np.tile(conditions(1), (halves, 1))
  expected = sample(*head(depth), z, halves)
  assert error(sample(*head(depth), z, halves, cached=True), expected) <= TOLERANCE


def test_the_cached_head_written_out():
  """Against the schedule step by step in numpy: three blocks, two of them kept, with guidance."""
  config, params = head(3)
  z, steps = conditions(2), CachedSteps.of(STEPS, 3)
  assert {True, False} == {steps.recomputed[i] for i in range(STEPS) if i not in steps.starts}
  weights = head_sampler.prepare(params, config, COEFFICIENTS.timestep[None], jnp.float32)
  weights = jax.tree.map(lambda x: np.asarray(x, np.float64), weights)
  dense = lambda w, x: x @ w["kernel"] + w["bias"]
  silu = lambda x: x / (1 + np.exp(-x))

  def norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

  def mlp(block, h, shift, scale):
    h = norm(h) * block["norm"]["scale"] + block["norm"]["bias"]
    return dense(block["fc2"], silu(dense(block["fc1"], h * (1 + scale) + shift)))

  cond, x = dense(weights.cond_embed, z), NOISE[0].astype(np.float64)
  stored = None
  for number, i in enumerate(reversed(range(STEPS))):
    full = i in steps.starts
    rows = slice(None) if full else slice(TOKENS)
    parts = np.split(dense(weights.modulation, silu(weights.time[0, i] + cond[rows])), 11, axis=-1)
    h = np.tile(dense(weights.input_proj, x), (2 if full else 1, 1))
    new = {}
    for b, block in enumerate(weights.blocks):
      shift, scale, gate = parts[3 * b : 3 * b + 3]
      if full or (b != 1 and steps.recomputed[i]):
        new[b] = mlp(block, h, shift, scale)
      else:
        new[b] = stored[b]
      h = h + (new[b] if b == 1 and not full else gate * new[b])  # the inner block's residual
      if full and b == 1:
        new[b] = gate * new[b]
    out = dense(weights.final_linear, norm(h) * (1 + parts[-1]) + parts[-2])
    if full:
      difference = out[TOKENS:, :2] - out[:TOKENS, :2]
    stored = {b: value[:TOKENS] for b, value in new.items()}
    out = out[:TOKENS]
    out = np.concatenate([out[:, :2] + (1 - 2) * difference, out[:, 2:]], axis=-1)
    c = jax.tree.map(lambda v, i=i: v[i], COEFFICIENTS)
    x = np.asarray(
      diffusion.ancestral_step(
        c, *(jnp.asarray(v, jnp.float32) for v in (x, out, NOISE[1 + number])), 0.8
      ),
      np.float64,
    )
  found = sample(config, params, z, 2, cached=True)
  assert error(found, x.astype(np.float32)) <= 10 * TOLERANCE
  assert error(sample(config, params, z, 2), x.astype(np.float32)) > 0.01  # the cache matters


# ---- DPM-Solver++


def test_a_step_of_dpm_is_exact_where_x0_is_known():
  """With the true x_0 predicted, x_t stays N(alpha x_0, sigma^2), however the steps are spaced."""
  c, process = COEFFICIENTS, PROCESS
  alpha, sigma = np.sqrt(process.alphas_cumprod), np.sqrt(1 - process.alphas_cumprod)
  to_alpha, to_sigma = np.append(1, alpha[:-1]), np.append(0, sigma[:-1])
  np.testing.assert_allclose(c.dpm_xt * alpha + c.dpm_x0, to_alpha, rtol=1e-6)
  np.testing.assert_allclose(
    (c.dpm_xt * sigma) ** 2 + c.dpm_noise**2, to_sigma**2, rtol=1e-5, atol=1e-9
  )
  assert c.dpm_slope[0] == c.dpm_slope[-1] == 0 and (c.dpm_slope[1:-1] > 0).all()


def solve(num_steps: int, order: int) -> float:
  """Error of denoising one of two points, 1 or -1, without noise, against the solution of the ODE.

  With u = alpha x / sigma^2 and r = (alpha / sigma)^2, x_0 is expected to be tanh(u), and without
  noise du/dr = tanh(u): sinh(u) grows by exp(r - r_0).
  """
  noisiest, last = 900, 330
  spaced = diffusion.log_snr_timesteps(1000, noisiest)
  snr = np.log(1 / make_process(spaced).alphas_cumprod - 1)
  indices = [np.abs(snr - wanted).argmin() for wanted in np.linspace(
    snr[np.abs(spaced - last).argmin()], snr[-1], num_steps + 1)]  # fmt: skip
  process = make_process(spaced[indices])
  coefficients = jax.tree.map(np.asarray, process.coefficients())
  alpha, sigma = np.sqrt(process.alphas_cumprod), np.sqrt(1 - process.alphas_cumprod)
  start = np.asarray([[0.01], [0.1], [1.0]])
  x = (start * sigma[-1] ** 2 / alpha[-1]).astype(np.float32)
  before = np.zeros_like(x)
  for i in range(num_steps, 0, -1):  # the step from index 0 would end at x_0
    c = jax.tree.map(lambda v, i=i: v[i], coefficients)
    if order == 1:
      c = dataclasses.replace(c, dpm_slope=np.float32(0))
    x0 = np.tanh(alpha[i] * x / sigma[i] ** 2)
    eps = (x - alpha[i] * x0) / sigma[i]
    out = np.concatenate([eps, np.full_like(eps, 7.0)], axis=-1).astype(np.float32)
    x, before = diffusion.dpm_step(c, x, out, before, np.full_like(x, 9.0), 0.0)
    x, before = np.asarray(x), np.asarray(before)
  ratio = (alpha / sigma) ** 2
  exact = np.arcsinh(np.sinh(start) * np.exp(ratio[0] - ratio[-1])) * sigma[0] ** 2 / alpha[0]
  return float(np.abs(x - exact).max())


def test_dpm_converges_to_second_order():
  """Twice the diffusion steps: a quarter of the error; half of it without the extrapolation."""
  errors = {order: [solve(n, order) for n in (10, 20, 40)] for order in (1, 2)}
  for order, found in errors.items():
    rate = math.log2(found[0] / found[2]) / 2
    assert order - 0.25 <= rate <= order + 0.75, errors
  assert all(second < first for first, second in zip(errors[1], errors[2]))


def test_the_loop_takes_the_steps_of_the_solver():
  """`sample` with dpm++ against the solver called step by step on the head's own outputs."""
  config, params = head(1)
  z = conditions(1)
  weights = head_sampler.prepare(params, config, COEFFICIENTS.timestep[None], jnp.float32)
  cond = z @ weights.cond_embed["kernel"] + weights.cond_embed["bias"]
  x, before = NOISE[0], np.zeros_like(NOISE[0])
  step = quick_jit(
    lambda c, i, x, before, noise: diffusion.dpm_step(
      c, x, head_sampler.denoise(
        weights, x, head_sampler.modulations(weights.modulation, weights.time[0][i][None], cond)[0]
      ), before, noise, 0.8,
    )
  )  # fmt: skip
  for number, i in enumerate(reversed(range(STEPS))):
    c = jax.tree.map(lambda v, i=i: v[i], COEFFICIENTS)
    x, before = step(c, i, x, before, NOISE[1 + number])
  found = sample(config, params, z, 1, solver="dpm++")
  assert error(found, np.asarray(x)) <= 10 * TOLERANCE
  assert error(sample(config, params, z, 1), np.asarray(x)) > 0.01  # another solver


# ---- tokens of much detail


@pytest.mark.parametrize("width", [12, 13])
def test_detail_is_weighted_by_frequency(width):
  z = np.random.default_rng(0).standard_normal((3, 5, width)).astype(np.float32)
  half = width // 2
  n = np.arange(1, half + 1)
  wave = np.exp(-2j * np.pi * n[:, None] * np.arange(width) / width)
  expected = (np.abs(z @ wave.T) * (1 + n / half)).sum(axis=-1)
  np.testing.assert_allclose(head_sampler.detail_scores(z), expected, rtol=1e-5)


def test_tokens_of_most_detail_get_steps_of_their_own():
  """Of two images, whose tokens of most detail differ; a slot without a token never counts."""
  config, params = head(1)
  slots, valid = 6, 4
  processes = [make_process(np.arange(n) * (600 // n)) for n in (3, 5)]
  padded = [jax.tree.map(lambda x: np.pad(x, (0, 5 - len(x))), p.coefficients()) for p in processes]
  tables = Tables(jax.tree.map(lambda *x: np.stack(x), *padded), np.float32(1))
  zero = {f.name: np.int32(0) for f in dataclasses.fields(Rows)}
  keys = state_lib.image_keys(jax.random.key(0), jnp.arange(2))
  predict = np.random.default_rng(1).permuted(np.tile(np.arange(16), (2, 1)), axis=1)[:, :slots]
  z = np.random.default_rng(2).standard_normal((2, 2, slots, 12)).astype(np.float32)
  z[:, :, valid:] *= 100  # most detail of all, but there is no token

  def run(shape: HeadShape, **fields) -> np.ndarray:
    row = Rows(**{**zero, "cfg": np.float32(2), "num_predict": np.int32(valid), **fields})
    inputs = Inputs(np.zeros(2, np.int32), keys)

    @quick_jit
    def tokens(params, z):
      weights = head_sampler.prepare(params, config, tables.coefficients.timestep, jnp.float32)
      return sampler.sample_tokens(weights, shape, row, tables, inputs, predict, z)

    return np.asarray(tokens(params, z))

  coarse = run(HeadShape(slots, 3))
  fine = run(HeadShape(slots, 5), process=np.int32(1))
  mixed = run(
    HeadShape(slots, 3, detail=3, detail_diffusion_steps=5),
    num_detail=np.int32(2),
    detail_process=np.int32(1),
  )
  scores = np.asarray(head_sampler.detail_scores(z[0]))[:, :valid]
  chosen = np.zeros((2, slots), bool)
  np.put_along_axis(chosen, np.argsort(-scores, axis=1)[:, :2], True, axis=1)
  assert (chosen[0] != chosen[1]).any()
  scale = fine[:, :valid].std()
  difference = np.abs(mixed - np.where(chosen[..., None], fine, coarse))[:, :valid].max()
  assert difference <= TOLERANCE * scale
  assert np.abs(fine - coarse)[:, :valid].max(axis=-1).min() > 0.01 * scale
