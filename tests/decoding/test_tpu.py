"""The sampler on TPU chips that nobody has: what the TPU compiler makes of it.

The compiler needs the extra `tpu` in an environment of its own, whose Python is named by
MARCHE_TPU_PYTHON; without it the tests that compile are skipped.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tpu_compile
from golden import random_params

from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.decoding import head_sampler
from marche_jax.models.mar import MAR, inference_params
from marche_jax.planning.policies import make_plan

ROOT = pathlib.Path(__file__).parents[2]
COMPILE = "tests/decoding/tpu_compile.py"
CHIP_BYTES = 16 * 2**30  # memory of a v5e chip


def _compile(config: str, batch_per_chip: int, *options: str) -> dict[str, Any]:
  """What `tpu_compile.py` reports."""
  python = os.environ.get("MARCHE_TPU_PYTHON")
  if not python:
    pytest.skip("MARCHE_TPU_PYTHON is not set: a Python with the extra tpu (libtpu) is needed")
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is opened that another process could hold
    "PYTHONPATH": str(ROOT),
  }
  done = subprocess.run(
    [python, COMPILE, f"configs/{config}.py", str(batch_per_chip), *options],
    cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-4000:]
  return json.loads(done.stdout.splitlines()[-1])


# Images per chip: for `full` the largest powers of two that fit, its temporary memory being
# proportional to the batch; with caches fewer. A compilation takes minutes on one core, so they run
# in the background from the first test on.
REQUESTS = {
  ("mar_huge", "marche"): 32,
  ("mar_base", "marche"): 64,
  ("mar_base", "full"): 512,
  ("mar_huge", "full"): 256,
  ("mar_base", "turbo"): 256,
  ("mar_huge", "turbo"): 128,
}
# A compilation takes as long as its step shapes are many. MAR-B's are those of the whole plan; of
# MAR-H's, the largest of each kind, which need the most memory.
LARGEST = {"mar_base": (), "mar_huge": ("--largest",)}
SHAPES = {("mar_base", "marche"): 64, ("mar_base", "turbo"): 32}


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[tuple[str, str], Future]]:
  """A report of `tpu_compile.py` per request, two compilations at a time."""
  with ThreadPoolExecutor(2) as pool:
    futures = {
      (config, policy): pool.submit(_compile, config, batch, f"--policy={policy}", *LARGEST[config])
      for (config, policy), batch in REQUESTS.items()
    }
    for (config, policy), batch in SHAPES.items():
      futures[config, f"shapes of {policy}"] = pool.submit(
        _compile, config, batch, f"--policy={policy}", "--shapes"
      )
    yield futures
    pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("config, policy", REQUESTS)
def test_decoding_compiles_for_v5e(compiled: dict, config: str, policy: str) -> None:
  """It fits a chip, has no collective, does not copy its cache nor need the size of it again."""
  report = compiled[config, policy].result()
  print(json.dumps(report))
  assert report["collectives_of_psum"] == ["all-reduce"]  # the search finds them where they are
  assert report["collectives"] == []
  used = (
    report["argument_bytes"] + report["output_bytes"] - report["alias_bytes"]
    + report["temp_bytes"] + report["code_bytes"]
  )  # fmt: skip
  assert used <= CHIP_BYTES, f"{used / 2**30:.2f} GiB per chip"
  if report["cache_bytes"]:
    plain = compiled[config, "full"].result()
    temporary = plain["temp_bytes"] * report["batch_per_chip"] / plain["batch_per_chip"]
    assert report["temp_bytes"] < temporary + report["cache_bytes"]
  assert report["copies_of_caches"] == 0
  assert 0.85 <= report["flops"] / report["predicted_flops"] <= 1.15  # loops' bodies once


@pytest.mark.slow
@pytest.mark.parametrize("config, policy", SHAPES)
def test_compiled_flops_of_every_step_shape(compiled: dict, config: str, policy: str) -> None:
  """The plan's prediction against the compiler's count, each loop's body counted once.

  How often bodies run is counted on the jaxpr, in `test_cost.py`.
  """
  report = compiled[config, f"shapes of {policy}"].result()
  print(json.dumps(report))
  for shape in report["shapes"]:
    assert 0.85 <= shape["compiled"] / shape["predicted"] <= 1.15
    assert shape["copies_of_caches"] == 0


def test_copies_of_caches_are_found() -> None:
  """By the search that the tests above rely on."""
  plan = make_plan(ModelConfig(), SampleConfig(policy="marche"))
  lines = [
    "  %copy.1 = bf16[12,128,320,768]{1,3,2,0:T(8,128)(2,1)} copy(%x), metadata={}",
    "  %copy-start.1 = (bf16[12,128,320,768]{3,2,1,0}, bf16[], u32[]) copy-start(%x)",
    "  %copy-done.1 = bf16[12,128,320,768]{3,2,1,0:T(8,128)(2,1)} copy-done(%copy-start.1)",
    "  %copy.2 = bf16[1,128,320,768]{3,2,1,0} copy(%y)",  # a layer's
    "  %copy.3 = f32[12,128,320,768]{3,2,1,0} copy(%z)",  # no cache
  ]
  assert tpu_compile.copies_of_caches("\n".join(lines), plan, 64) == 2
  assert tpu_compile.copies_of_caches("\n".join(lines), plan, 32) == 0


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
