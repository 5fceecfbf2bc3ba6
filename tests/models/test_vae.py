"""The KL autoencoder against the PyTorch reference, and its properties."""

from __future__ import annotations

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import quick_jit
from rule import rule_weights

from marche_jax.config import VAEConfig
from marche_jax.models import vae

DATA = pathlib.Path(__file__).parents[1] / "data"
TINY = VAEConfig(**json.loads((DATA / "vae_tiny" / "config.json").read_text()))
TOLERANCE = 1e-4  # maximum absolute error over the reference's standard deviation


@pytest.fixture(autouse=True)
def _exact_matmuls():
  with jax.default_matmul_precision("highest"):
    yield


def load(name: str) -> dict[str, np.ndarray]:
  with np.load(DATA / name, allow_pickle=False) as arrays:
    return dict(arrays)


def to_params(config: VAEConfig, weights: dict[str, np.ndarray]) -> vae.Params:
  """Our tree from weights under the reference's names; every one is consumed and shape-checked."""
  left = dict(weights)

  def take(path, leaf):
    w = left.pop(vae.torch_name(tuple(key.key for key in path)))
    w = w.transpose(2, 3, 1, 0) if w.ndim == 4 else w
    assert w.shape == leaf.shape and w.dtype == leaf.dtype
    return w

  params = jax.tree_util.tree_map_with_path(take, vae.abstract_params(config))
  assert not left
  return params


def error(ours: jax.Array, golden: np.ndarray) -> float:
  assert ours.shape == golden.shape and ours.dtype == golden.dtype
  return float(np.max(np.abs(np.asarray(ours) - golden)) / np.std(golden))


def to_images(images_u8: np.ndarray) -> np.ndarray:
  """uint8 [B, 3, H, W] -> float32 [B, H, W, 3] in [-1, 1]."""
  return images_u8.transpose(0, 2, 3, 1).astype(np.float32) / 127.5 - 1


@pytest.fixture(scope="module")
def tiny() -> vae.Params:
  return to_params(TINY, load("vae_tiny/kl.npz"))


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
  return load("vae_tiny/vae.npz")


encode = jax.jit(vae.encode, static_argnums=(0, 3))
decode = jax.jit(vae.decode, static_argnums=(0, 3))
quick_encode = quick_jit(vae.encode, static_argnums=(0, 3))
quick_decode = quick_jit(vae.decode, static_argnums=(0, 3))


def test_encoder_matches_the_reference(tiny, golden):
  posterior = encode(TINY, tiny, to_images(golden["images_u8"]))
  for name in ("moments", "mean", "std"):
    assert error(getattr(posterior, name), golden[name]) <= TOLERANCE, name


def test_decoder_matches_the_reference(tiny, golden):
  images = decode(TINY, tiny, golden["latents"])
  assert error(images, golden["decoded"].transpose(0, 2, 3, 1)) <= TOLERANCE


def test_decoder_on_the_references_mean_matches_its_reconstruction(tiny, golden):
  images = decode(TINY, tiny, golden["mean"])
  assert error(images, golden["reconstruction"].transpose(0, 2, 3, 1)) <= TOLERANCE


def test_reconstruction_matches_the_reference_in_float64(tiny, golden):
  """From image to image, in float64, where only the reference's own rounding is left.

  In float32 this composition has no 1e-4 to give. The encoder's rounding (1e-5) is amplified
  tenfold by the decoder: the reference's array is 9.7e-5 from the exact value of its own formula,
  and PyTorch misses it by 3.4e-4 when it merely lays out its memory otherwise (channels last).
  """
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda w: w.astype(np.float64), tiny)
    images = to_images(golden["images_u8"]).astype(np.float64)
    model = vae.AutoencoderKL(TINY, jnp.float64)
    ours = np.asarray(jax.jit(model.apply)({"params": wide}, images))
  assert ours.dtype == np.float64
  expected = golden["reconstruction"].transpose(0, 2, 3, 1).astype(np.float64)
  assert error(ours, expected) <= TOLERANCE


