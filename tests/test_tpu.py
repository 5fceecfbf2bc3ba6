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
import tiny
from golden import random_params

from marche_jax import head_sampler
from marche_jax.models.mar import MAR, inference_params

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
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is opened that another process could hold
    "PYTHONPATH": str(ROOT),
  }
  done = subprocess.run(
    [python, "tests/tpu_compile.py", f"configs/{config}.py", str(batch_per_chip)],
    cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-4000:]
  return json.loads(done.stdout.splitlines()[-1])


# The largest powers of two that fit a chip: temporary memory is proportional to the batch, 24 MB an
# image for MAR-B and 39 MB for MAR-H. A compilation takes minutes.
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


def test_inference_params_change_nothing_of_a_bfloat16_decode() -> None:
  """What the compiler is given: weights stored in bfloat16 where decoding would cast them."""
  params = random_params(tiny.MODEL)
  small = inference_params(params, jnp.bfloat16)
  stored = {x.dtype for x in jax.tree.leaves(small)}
  assert stored == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}

  tokens = np.random.default_rng(0).standard_normal(
    (2, tiny.MODEL.seq_len, tiny.MODEL.token_dim), dtype=np.float32
  )
  mask = np.broadcast_to(np.arange(tiny.MODEL.seq_len) % 2, tokens.shape[:2])
  dropped = np.asarray([False, True])
  model = MAR(tiny.MODEL, jnp.bfloat16)
  forward = jax.jit(lambda p: model.apply({"params": p}, tokens, mask, np.asarray([1, 3]), dropped))
  np.testing.assert_array_equal(forward(small), forward(params))

  timesteps = np.asarray([[0, 500, 999]])
  prepare = jax.jit(lambda p: head_sampler.prepare(p["head"], tiny.MODEL, timesteps, jnp.bfloat16))
  jax.tree.map(np.testing.assert_array_equal, prepare(small), prepare(params))
