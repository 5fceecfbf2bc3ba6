"""The transformer and its head: parity with the PyTorch reference, and properties."""

from __future__ import annotations

import dataclasses
import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import error, load, quick_jit
from golden import exact_matmuls as exact_matmuls

from marche_jax.config import ModelConfig
from marche_jax.models import diffusion, mar
from marche_jax.models.head import Head
from marche_jax.models.mar import MAR, abstract_params, patchify, unpatchify

FORWARD_TOLERANCE = 1e-5  # maximum absolute error over the reference's standard deviation
LOSS_TOLERANCE = 1e-4
PERTURBED_TOLERANCE = 4e-6

SMALL = ModelConfig(
  img_size=32, vae_stride=8, vae_embed_dim=2, encoder_embed_dim=16, encoder_depth=2,
  encoder_num_heads=2, decoder_embed_dim=24, decoder_depth=2, decoder_num_heads=3, class_num=3,
  buffer_size=2, diffloss_d=1, diffloss_w=16,
)  # fmt: skip


KNOWN = np.zeros(2, bool)  # no label is dropped


@functools.partial(quick_jit, static_argnums=0, static_argnames=("slots", "dtype"))
def run(config, params, tokens, mask, labels, dropped=KNOWN, slots=3, dtype=jnp.float32):
  """z of two images with three visible tokens each."""
  return MAR(config, dtype).apply({"params": params}, tokens, mask, labels, dropped, slots=slots)


@functools.partial(jax.jit, static_argnums=(0, 3))
def forwards(config: ModelConfig, params, f, visible: int) -> dict[str, jax.Array]:
  """Every array of `forward.npz` that depends on the weights, computed by our modules."""
  model = MAR(config)
  apply = functools.partial(model.apply, {"params": params})
  head = functools.partial(apply, method="denoise")
  tokens = patchify(f["imgs"], config)
  embedding = apply(f["labels"], method="class_embedding")
  encoded, _, _ = apply(tokens, f["mask"], embedding, visible, method="forward_encoder")
  c = diffusion.make_process().coefficients().at(f["net_t"])
  xt = diffusion.add_noise(c, f["loss_x0"], f["loss_noise"])
  out = head(xt, f["net_t"], f["net_c"])
  mse, vb = diffusion.training_terms(c, f["loss_x0"], xt, f["loss_noise"], out)
  return {
    "encoder_out": encoded,
    "decoder_out": apply(tokens, f["mask"], f["labels"]),
    "net_out": head(f["net_x"], f["net_t"], f["net_c"]),
    "loss": mse + vb,
    "loss_mse": mse,
    "loss_vb": vb,
  }


def load_forward(name: str) -> tuple[dict[str, np.ndarray], int]:
  """The golden forwards, and the number of visible tokens in every image."""
  f = load(f"{name}/forward.npz")
  return f, int((f["mask"][0] == 0).sum())


@pytest.fixture(scope="module")
def small():
  """Random parameters and inputs of two images."""
  params = golden.random_params(SMALL)
  rng = np.random.default_rng(2)
  tokens = rng.standard_normal((2, SMALL.seq_len, SMALL.token_dim), np.float32)
  mask = np.ones((2, SMALL.seq_len), np.float32)
  mask[0, [1, 5, 6]] = 0
  mask[1, [0, 2, 15]] = 0
  return params, tokens, mask, np.asarray([0, 2])


@pytest.mark.parametrize("name", ["mar_tiny", "mar_patch2"])
def test_forward_parity(name):
  config, params = golden.model(name)
  f, visible = load_forward(name)
  assert set(f["net_t"]) >= {0, 999}  # the discretised NLL, and the noisiest step
  for key, ours in forwards(config, params, f, visible).items():
    bar = LOSS_TOLERANCE if key.startswith("loss") else FORWARD_TOLERANCE
    assert error(ours, f[key]) <= bar, key


@pytest.mark.parametrize("name", ["mar_tiny", "mar_patch2"])
def test_forwards_are_well_conditioned(name):
  """A relative change of 1e-7 in every weight is lost in the tolerance, and is not nothing."""
  config, params = golden.model(name)
  f, visible = load_forward(name)
  rng = np.random.default_rng(0)

  def nudge(x):
    return (x * (1 + 1e-7 * rng.choice([-1.0, 1.0], x.shape))).astype(np.float32)

  nudged = forwards(config, jax.tree.map(nudge, params), f, visible)
  for key, ours in forwards(config, params, f, visible).items():
    if not key.startswith("loss"):
      assert 0 < error(nudged[key], np.asarray(ours)) <= PERTURBED_TOLERANCE, key


