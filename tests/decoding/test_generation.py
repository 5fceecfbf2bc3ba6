"""The library call: what it depends on, what it keeps, what it refuses."""

from __future__ import annotations

import dataclasses

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from golden import quick_jit
from golden import quick_programs as quick_programs

from marche_jax import images
from marche_jax.benchmarking import profiling
from marche_jax.config import VAEConfig
from marche_jax.decoding import generation, pixels, plan_runner
from marche_jax.decoding import state as state_lib
from marche_jax.models import mar, vae
from marche_jax.planning.policies import make_plan
from marche_jax.weights.checkpoint import Model


@pytest.fixture(scope="module")
def model() -> Model:
  fresh = quick_jit(mar.init_params, static_argnums=0)(tiny.MODEL, jax.random.key(0))
  # The head starts with zero output and gates; random weights make its samples depend on z.
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), fresh)
  return Model(tiny.MODEL, params, sample_config=tiny.SAMPLE)


def test_an_image_does_not_depend_on_its_batch(model: Model) -> None:
  labels = np.asarray([0, 1, 2, 3])
  batch = generation.generate(model, labels, jax.random.key(5))
  assert batch.shape == (4, 1, 8, 8)
  ids = np.asarray([2])
  alone = generation.generate(model, labels[2:3], jax.random.key(5), image_ids=ids)
  np.testing.assert_allclose(alone[0], batch[2], atol=1e-3 * float(jnp.std(batch)))
  other = generation.generate(model, labels[2:3], jax.random.key(6), image_ids=ids)
  assert float(jnp.abs(other - alone).max()) > 0.1 * float(jnp.std(batch))


def test_the_label_matters(model: Model) -> None:
  a = generation.generate(model, [0], jax.random.key(0))
  b = generation.generate(model, [1], jax.random.key(0))
  assert float(jnp.abs(a - b).max()) > 1e-3 * float(jnp.std(a))


def test_known_tokens_are_kept(model: Model) -> None:
  rng = np.random.default_rng(0)
  tokens = rng.standard_normal((2, 16, 4)).astype(np.float32)
  mask = np.ones((2, 16), np.int32)
  mask[0, :6], mask[1, 4:10] = 0, 0
  latents = generation.generate(model, [0, 1], jax.random.key(0), known=(tokens, mask))
  out = np.asarray(mar.patchify(latents, tiny.MODEL))
  np.testing.assert_array_equal(out[mask == 0], tokens[mask == 0])
  assert (np.abs(out - tokens).max(axis=-1)[mask == 1] > 0).all()


def test_another_default_generator_changes_nothing(model: Model) -> None:
  """What compiles and draws by a seed is of one generator; the profile's keys are too."""
  key = state_lib.run_key(3)
  expected = generation.generate(model, [0, 1], key)
  runner = plan_runner.PlanRunner(make_plan(tiny.MODEL, tiny.SAMPLE))
  settings = generation.RunSettings(batch_size=2, seed=3)
  labels = np.asarray([0, 1], np.int32)
  with jax.default_prng_impl("rbg"):
    runner.compile(model.params, 2)
    drawn = generation.draw_batch(model, runner, labels, 0, settings)
    profiling.split(runner.plan, model.params, 2, jnp.float32, jnp.float32)
    with pytest.raises(ValueError, match="key: found one of rbg"):
      generation.generate(model, [0, 1], jax.random.key(3))
  np.testing.assert_array_equal(drawn.latents, expected)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"labels": [4]}, "labels: found 4, expected 0 to 3"),
    ({"labels": [-1]}, "labels: found -1"),
    ({"labels": []}, "labels"),
    ({"labels": [0.5]}, "labels"),
    ({"order": np.zeros((1, 16), np.int32)}, "order: expected a permutation"),
    ({"order": np.zeros((1, 5), np.int32)}, "order: found"),
    ({"image_ids": [1, 2]}, "image_ids"),
    ({"image_ids": [-1]}, "image_ids: found -1 to -1"),
    ({"image_ids": [2**32]}, "image_ids: found 4294967296"),
    ({"key": jax.random.PRNGKey(0)}, "key: expected one typed key"),
    ({"key": jax.random.split(jax.random.key(0))}, "key: expected one typed key"),
    ({"key": jax.random.key(0, impl="rbg")}, "key: found one of rbg, whose draws couple"),
    ({"key": jax.random.key(0, impl="unsafe_rbg")}, "key: found one of unsafe_rbg"),
    ({"known": (np.full((1, 16, 4), np.nan), np.ones((1, 16)))}, r"known\[0\]: found NaN"),
    ({"known": (np.zeros((1, 16, 4)), np.zeros((1, 16)))}, "known"),
    ({"noise": (np.zeros(3), np.zeros(3))}, "noise"),
  ],
)
def test_bad_arguments_are_named(model: Model, arguments: dict, message: str) -> None:
  call = {"labels": [0], "key": jax.random.key(0), **arguments}
  with pytest.raises(ValueError, match=message):
    generation.generate(model, **call)


def test_non_finite_latents_name_the_iteration(model: Model) -> None:
  head = dict(model.params["head"])
  head["final_linear"] = jax.tree.map(lambda x: x * jnp.nan, head["final_linear"])
  broken = dataclasses.replace(model, params={**model.params, "head": head})
  with pytest.raises(
    plan_runner.NonFiniteLatentsError, match=r"iteration 0 of 4, in images 0 of.*max_timestep"
  ):
    generation.generate(broken, [0], jax.random.key(0))


WITH_VAE = dataclasses.replace(
  tiny.MODEL, vae_stride=2, img_size=16, vae_embed_dim=2, latent_scale=0.5
)
VAE = VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=2, embed_dim=2, resolution=16)


@pytest.mark.parametrize("batch", [1, 3, 9])  # a part of, less and more than the autoencoder's
def test_images_are_decoded_in_parts(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(pixels, "VAE_BATCH", 4)
  params = golden.random_params(VAE)
  latents = jax.random.normal(jax.random.key(1), (batch, 2, 8, 8))
  decode = quick_jit(vae.decode, static_argnums=0)
  found = pixels.to_images(Model(WITH_VAE, {}, VAE, params), latents)
  expected = images.to_uint8(np.asarray(decode(VAE, params, latents / 0.5)))
  assert found.shape == (batch, 16, 16, 3)
  assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1  # of rounding


def test_latents_need_an_autoencoder() -> None:
  config = dataclasses.replace(tiny.MODEL, vae_stride=2, img_size=16)
  with pytest.raises(ValueError, match="--kind=vae"):
    pixels.to_images(Model(config, {}), jnp.zeros((1, 1, 8, 8)))
