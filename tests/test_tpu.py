"""The sampler on TPU chips that nobody has: what the TPU compiler makes of it.

The compiler needs the extra `tpu-aot` in an environment of its own, whose Python is named by
MARCHE_TPU_PYTHON; without it the tests that compile are skipped.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marche_jax import sampler
from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.models.mar import inference_params, init_params
from marche_jax.policies import make_plan

ROOT = pathlib.Path(__file__).parent.parent
CHIP_BYTES = 16 * 2**30  # memory of a v5e chip


def _compile(config: str, batch_per_chip: int) -> dict[str, Any]:
  """What `tpu_compile.py` reports."""
  python = os.environ.get("MARCHE_TPU_PYTHON")
  if not python:
    pytest.skip("MARCHE_TPU_PYTHON is not set: a Python with the extra tpu-aot (libtpu) is needed")
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "PYTHONPATH": str(ROOT),
  }
  done = subprocess.run(
    [python, "tests/tpu_compile.py", f"configs/{config}.py", str(batch_per_chip)],
    cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-4000:]
  return json.loads(done.stdout.splitlines()[-1])


# The largest powers of two that fit a chip.
@pytest.mark.slow
@pytest.mark.parametrize("config, batch_per_chip", [("mar_base", 512), ("mar_huge", 256)])
def test_full_decoding_compiles_for_v5e(config: str, batch_per_chip: int) -> None:
  report = _compile(config, batch_per_chip)
  print(json.dumps(report))
  assert report["collectives_of_psum"] == ["all-reduce"]  # the search finds them where they are
  assert report["collectives"] == []
  used = (
    report["argument_bytes"] + report["output_bytes"] - report["alias_bytes"]
    + report["temp_bytes"] + report["code_bytes"]
  )  # fmt: skip
  assert used <= CHIP_BYTES, f"{used / 2**30:.2f} GiB per chip"


def test_inference_params_decode_to_the_same_tokens() -> None:
  """What the compiler is given: bfloat16 weights that change nothing of a bfloat16 decode."""
  config = ModelConfig(
    img_size=64, encoder_embed_dim=32, encoder_depth=2, encoder_num_heads=2, decoder_embed_dim=32,
    decoder_depth=2, decoder_num_heads=2, class_num=4, buffer_size=4, diffloss_d=2, diffloss_w=32,
  )  # fmt: skip
  plan = make_plan(config, SampleConfig(num_iter=2, num_sampling_steps=3, max_timestep=900))
  leaves, tree = jax.tree.flatten(init_params(config, jax.random.key(0)))
  keys = jax.random.split(jax.random.key(1), len(leaves))  # init leaves zeros and ones
  noisy = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  params = jax.tree.unflatten(tree, noisy)
  small = inference_params(params, jnp.bfloat16)
  assert small["decoder_blocks"]["fc1"]["kernel"].dtype == jnp.bfloat16
  assert small["head"]["final_linear"]["kernel"].dtype == jnp.float32
  rows, tables = sampler.plan_rows(plan)
  image_keys = sampler.image_keys(jax.random.key(2), jnp.arange(2))
  inputs = sampler.Inputs(jnp.asarray([1, 3]), image_keys)

  def decode(params: Any) -> np.ndarray:
    state = sampler.DecodeState(
      jnp.zeros((2, config.seq_len, config.token_dim)),
      sampler.random_order(image_keys, config.seq_len),
    )
    state, finite, _ = sampler.jitted_decode(
      params, state, rows, tables, inputs, config=config, shapes=plan.shapes,
      dtype=jnp.bfloat16, head_dtype=jnp.bfloat16,
    )  # fmt: skip
    assert finite.all()
    return np.asarray(state.tokens)

  np.testing.assert_array_equal(decode(small), decode(params))
