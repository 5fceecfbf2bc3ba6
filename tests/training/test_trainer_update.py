"""One update of the optimizer against the PyTorch reference, and what surrounds it."""

from __future__ import annotations

import dataclasses
import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import by_path, load, quick_jit
from golden import exact_matmuls as exact_matmuls

from marche_jax.config import Config, ModelConfig, TrainConfig
from marche_jax.models.mar import patchify
from marche_jax.training import losses, trainer

STEP_TOLERANCE = 1e-5  # absolute
NORM_TOLERANCE = 1e-5  # relative
RATE = 1e-3  # of the recorded update

FIRST = TrainConfig(batch_size=4, blr=0.064, warmup_epochs=2, epochs=10, ema_rate=0.75)


@functools.partial(jax.jit, static_argnums=0)
def step(rate, params, gradients):
  optimizer = trainer.make_optimizer(TrainConfig(), rate)
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  return optax.apply_updates(params, updates), optax.tree.norm(gradients)


def recorded_step():
  """Parameters after the reference's update, and the norm of its gradient."""
  arrays = load("mar_tiny/optimizer_step.npz")
  norm = arrays.pop("grad_norm")
  return golden.from_reference(golden.model("mar_tiny")[0], arrays), norm


def check_step(updated, norm, *, exact_key_bias: bool) -> None:
  expected, expected_norm = recorded_step()
  assert abs(norm / expected_norm - 1) <= NORM_TOLERANCE
  assert expected_norm > TrainConfig().grad_clip  # so that clipping is tested
  found = by_path(updated)
  for path, theirs in by_path(expected).items():
    if path == "fake_latent":  # torch leaves a parameter without gradient alone, decay included
      continue
    ours = np.asarray(found[path])
    if path.endswith("qkv/bias") and not exact_key_bias:  # exact gradient 0: only rounding decides
      query, _, value = np.split(ours, 3, axis=1)
      ours, theirs = np.stack([query, value]), np.stack(np.split(theirs, 3, axis=1)[::2])
    assert np.abs(ours - theirs).max() <= STEP_TOLERANCE, path


def test_update_from_the_recorded_gradients():
  config, params = golden.model("mar_tiny")
  t = load("mar_tiny/training.npz")
  gradients = golden.from_reference(
    config, {k.removeprefix("grad/"): v for k, v in t.items() if k.startswith("grad/")}
  )
  check_step(*step(RATE, params, gradients), exact_key_bias=True)


def test_update_from_our_gradients():
  config, params = golden.model("mar_tiny")
  t = load("mar_tiny/training.npz")
  draws = losses.Draws(t["mask"], np.zeros(3, bool), t["t"], t["noise"])
  loss = quick_jit(jax.grad(losses.training_loss, has_aux=True), static_argnums=1)
  gradients, _ = loss(params, config, patchify(t["imgs"], config), t["labels"], draws)
  assert not np.any(gradients["fake_latent"])
  check_step(*step(RATE, params, gradients), exact_key_bias=False)


def test_weight_decay_spares_biases_vectors_and_the_head():
  _, params = golden.model("mar_tiny")
  decayed = {path for path, decays in by_path(trainer.decay_mask(params)).items() if decays}
  stacks = {
    f"{stack}_blocks/{layer}/kernel"
    for stack in ("encoder", "decoder")
    for layer in ("qkv", "proj", "fc1", "fc2")
  }
  assert decayed == stacks | {
    "class_emb/embedding", "fake_latent", "z_proj/kernel", "encoder_pos_embed_learned",
    "decoder_embed/kernel", "mask_token", "decoder_pos_embed_learned",
    "diffusion_pos_embed_learned",
  }  # fmt: skip


@pytest.mark.parametrize("shape", ["constant", "cosine"])
def test_learning_rate(shape):
  """Linear from zero over the warm-up to blr * batch / 256 = 1e-3."""
  config = dataclasses.replace(FIRST, lr_schedule=shape)
  rate = trainer.learning_rate(config, updates_per_epoch=5)
  np.testing.assert_allclose([rate(0), rate(5), rate(10)], [0, 5e-4, 1e-3], atol=1e-9)
  middle, end = {"constant": (1e-3, 1e-3), "cosine": (5e-4, 0)}[shape]
  np.testing.assert_allclose([rate(30), rate(50)], [middle, end], atol=1e-9)


def test_no_warm_up_starts_at_the_full_rate():
  rate = trainer.learning_rate(dataclasses.replace(FIRST, warmup_epochs=0), updates_per_epoch=5)
  np.testing.assert_allclose([rate(0), rate(1)], 1e-3, atol=1e-9)


def make_update(train: TrainConfig, model: ModelConfig):
  """A jitted `update` with a constant rate, and its optimizer."""
  config = Config(model=model, vae=None, train=train)
  optimizer = trainer.make_optimizer(train, RATE)
  run = quick_jit(functools.partial(trainer.update, config=config, optimizer=optimizer))
  return run, optimizer


@pytest.fixture(scope="module")
def updating():
  """An update of the small golden model, a state, and a batch."""
  model, params = golden.model("mar_patch2")
  run, optimizer = make_update(FIRST, model)
  state = trainer.TrainState(jnp.zeros((), jnp.int32), params, params, optimizer.init(params))
  rng = np.random.default_rng(0)
  moments = rng.standard_normal((4, 2 * model.latent_shape[0], *model.latent_shape[1:]), np.float32)
  return run, state, {"moments": moments, "labels": np.asarray([0, 1, 2, 4], np.int32)}


def test_update_advances_everything(updating):
  run, state, batch = updating
  after, metrics = run(state, batch)
  assert int(after.step) == 1
  assert all(np.isfinite(float(value)) for value in metrics.values())
  np.testing.assert_allclose(metrics["loss"], metrics["mse"] + metrics["vb"], rtol=1e-6)
  for path, ema in by_path(after.ema).items():
    old, new = by_path(state.ema)[path], by_path(after.params)[path]
    np.testing.assert_allclose(ema, 0.75 * old + 0.25 * new, atol=1e-6)
    assert np.abs(new - old).max() > 0, path


def test_bfloat16_and_remat_train(updating):
  _, state, batch = updating
  train = dataclasses.replace(FIRST, dtype="bfloat16", remat=True)
  run, _ = make_update(train, golden.model("mar_patch2")[0])
  for _ in range(5):
    state, _ = run(state, batch)
  assert all(x.dtype == np.float32 for x in jax.tree.leaves(state.params))
  assert all(bool(np.isfinite(x).all()) for x in jax.tree.leaves(state.ema))


def test_update_is_a_function_of_seed_and_step(updating):
  run, state, batch = updating
  first, again = run(state, batch), run(state, batch)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  later = run(state.replace(step=jnp.ones((), jnp.int32)), batch)
  assert float(later[1]["loss"]) != float(first[1]["loss"])


def test_posterior_is_sampled(updating):
  """Moments are [mean, log variance]: without variance, the mean is what the images would be."""
  run, state, batch = updating
  mean, logvar = np.split(batch["moments"], 2, axis=1)
  wide = run(state, batch)[1]["loss"]
  narrow = {**batch, "moments": np.concatenate([mean, np.full_like(logvar, -30)], axis=1)}
  exact = run(state, {"images": mean, "labels": batch["labels"]})[1]["loss"]
  np.testing.assert_allclose(run(state, narrow)[1]["loss"], exact, rtol=1e-4)
  assert abs(float(wide) / float(exact) - 1) > 1e-3
