"""The diffusion process: schedules against the reference, and the arithmetic's properties."""

from __future__ import annotations

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from golden import DATA, load, quick_jit
from golden import exact_matmuls as exact_matmuls
from hypothesis import given
from hypothesis import strategies as st

from marche_jax.models import diffusion
from marche_jax.models.diffusion import make_process, respaced_timesteps

TABLE_TOLERANCE = 1e-12

ancestral_step = quick_jit(diffusion.ancestral_step)
guide = quick_jit(diffusion.guide)
training_terms = quick_jit(diffusion.training_terms)


def at(process: diffusion.Process, index) -> diffusion.Coefficients:
  return process.coefficients().at(jnp.asarray(index))


def test_schedules_equal_the_reference():
  golden = load("mar_tiny/schedule.npz")
  process = make_process(respaced_timesteps(20))
  np.testing.assert_array_equal(process.timesteps, golden["timestep_map"])
  for ours, name in (
    (process.betas, "betas"),
    (process.alphas_cumprod, "alphas_cumprod"),
    (diffusion.cosine_betas(), "train_betas"),
  ):
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, golden[name], rtol=0, atol=TABLE_TOLERANCE)


def test_clipped_timesteps_equal_disa():
  """DiSA's released timesteps: 50 falling to 5 steps, none noisier than 950."""
  golden = json.loads((DATA / "peers" / "disa_timesteps.json").read_text())
  for iterations, rows in golden.items():
    n = int(iterations)
    assert len(rows) == n
    for k, row in enumerate(rows):
      steps = 5 + math.floor(45 * (n - 1 - k) / (n - 1))
      assert respaced_timesteps(steps, 950).tolist() == row


@given(st.integers(1, 1000), st.integers(0, 999))
def test_respacing(num_steps, max_timestep):
  kept = respaced_timesteps(num_steps, max_timestep)
  assert kept.dtype == np.int64
  assert 1 <= len(kept) <= num_steps
  assert kept[0] == 0 and kept[-1] <= max_timestep
  assert (np.diff(kept) > 0).all()
  if max_timestep == 999:
    assert len(kept) == num_steps
    assert num_steps == 1 or kept[-1] == 999
    assert np.diff(kept).max(initial=1) - np.diff(kept).min(initial=999) <= 1 or num_steps <= 2


@given(st.integers(1, 200), st.sampled_from([999, 950, 20]))
def test_respaced_process_keeps_the_noise_levels(num_steps, max_timestep):
  """Whatever is skipped, a kept step is as noisy as it was in training."""
  process = make_process(respaced_timesteps(num_steps, max_timestep))
  train = make_process()
  # 1 - beta carries a rounding error of up to one unit of 1.0, which shows where alpha is 1e-9.
  expected = train.alphas_cumprod[process.timesteps]
  np.testing.assert_allclose(process.alphas_cumprod, expected, rtol=1e-9, atol=2.3e-16)
  coefficients = process.coefficients()
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(coefficients))
  assert coefficients.noise[0] == 0 and (coefficients.noise[1:] == 1).all()
  assert (coefficients.min_log_variance <= coefficients.max_log_variance + 1e-6).all()


def test_noisiest_step_amplifies_errors():
  """The reason for `max_timestep`: factors on the error of eps, as DESIGN.md states them."""
  factor = make_process().coefficients().sqrt_recip_alpha_minus_one
  np.testing.assert_allclose(factor[[999, 998, 989, 950]], [2e4, 642, 64, 13], rtol=0.05)


def test_all_training_timesteps_are_the_default():
  process = make_process()
  np.testing.assert_array_equal(process.timesteps, np.arange(1000))
  np.testing.assert_allclose(process.betas, diffusion.cosine_betas(), rtol=0, atol=1e-12)
  assert process.betas.max() <= diffusion.MAX_BETA + 1e-12


def test_one_step_returns_the_predicted_x0():
  """At step 0 the posterior mean is x_0 itself, and no noise is added."""
  rng = np.random.default_rng(0)
  x0, noise = rng.standard_normal((2, 5, 3), np.float32)
  for process in (make_process(), make_process(respaced_timesteps(1))):
    c = at(process, 0)
    xt = c.sqrt_alpha * x0 + c.sqrt_one_minus_alpha * noise
    out = jnp.concatenate([noise, np.ones_like(noise)], axis=-1)
    done = ancestral_step(c, xt, out, np.full_like(x0, 1e3), 1.0)
    np.testing.assert_allclose(done, x0, atol=1e-5)


