"""The training loss: parity with the PyTorch reference, and its random draws."""

from __future__ import annotations

import dataclasses
import functools
import math

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import by_path, load, quick_jit
from golden import exact_matmuls as exact_matmuls
from hypothesis import given, settings
from hypothesis import strategies as st

from marche_jax.models.mar import patchify
from marche_jax.training import losses

LOSS_TOLERANCE = 1e-5  # relative
GRADIENT_TOLERANCE = 1e-4  # relative to the gradient's own norm


@functools.partial(jax.jit, static_argnums=1)
def value_and_grad(params, config, tokens, labels, draws):
  loss = jax.value_and_grad(losses.training_loss, has_aux=True)
  return loss(params, config, tokens, labels, draws)


def recorded():
  """Parameters, configuration, tokens, labels and draws of `training.npz`, and the arrays."""
  config, params = golden.model("mar_tiny")
  t = load("mar_tiny/training.npz")
  draws = losses.Draws(t["mask"], np.zeros(3, bool), t["t"], t["noise"])
  tokens = np.asarray(patchify(t["imgs"], config))
  return (params, config, tokens, t["labels"], draws), t


@pytest.fixture(scope="module")
def evaluated():
  arguments, _ = recorded()
  return value_and_grad(*arguments)


def test_loss_parity(evaluated):
  (loss, terms), _ = evaluated
  _, t = recorded()
  assert abs(loss / t["loss"] - 1) <= LOSS_TOLERANCE
  np.testing.assert_allclose(terms["mse"] + terms["vb"], loss, rtol=1e-6)
  assert terms["mse"] > 0.1 and terms["vb"] > 0.01  # both count


def test_gradient_parity(evaluated):
  _, gradients = evaluated
  (_, config, *_), t = recorded()
  reference = golden.from_reference(
    config, {k.removeprefix("grad/"): v for k, v in t.items() if k.startswith("grad/")}
  )
  ours = by_path(gradients)
  compared = 0
  for path, theirs in by_path(reference).items():
    if path == "fake_latent":  # no label was dropped
      assert not theirs.any() and not np.any(ours[path])
      continue
    layers = theirs if "blocks" in path else theirs[None]
    for layer, expected in enumerate(layers):  # one tensor of the reference
      found = np.asarray(ours[path] if "blocks" not in path else ours[path][layer])
      norm = np.linalg.norm(expected)
      assert norm > 0, path
      assert np.linalg.norm(found - expected) <= GRADIENT_TOLERANCE * norm, (path, layer)
      compared += 1
  assert compared == sum(k.startswith("grad/") for k in t) - 1


def test_dropped_labels_train_the_unconditional_embedding(evaluated):
  (params, config, tokens, labels, draws), _ = recorded()
  dropped = draws.replace(dropped=np.asarray([True, False, True]))
  (loss, _), gradients = value_and_grad(params, config, tokens, labels, dropped)
  assert loss != evaluated[0][0]
  assert np.any(gradients["fake_latent"])
  used = np.abs(gradients["class_emb"]["embedding"]).max(axis=1) > 0
  assert used.nonzero()[0].tolist() == [labels[1]]


def test_visible_tokens_do_not_count(evaluated):
  """Noise and timesteps of visible tokens change neither the loss nor its gradient."""
  (params, config, tokens, labels, draws), _ = recorded()
  visible = np.tile(draws.mask.reshape(-1) == 0, config.diffusion_batch_mul)
  assert 0 < visible.sum() < visible.size
  noise, timesteps = draws.noise.copy(), draws.timesteps.copy()
  noise[visible], timesteps[visible] = 1e3, 999
  changed = draws.replace(noise=noise, timesteps=timesteps)
  (loss, _), gradients = value_and_grad(params, config, tokens, labels, changed)
  assert float(loss) == float(evaluated[0][0])
  for path, leaf in by_path(gradients).items():
    np.testing.assert_array_equal(leaf, by_path(evaluated[1])[path])


def test_remat_computes_the_same(evaluated):
  arguments, _ = recorded()
  remat = functools.partial(losses.training_loss, remat=True)
  gradients = quick_jit(jax.grad(remat, has_aux=True), static_argnums=1)(*arguments)[0]
  theirs = by_path(evaluated[1])
  for path, leaf in by_path(gradients).items():
    assert np.linalg.norm(leaf - theirs[path]) <= GRADIENT_TOLERANCE * np.linalg.norm(theirs[path])


def test_dropout_is_drawn_from_its_key(evaluated):
  arguments, _ = recorded()
  run = quick_jit(losses.training_loss, static_argnums=1)
  first, again, other = (
    float(run(*arguments, dropout_key=jax.random.key(seed))[0]) for seed in (0, 0, 1)
  )
  assert first == again != other
  assert first != float(evaluated[0][0])


def test_bfloat16_stays_close(evaluated):
  """The diffusion arithmetic stays float32, so only the network's rounding is left."""
  arguments, _ = recorded()
  narrow = functools.partial(losses.training_loss, dtype=jnp.bfloat16)
  loss, _ = quick_jit(narrow, static_argnums=1)(*arguments)
  assert loss.dtype == jnp.float32
  assert 0 < abs(float(loss) / float(evaluated[0][0]) - 1) < 0.05


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31 - 1), st.sampled_from([0.0, 0.7]))
def test_draws(seed, mask_ratio_min):
  config = dataclasses.replace(golden.model("mar_tiny")[0], mask_ratio_min=mask_ratio_min)
  draws = _draw(jax.random.key(seed), config, 3)
  s = config.seq_len
  masked = draws.mask.sum(axis=1)
  assert set(np.unique(draws.mask)) <= {0.0, 1.0}
  assert (masked == masked[0]).all()  # one ratio per batch
  assert math.ceil(s * mask_ratio_min) <= masked[0] <= s
  assert s - masked[0] <= losses.max_visible(config)
  assert draws.timesteps.shape == (2 * 3 * s,) and draws.noise.shape == (2 * 3 * s, 4)
  assert draws.timesteps.min() >= 0 and draws.timesteps.max() <= 999


_draw = quick_jit(losses.draw, static_argnums=(1, 2))


def test_draws_have_the_papers_distribution():
  config = dataclasses.replace(golden.model("mar_tiny")[0], label_drop_prob=0.25)
  keys = jax.random.split(jax.random.key(0), 2000)
  draws = quick_jit(jax.vmap(lambda key: losses.draw(key, config, 2)))(keys)
  ratio = np.asarray(draws.mask.mean(axis=2))[:, 0]
  # Normal(1, 0.25) cut to [0.7, 1]: mean 1 - 0.25 * (phi(0) - phi(1.2)) / (Phi(0) - Phi(-1.2));
  # rounding up to whole tokens adds half a token.
  expected = 1 - 0.25 * (0.39894 - 0.19419) / (0.5 - 0.11507) + 0.5 / config.seq_len
  assert abs(ratio.mean() - expected) < 0.006
  assert abs(float(draws.dropped.mean()) - 0.25) < 0.03
  assert abs(float(draws.timesteps.mean()) - 499.5) < 3
  assert abs(float(draws.noise.mean())) < 0.01 and abs(float(draws.noise.std()) - 1) < 0.01
  everywhere = np.asarray(draws.mask.mean(axis=(0, 1)))
  assert np.ptp(everywhere) < 0.05  # no position is favoured
  assert (np.asarray(draws.mask)[:, 0] != np.asarray(draws.mask)[:, 1]).any(axis=1).mean() > 0.9