def test_stored_weights_are_those_of_the_checkpoint():
  torch = pytest.importorskip("torch")
  checkpoint = torch.load(DATA / "vae_tiny" / "kl.ckpt", weights_only=True)["model"]
  stored = load("vae_tiny/kl.npz")
  assert stored.keys() == checkpoint.keys()
  for name, tensor in checkpoint.items():
    np.testing.assert_array_equal(stored[name], tensor.numpy(), err_msg=name, strict=True)


def test_names_and_shapes_are_those_of_the_published_kl16():
  manifest = json.loads((DATA / "manifests" / "kl16.json").read_text())
  ours = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(vae.abstract_params(VAEConfig())):
    keys = tuple(key.key for key in path)
    order = (3, 2, 0, 1) if keys[-1] == "kernel" else range(leaf.ndim)
    name = vae.torch_name(keys)
    assert name not in ours
    ours[name] = [leaf.shape[axis] for axis in order]
  assert ours == manifest


@pytest.mark.slow
def test_full_size_kl16_matches_the_reference():
  manifest = json.loads((DATA / "manifests" / "kl16.json").read_text())
  golden = load("rule/kl16.npz")
  params = to_params(VAEConfig(), rule_weights(manifest))
  posterior = encode(VAEConfig(), params, to_images(golden["images_u8"]))
  assert error(posterior.moments, golden["moments"]) <= TOLERANCE
  images = decode(VAEConfig(), params, golden["latents"])
  expected = golden["decoded_stride4"].transpose(0, 2, 3, 1)
  assert error(images[:, ::4, ::4], expected) <= TOLERANCE


@pytest.mark.parametrize(
  ("path", "name"),
  [
    (("encoder", "down_0_block_1", "conv1", "kernel"), "encoder.down.0.block.1.conv1.weight"),
    (("encoder", "down_2_attn_0", "proj_out", "bias"), "encoder.down.2.attn.0.proj_out.bias"),
    (("encoder", "down_1_downsample", "conv", "bias"), "encoder.down.1.downsample.conv.bias"),
    (("decoder", "up_1_upsample", "conv", "kernel"), "decoder.up.1.upsample.conv.weight"),
    (("decoder", "mid_attn_1", "norm", "scale"), "decoder.mid.attn_1.norm.weight"),
    (("post_quant_conv", "kernel"), "post_quant_conv.weight"),
  ],
)
def test_torch_name(path, name):
  assert vae.torch_name(path) == name


def test_torch_name_refuses_other_leaves():
  with pytest.raises(ValueError, match="embedding"):
    vae.torch_name(("encoder", "embedding"))


def test_sample_has_the_posteriors_moments():
  mean = np.array([-3.0, 0.5], np.float32)
  logvar = np.array([-2.0, 1.0], np.float32)
  moments = np.broadcast_to(np.concatenate([mean, logvar])[None, :, None, None], (2, 4, 200, 200))
  posterior = vae.Posterior(jnp.asarray(moments))
  draw = np.asarray(posterior.sample(jax.random.key(0)))
  assert draw.shape == (2, 2, 200, 200)
  std = np.exp(0.5 * logvar)
  standard_error = std / np.sqrt(2 * 200 * 200)
  assert np.all(np.abs(draw.mean((0, 2, 3)) - mean) < 5 * standard_error)
  assert np.all(np.abs(draw.std((0, 2, 3)) - std) < 5 * standard_error)
  # Images and channels are drawn independently of each other, and so are keys.
  noise = ((draw - mean[:, None, None]) / std[:, None, None]).reshape(4, -1)
  assert np.max(np.abs(np.corrcoef(noise) - np.eye(4))) < 5 / 200
  np.testing.assert_array_equal(draw, posterior.sample(jax.random.key(0)))
  assert np.all(draw != posterior.sample(jax.random.key(1)))