def test_ancestral_step_has_the_posterior_distribution():
  """With the true eps: mean of q(x_{t-1} | x_t, x_0), and noise scaled by the temperature."""
  process = make_process(respaced_timesteps(20))
  rng = np.random.default_rng(0)
  x0, noise, fresh = rng.standard_normal((3, 4, 3), np.float32)
  for index in (1, 10, 19):
    c = at(process, index)
    xt = c.sqrt_alpha * x0 + c.sqrt_one_minus_alpha * noise
    for coefficient, log_variance in ((-1.0, c.min_log_variance), (1.0, c.max_log_variance)):
      out = jnp.concatenate([noise, np.full_like(noise, coefficient)], axis=-1)
      mean = ancestral_step(c, xt, out, fresh, 0.0)
      np.testing.assert_allclose(mean, c.mean_x0 * x0 + c.mean_xt * xt, atol=2e-3)
      noisy = ancestral_step(c, xt, out, fresh, 0.5)
      expected = 0.5 * np.exp(0.5 * float(log_variance)) * fresh
      np.testing.assert_allclose(noisy - mean, expected, atol=2e-5)


def test_guidance_moves_eps_and_keeps_the_conditional_variance():
  cond, uncond = np.random.default_rng(0).standard_normal((2, 4, 6), np.float32)
  np.testing.assert_allclose(guide(cond, uncond, 1.0), cond, atol=1e-6)
  for scale in (0.0, 3.0):
    out = guide(cond, uncond, scale)
    expected = uncond[:, :3] + scale * (cond[:, :3] - uncond[:, :3])
    np.testing.assert_allclose(out[:, :3], expected, atol=1e-6)
    np.testing.assert_array_equal(out[:, 3:], cond[:, 3:])


def test_bound_trains_the_variance_only():
  rng = np.random.default_rng(0)
  x0, noise = rng.standard_normal((2, 5, 3), np.float32)
  c = at(make_process(), [0, 1, 250, 700, 998])
  xt = diffusion.add_noise(c, x0, noise)
  out = rng.standard_normal((5, 6), np.float32)

  @functools.partial(quick_jit, static_argnums=1)
  @jax.grad
  def gradient(out, term):
    return jnp.sum(diffusion.training_terms(c, x0, xt, noise, out)[term])

  mse, vb = (np.asarray(gradient(out, term)) for term in (0, 1))
  assert (mse[:, :3] != 0).all() and (mse[:, 3:] == 0).all()
  assert (vb[:, :3] == 0).all() and (vb[1:, 3:] != 0).all()


def test_bound_is_zero_for_the_true_posterior():
  """KL of the exact eps and the smallest variance, which is the posterior's."""
  rng = np.random.default_rng(0)
  x0, noise = rng.standard_normal((2, 3, 4), np.float32)
  c = at(make_process(), [5, 250, 700])
  xt = diffusion.add_noise(c, x0, noise)
  out = np.concatenate([noise, -np.ones_like(noise)], axis=-1)
  mse, vb = training_terms(c, x0, xt, noise, out)
  np.testing.assert_array_equal(mse, 0)
  np.testing.assert_allclose(vb, 0, atol=1e-5)


def test_discretised_likelihood_is_a_distribution():
  """At t = 0 the 256 bins of width 2/255, the outer two open-ended, have probability 1."""
  values = np.linspace(-1, 1, 256, dtype=np.float32)[:, None]
  c = at(make_process(), np.zeros(256, int))
  xt = np.full_like(values, 0.3)
  for coefficient in (-1.0, 1.0):
    out = np.concatenate([np.zeros_like(values), np.full_like(values, coefficient)], axis=-1)
    _, bits = training_terms(c, values, xt, np.zeros_like(values), out)
    probability = np.exp2(-np.asarray(bits, np.float64))
    assert abs(probability.sum() - 1) < 1e-5
    assert 0.29 < float(values[probability.argmax(), 0]) < 0.32
