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
from marche_jax.config import SampleConfig, VAEConfig
from marche_jax.decoding import generation, pixels, plan_runner
from marche_jax.decoding import state as state_lib
from marche_jax.decoding.given import plan_around
from marche_jax.models import mar, vae
from marche_jax.planning.policies import check_sample, make_plan
from marche_jax.weights.checkpoint import Model

KEY = jax.random.key(0)


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


def test_what_stands_at_unknown_positions_is_not_read(model: Model) -> None:
  """The whole result is the same; 14 of 16 tokens leave fewer iterations than the model's four."""
  tokens = np.random.default_rng(0).standard_normal((1, 16, 4)).astype(np.float32)
  mask = np.zeros((1, 16), np.int32)
  mask[0, [3, 8]] = 1
  drawn = []
  for other in (0.0, np.nan, np.inf):
    given = np.where(mask[..., None] == 1, np.float32(other), tokens)
    drawn.append(generation.generate(model, [0], KEY, known=(given, mask)))
  np.testing.assert_array_equal(drawn[1], drawn[0])
  np.testing.assert_array_equal(drawn[2], drawn[0])
  out = np.asarray(mar.patchify(drawn[0], tiny.MODEL))
  np.testing.assert_array_equal(out[mask == 0], tokens[mask == 0])
  assert np.isfinite(out).all() and (out[mask == 1] != 0).all()


def test_the_models_own_settings_go_unread_without_a_word(model: Model) -> None:
  """Under another policy: nobody asked for them."""
  own = dataclasses.replace(tiny.SAMPLE, policy="turbo")
  check_sample(own, model.sample_config)
  check_sample(SampleConfig(policy="turbo", num_iter=5), model.sample_config)
  with pytest.raises(ValueError, match=r"sample\.num_sampling_steps is not read by turbo"):
    check_sample(own, None)
  with pytest.raises(ValueError, match=r"sample\.num_sampling_steps is not read by turbo"):
    generation.generate(dataclasses.replace(model, sample_config=None), [0], KEY, own)


def test_colours_of_a_checkerboard_that_are_unevenly_known(model: Model) -> None:
  """An order of GtR's cannot be one for all images then; another can, or one that is given."""
  mask = np.ones((2, 16), np.int32)
  mask[0, [1, 3]], mask[1, [1, 2]] = 0, 0  # of the first row, odd columns: two and one
  known = (np.zeros((2, 16, 4), np.float32), mask)
  sample = dataclasses.replace(tiny.SAMPLE, policy="gtr")
  with pytest.raises(ValueError, match=r"known\[1\]: found 1 to 2 known .*'gtr', which reveals"):
    plan_around(tiny.MODEL, sample, 2, known)
  assert plan_around(tiny.MODEL, tiny.SAMPLE, 2, known).rows[0].num_known == 2
  ordered = plan_around(tiny.MODEL, sample, 2, known, ordered=True)
  assert ordered == make_plan(tiny.MODEL, sample, 2)
  mask[1] = mask[0]
  assert plan_around(tiny.MODEL, sample, 2, known) == make_plan(tiny.MODEL, sample, 2, 2)


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
    ({"known": (np.full((1, 16, 4), np.nan), np.arange(16)[None] > 0)}, r"known\[0\]: found NaN"),
    (
      {"known": np.zeros((2, 1, 16))},
      r"known: found ndarray of shape \[2, 1, 16\], expected a pair",
    ),
    ({"known": (np.zeros((1, 16, 4)),)}, "known: found tuple, expected a pair: tokens"),
    ({"noise": np.zeros(3)}, r"noise: found ndarray of shape \[3\], expected a pair: initial"),
    ({"sample_config": {"num_iter": 4}}, "sample_config: found dict, expected marche_jax.Sample"),
    ({"sample_config": tiny.MODEL}, "sample_config: found ModelConfig"),
    ({"sample_config": SampleConfig(num_iter=17)}, "num_iter=17: expected 1 to 16"),
    (
      {"sample_config": SampleConfig(num_iter=4, policy="turbo", num_sampling_steps=5)},
      r"sample\.num_sampling_steps is not read by turbo: turbo brings its own",
    ),
    (
      {"sample_config": SampleConfig(num_iter=4, cfg=1.0, cfg_schedule="constant")},
      r"sample\.cfg_schedule is not read: sample\.cfg=1 switches guidance off",
    ),
    (
      {"sample_config": SampleConfig(num_iter=4, active_size=9)},
      r"sample\.active_size is a field of marche, which full does not read",
    ),
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


@pytest.mark.parametrize(
  ("latents", "found"),
  [
    (np.zeros((1, 1, 8, 9)), r"float64 \[1, 1, 8, 9\]"),
    (np.zeros((1, 8, 8)), r"float64 \[1, 8, 8\]"),
    (np.zeros((0, 1, 8, 8)), r"float64 \[0, 1, 8, 8\]"),
    (np.zeros((1, 1, 8, 8), np.uint8), r"uint8 \[1, 1, 8, 8\]"),
  ],
)
def test_latents_of_another_kind(model: Model, latents: np.ndarray, found: str) -> None:
  with pytest.raises(
    ValueError, match=rf"latents: found {found}, expected floats of shape \[B, 1, 8, 8\]"
  ):
    pixels.to_images(model, latents)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, jnp.bfloat16])
def test_latents_of_any_float(model: Model, dtype: np.dtype) -> None:
  found = pixels.to_images(model, np.full((1, 1, 8, 8), 0.5, dtype))
  np.testing.assert_array_equal(found, np.full((1, 8, 8, 1), 191, np.uint8))