@pytest.mark.parametrize("name", ["mar_tiny", "mar_patch2"])
def test_patches_equal_the_reference(name):
  config, _ = golden.model(name)
  f = load(f"{name}/forward.npz")
  np.testing.assert_array_equal(patchify(f["imgs"], config), f["patches"])
  np.testing.assert_array_equal(unpatchify(f["patches"], config), f["unpatchified"])
  np.testing.assert_array_equal(f["unpatchified"], f["imgs"])


def test_empty_slots_change_nothing(small):
  params, tokens, mask, labels = small
  exact = run(SMALL, params, tokens, mask, labels)
  padded = run(SMALL, params, tokens, mask, labels, slots=SMALL.seq_len)
  np.testing.assert_allclose(padded, exact, rtol=0, atol=1e-5)


def test_z_depends_on_visible_tokens_and_on_no_masked_one(small):
  params, tokens, mask, labels = small

  def total(x):
    return jnp.sum(jnp.sin(MAR(SMALL).apply({"params": params}, x, mask, labels, slots=3)))

  gradient = np.abs(quick_jit(jax.grad(total))(tokens)).max(axis=-1)
  assert (gradient[mask == 1] == 0).all()
  assert (gradient[mask == 0] > 0).all()


def test_images_of_a_batch_do_not_mix(small):
  params, tokens, mask, labels = small
  other = tokens.copy()
  other[1] += 1
  before, after = (run(SMALL, params, x, mask, labels) for x in (tokens, other))
  np.testing.assert_array_equal(before[0], after[0])
  assert np.abs(before[1] - after[1]).max() > 1e-3


def test_dropped_labels_see_the_unconditional_embedding(small):
  params, tokens, mask, labels = small
  dropped = run(SMALL, params, tokens, mask, labels, np.asarray([True, False]))
  kept = run(SMALL, params, tokens, mask, labels)
  other = run(SMALL, params, tokens, mask, 1 - labels // 2, np.asarray([True, False]))
  np.testing.assert_array_equal(dropped[1], kept[1])
  np.testing.assert_array_equal(dropped[0], other[0])  # whatever the label was
  assert np.abs(dropped[0] - kept[0]).max() > 1e-3


def test_block_parts_equal_the_packed_projection(small):
  """Decoding computes queries alone, or keys and values alone, from the packed weights."""
  block = mar.make_block(SMALL, "decoder")
  one = {"params": jax.tree.map(lambda x: x[1], small[0]["decoder_blocks"])}
  x = np.random.default_rng(3).standard_normal((2, 5, SMALL.decoder_embed_dim), np.float32)
  methods = ("qkv", "queries", "keys_values")
  run_all = quick_jit(lambda *args: [block.apply(*args, method=method) for method in methods])
  (q, k, v), queries, keys_values = run_all(one, x)
  np.testing.assert_allclose(queries, q, atol=1e-6)
  for part, packed in zip(keys_values, (k, v)):
    np.testing.assert_allclose(part, packed, atol=1e-6)
  assert np.abs(q - k).max() > 0.1 and np.abs(k - v).max() > 0.1


def test_bfloat16_activations_end_in_a_float32_head(small):
  params, tokens, mask, labels = small
  z = run(SMALL, params, tokens, mask, labels, dtype=jnp.bfloat16)
  assert z.dtype == jnp.bfloat16
  wide = np.asarray(run(SMALL, params, tokens, mask, labels))
  assert 0 < np.abs(np.asarray(z, np.float32) - wide).max() < 0.1 * wide.std()
  args = (tokens[0, :2], np.asarray([0, 999]), z[0, :2])
  out = jax.eval_shape(Head(SMALL, jnp.bfloat16).apply, {"params": params["head"]}, *args)
  assert out.dtype == jnp.float32


def test_fresh_head_predicts_zero():
  """The final layer and the gates start at zero (reference: `initialize_weights`)."""
  x = np.ones((3, SMALL.token_dim), np.float32)
  z = np.ones((3, SMALL.decoder_embed_dim), np.float32)
  init = quick_jit(Head(SMALL).init_with_output)
  out, variables = init(jax.random.key(0), x, np.asarray([0, 5, 999]), z)
  assert not out.any()
  zero = {path for path, leaf in golden.by_path(variables["params"]).items() if not leaf.any()}
  kernels = {path for path in zero if path.endswith("kernel")}
  assert kernels == {
    "blocks/modulation/kernel", "final_modulation/kernel", "final_linear/kernel"
  }  # fmt: skip


def test_program_does_not_grow_with_depth():
  def size(depth: int) -> int:
    config = dataclasses.replace(SMALL, encoder_depth=depth, decoder_depth=depth, diffloss_d=depth)
    tokens = jax.ShapeDtypeStruct((1, config.seq_len, config.token_dim), jnp.float32)
    labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    params = abstract_params(config)

    def everything(p, *args):
      return MAR(config).apply({"params": p}, *args, method="everything")

    return len(jax.jit(everything).lower(params, tokens, labels).as_text().splitlines())

  assert size(2) == size(8) > 100