def test_logvar_is_clamped_and_the_moments_are_not():
  moments = jnp.array([0.0, 0.0, 0.0, -50.0, 1.0, 90.0]).reshape(1, 6, 1, 1)
  posterior = vae.Posterior(moments)
  np.testing.assert_array_equal(posterior.logvar.ravel(), [-30.0, 1.0, 20.0])
  np.testing.assert_allclose(posterior.std.ravel(), np.exp([-15.0, 0.5, 10.0]), rtol=1e-6)
  np.testing.assert_array_equal(posterior.moments, moments)


def test_posterior_is_a_pytree(tiny, golden):
  posterior = vae.Posterior(golden["moments"])
  through_jit = jax.jit(lambda p: p)(posterior)
  np.testing.assert_array_equal(through_jit.std, posterior.std)


def test_other_sizes_and_batches(tiny):
  images = jax.random.uniform(jax.random.key(0), (2, 24, 40, 3), minval=-1.0, maxval=1.0)
  posterior = quick_encode(TINY, tiny, images)
  assert posterior.mean.shape == (2, 4, 6, 10)
  decoded = quick_decode(TINY, tiny, posterior.mean)
  assert decoded.shape == images.shape
  # An image does not depend on the other of its batch, nor on its place.
  other = quick_encode(TINY, tiny, jnp.stack([images[1], jnp.zeros_like(images[0])]))
  np.testing.assert_allclose(other.moments[0], posterior.moments[1], rtol=0, atol=1e-5)
  again = quick_decode(TINY, tiny, posterior.mean[::-1].at[1].set(0.0))
  np.testing.assert_allclose(again[0], decoded[1], rtol=0, atol=1e-5)


def test_bfloat16_decodes_as_well_as_its_weights_allow(tiny, golden):
  exact = golden["decoded"].transpose(0, 2, 3, 1)
  rounded = jax.tree.map(lambda w: jnp.asarray(w).astype(jnp.bfloat16).astype(jnp.float32), tiny)
  images = decode(TINY, tiny, golden["latents"], jnp.bfloat16)
  assert images.dtype == jnp.float32
  by_weights = np.std(decode(TINY, rounded, golden["latents"]) - exact)
  assert 0 < np.std(images - exact) <= 3 * by_weights


def test_bfloat16_keeps_norms_and_softmax_in_float32(tiny, golden):
  fn = functools.partial(vae.decode, TINY, dtype=jnp.bfloat16)
  text = str(jax.make_jaxpr(fn)(tiny, golden["latents"]))
  convolutions = [line for line in text.splitlines() if "= conv_general_dilated[" in line]
  assert convolutions and all(":bf16[" in line for line in convolutions)
  delicate = re.findall(r":(\w+)\[[^=]*= (?:rsqrt|exp|reduce_sum|logistic)\b", text)
  assert delicate and set(delicate) == {"f32"}


@pytest.mark.parametrize(
  ("shape", "dtype", "message"),
  [
    ((1, 30, 64, 3), np.float32, "height=30.*stride 4"),
    ((1, 64, 62, 3), np.float32, "width=62.*stride 4"),
    ((1, 0, 64, 3), np.float32, "height=0.*stride 4"),
    ((1, 3, 64, 64), np.float32, r"images shape=\(1, 3, 64, 64\)"),
    ((64, 64, 3), np.float32, r"images shape=\(64, 64, 3\)"),
    ((1, 64, 64, 3), np.uint8, "images dtype=uint8.*floating"),
  ],
)
def test_encode_refuses_bad_images(tiny, shape, dtype, message):
  with pytest.raises(ValueError, match=message):
    vae.encode(TINY, tiny, np.zeros(shape, dtype))


@pytest.mark.parametrize(
  ("shape", "dtype", "message"),
  [
    ((1, 16, 16, 4), np.float32, r"latents shape=\(1, 16, 16, 4\): expected \[batch, 4,"),
    ((4, 16, 16), np.float32, r"latents shape=\(4, 16, 16\)"),
    ((1, 4, 16, 16), np.int32, "latents dtype=int32"),
  ],
)
def test_decode_refuses_bad_latents(tiny, shape, dtype, message):
  with pytest.raises(ValueError, match=message):
    vae.decode(TINY, tiny, np.zeros(shape, dtype))
