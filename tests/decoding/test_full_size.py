"""MAR-B at full size against the PyTorch reference, with weights made by a rule (no file needed).

Needs 3 GB of memory and ten minutes; runs with -m slow.
"""

from __future__ import annotations

import functools
import json

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import error, load
from golden import exact_matmuls as exact_matmuls
from rule import rule_weights

from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.decoding import sampler
from marche_jax.decoding import state as state_lib
from marche_jax.decoding.state import Inputs
from marche_jax.models import mar
from marche_jax.models.mar import MAR
from marche_jax.planning.policies import make_plan
from marche_jax.weights import convert

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # maximum absolute error over the reference's standard deviation
MAX_TEMPORARY = 1.5  # temporary memory of the compiled sampler over the weights
MAX_CACHE_COPIES = 1.0  # what a cache adds to the temporary memory, over its own size

CONFIG = ModelConfig()


@pytest.fixture(scope="module")
def params():
  """Every tensor is made when the converter asks for it, so that they exist once only."""
  manifest = json.loads((golden.DATA / "manifests" / "mar_base.json").read_text())
  tensors = {
    name: convert.Tensor(
      tuple(shape), "float32", lambda name=name, shape=shape: rule_weights({name: shape})[name]
    )
    for name, shape in manifest.items()
  }
  return jax.device_put(convert.convert(tensors, "mar", CONFIG), may_alias=True)


@pytest.fixture(scope="module")
def computed(params):
  """All arrays of `rule/mar_base.npz`, computed by our modules."""
  f = load("rule/mar_base.npz")
  visible = int((f["mask"] == 0).sum())

  @functools.partial(jax.jit, static_argnames="dropped")
  def transformer(params, tokens, mask, labels, dropped):
    apply = functools.partial(MAR(CONFIG).apply, {"params": params})
    embedding = apply(labels, jnp.full(labels.shape, dropped), method="class_embedding")
    encoded = apply(tokens, mask, embedding, visible, method="forward_encoder")
    return encoded[0], apply(*encoded, method="forward_decoder")

  @jax.jit
  def head(params, *args):
    return MAR(CONFIG).apply({"params": params}, *args, method="denoise")

  inputs = f["tokens"], f["mask"], f["labels"]
  encoded, decoded = transformer(params, *inputs, dropped=False)
  _, unconditional = transformer(params, *inputs, dropped=True)
  return {
    "encoder_out": encoded,
    "decoder_out": decoded,
    "decoder_out_uncond": unconditional,
    "net_out": head(params, f["net_x"], f["net_t"], f["net_c"]),
  }, f


@pytest.mark.parametrize("key", ["encoder_out", "decoder_out", "decoder_out_uncond", "net_out"])
def test_forward_parity(computed, key):
  ours, f = computed
  assert error(ours[key], f[key]) <= TOLERANCE


# ReCAP's released code takes the tokens of a pair in raster order.
PEERS = {"full": {}, "lazymar": {}, "recap": {"recap_raster": True}}


@pytest.mark.parametrize("policy", PEERS)
def test_teacher_forced_decoding_parity(params, policy):
  """64 iterations: z of every position at the moment when it is predicted."""
  g = load(f"peers/{policy}.npz")
  sample = SampleConfig(
    num_iter=64,
    cfg=3.0,
    cfg_schedule="linear",
    num_sampling_steps=2,
    policy=policy,
    **PEERS[policy],
  )
  plan = make_plan(CONFIG, sample)
  np.testing.assert_array_equal(
    np.asarray([row.cfg for row in plan.rows], np.float32), g["cfg_per_iter"]
  )
  rows, tables = state_lib.plan_rows(plan)
  by_rank = state_lib.arrange(plan, g["order"][:, ::-1])
  state, _, trace = sampler.jitted_decode(
    params,
    state_lib.empty_state(plan, np.zeros_like(g["tokens"]), by_rank, jnp.float32),
    rows,
    tables,
    Inputs(g["labels"], state_lib.image_keys(jax.random.key(0), np.arange(1)), teacher=g["tokens"]),
    config=CONFIG,
    step_shapes=plan.step_shapes,
    trace=True,
  )
  np.testing.assert_array_equal(state.tokens, g["tokens"])
  z = np.asarray(trace.z)[:, :, 0]  # [iteration, half, position, width]
  predicted = np.any(z != 0, axis=(1, 3))
  np.testing.assert_array_equal(predicted.sum(axis=0), 1)
  np.testing.assert_array_equal(predicted.argmax(axis=0), g["iteration"])
  positions = np.arange(CONFIG.seq_len)
  for half, key in enumerate(("z_cond", "z_uncond")):
    assert error(z[g["iteration"], half, positions], g[key]) <= TOLERANCE, key


def compiled(plan, batch):
  """Memory of the sampler compiled from shapes alone, and the bytes of its weights."""
  weights = mar.abstract_params(CONFIG)
  rows, tables = state_lib.plan_rows(plan)

  def start():
    tokens = jnp.zeros((batch, CONFIG.seq_len, CONFIG.token_dim))
    by_rank = jnp.zeros((batch, CONFIG.seq_len), jnp.int32)
    keys = state_lib.image_keys(jax.random.key(0), jnp.arange(batch))
    state = state_lib.empty_state(plan, tokens, by_rank, jnp.float32)
    return state, Inputs(jnp.zeros(batch, jnp.int32), keys)

  state, inputs = jax.eval_shape(start)
  lowered = sampler.jitted_decode.lower(
    weights, state, rows, tables, inputs, config=CONFIG, step_shapes=plan.step_shapes
  )
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
  return lowered.compile().memory_analysis(), size


def test_temporary_memory():
  """The sampler copies neither its weights nor a state."""
  memory, size = compiled(make_plan(CONFIG, SampleConfig(num_iter=64)), 1)
  assert memory.argument_size_in_bytes > size
  assert memory.temp_size_in_bytes < MAX_TEMPORARY * size


def test_temporary_memory_of_a_cache():
  """A cache is updated in place: beyond what `full` needs there is no room for a second one."""
  batch = 2
  full, _ = compiled(make_plan(CONFIG, SampleConfig(num_iter=64)), batch)
  plan = make_plan(CONFIG, SampleConfig(num_iter=64, policy="marche"))
  selective, _ = compiled(plan, batch)
  cache = batch * plan.cache_bytes_per_image
  assert selective.argument_size_in_bytes >= full.argument_size_in_bytes + cache
  assert selective.alias_size_in_bytes >= cache  # the output state lies where the input did
  assert selective.temp_size_in_bytes < full.temp_size_in_bytes + MAX_CACHE_COPIES * cache
