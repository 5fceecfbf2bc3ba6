"""The PyTorch reference's numbers in `data/`: loading them, and the error against them."""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
import runpy
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marche_jax.config import Config, ModelConfig, SampleConfig, VAEConfig, freeze
from marche_jax.decoding import sampler
from marche_jax.models import mar, vae
from marche_jax.weights import convert


def quick_options() -> dict[str, Any]:
  """Options that make compiling quick; the second is not known to every version of the compiler."""
  level: dict[str, Any] = {"xla_backend_optimization_level": 0}
  options = {**level, "xla_cpu_use_fusion_emitters": False}
  try:
    jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
  except jax.errors.JaxRuntimeError:
    return level
  return options


QUICK = quick_options()
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
"""For properties: compiles in a third of the time. What parity is measured on is plain jit."""

QUICK_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())
"""The same for all that a process of its own compiles, as its XLA_FLAGS."""


def quick_environment(*paths: pathlib.Path) -> dict[str, str]:
  """The environment of a process that compiles quickly and finds modules in `paths`."""
  environment = {**os.environ, "XLA_FLAGS": QUICK_FLAGS}
  if paths:
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
  return environment


DATA = pathlib.Path(__file__).parent / "data"

RUNS = (
  "mar_tiny/sample_nocfg.npz",
  "mar_tiny/sample_cfg_linear.npz",
  "mar_tiny/sample_cfg_constant.npz",
  "mar_patch2/sample_cfg_linear.npz",
)
"""Recorded sampling runs."""


@pytest.fixture(autouse=True, scope="module")
def exact_matmuls():
  """Parity is measured with float32 products. Import it into a test module to switch it on."""
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture(autouse=True, scope="module")
def quick_programs():
  """The package compiles what it jits with `QUICK`. Import it into a module without parity."""
  decode = quick_jit(sampler.decode, static_argnames=sampler.STATIC, donate_argnums=1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "jit", quick_jit)
    patch.setattr(sampler, "jitted_decode", decode)
    yield


def load(name: str) -> dict[str, np.ndarray]:
  """The arrays of one `.npz` of `data/`."""
  with np.load(DATA / name, allow_pickle=False) as arrays:
    return dict(arrays)


@functools.cache
def model(name: str) -> tuple[ModelConfig, Any]:
  """Configuration and EMA parameters of 'mar_tiny' or 'mar_patch2'."""
  values = json.loads((DATA / name / "config.json").read_text())
  del values["num_sampling_steps"]  # of the recorded runs, not of the model
  config = ModelConfig(**values)
  return config, from_reference(config, load(f"{name}/weights.npz"))


def sampling_run(run: str) -> tuple[SampleConfig, dict[str, np.ndarray]]:
  """How one of `RUNS` was sampled, and everything that was recorded."""
  steps = json.loads((DATA / run).with_name("config.json").read_text())["num_sampling_steps"]
  arrays = load(run)
  meta = json.loads(str(arrays["meta"]))
  fields = {name: meta[name] for name in ("num_iter", "cfg", "cfg_schedule", "temperature")}
  return SampleConfig(num_sampling_steps=steps, **fields), arrays


def from_reference(config: ModelConfig, arrays: Mapping[str, np.ndarray]) -> Any:
  """Our parameter tree from arrays under the reference's names; all consumed, shapes checked."""
  tensors = {
    name: convert.Tensor(array.shape, str(array.dtype), lambda array=array: array)
    for name, array in arrays.items()
  }
  return convert.convert(tensors, "mar", config)


def random_params(config: ModelConfig | VAEConfig, seed: int = 0) -> Any:
  """Parameters that are all random, unlike fresh ones, whose head predicts zero."""
  rng = np.random.default_rng(seed)
  abstract = (mar if isinstance(config, ModelConfig) else vae).abstract_params

  def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    fan_in = leaf.shape[-2] if leaf.ndim > 1 else leaf.shape[-1]
    fan_in *= math.prod(leaf.shape[:2]) if leaf.ndim == 4 else 1  # of a convolution
    return rng.standard_normal(leaf.shape, np.float32) / np.float32(np.sqrt(fan_in))

  return jax.tree.map(jnp.asarray, jax.tree.map(fill, abstract(config)))


def error(ours: Any, golden: np.ndarray, where: np.ndarray | None = None) -> float:
  """Maximum absolute error over the standard deviation of the golden array, `where` it holds."""
  ours = np.asarray(ours)
  assert ours.shape == golden.shape and ours.dtype == golden.dtype
  if where is not None:
    ours, golden = ours[where], golden[where]
  assert golden.size > 1 and golden.std() > 0
  return float(np.max(np.abs(ours - golden)) / np.std(golden))


def read_config(name: str) -> Config:
  """The configuration in `configs/<name>.py`, frozen."""
  path = DATA.parent.parent / "configs" / f"{name}.py"
  return freeze(runpy.run_path(str(path))["get_config"]())


def by_path(tree: Any) -> dict[str, Any]:
  """Leaves of a nested dict by their slash-separated path."""
  return {
    "/".join(key.key for key in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
