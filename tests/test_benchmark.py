"""`python -m marche_jax.benchmark`: what it writes, its errors, and programs that are kept."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from golden import quick_environment, quick_jit
from PIL import Image

from marche_jax import benchmark
from marche_jax.benchmarking import tables
from marche_jax.models import mar
from marche_jax.weights import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
from tiny import MODEL, SAMPLE
from marche_jax.config import Config, mutable
def get_config():
  return mutable(Config(name="tiny", model=MODEL, vae=None, sample=SAMPLE))
"""


def test_random_weights_are_complete_and_nowhere_zero() -> None:
  params = benchmark.random_params(tiny.MODEL)
  expected = mar.abstract_params(tiny.MODEL)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(params))


def start(path: pathlib.Path, *argv: str) -> subprocess.CompletedProcess:
  (path / "config.py").write_text(CONFIG)
  return subprocess.run(
    [sys.executable, "-m", "marche_jax.benchmark", "--config=config.py",
     "--config.sample.num_iter=1", *argv],
    cwd=path, capture_output=True, text=True,
    env=quick_environment(ROOT, ROOT / "tests"),
  )  # fmt: skip


def test_one_policy_and_then_two(tmp_path: pathlib.Path) -> None:
  """The second start takes the program from the cache: weights are no part of it."""
  params = quick_jit(mar.init_params, static_argnums=0)(tiny.MODEL, jax.random.key(0))
  checkpoint.save_model(tmp_path / "model", "mar", tiny.MODEL, params)
  cache = "--compilation_cache=cache"
  done = start(tmp_path, "--random_weights", "--repeats=1", cache)
  assert done.returncode == 0, done.stderr
  one = json.loads((tmp_path / "benchmark.json").read_text())
  assert tables.single_table(one) in done.stdout
  assert one["policy"] == "full" and one["weights"] == "random" and len(one["runs"]) == 1
  assert one["name"] == "tiny" and not one["compiled_from_cache"]
  assert min(one["split_seconds"][part] for part in ("encoder", "decoder", "head")) > 0
  assert sum(one["split_seconds"].values()) == pytest.approx(one["seconds_per_image"]["typical"])
  assert one["memory_bytes"]["temporary"] > 0 and one["matmul_peak_gflops"] > 1  # measured here

  done = start(tmp_path, "--checkpoint=model", "--policies=full,full:cfg=1.5",
               "--repeats=2", "--nosplit", "--plot=speed.png", "--out=two.json", cache)  # fmt: skip
  assert done.returncode == 0, done.stderr
  two = json.loads((tmp_path / "two.json").read_text())
  assert tables.speed_table(two) in done.stdout and two["weights"] == "model"
  full, other = two["policies"].values()
  assert full["compiled_from_cache"] and full["compile_seconds"] < one["compile_seconds"]
  assert list(two["policies"]) == ["full", "full:cfg=1.5"]
  assert other["sample"]["cfg"] == 1.5 and len(other["runs"]) == 2
  rounds = [line for line in done.stderr.splitlines() if line.startswith("round")]
  assert rounds == [f"round {i} of 2: {name}" for i in (1, 2) for name in two["policies"]]
  assert Image.open(tmp_path / "speed.png").format == "PNG"


def test_quality(tmp_path: pathlib.Path) -> None:
  """On a model that the classifier cannot judge: differences and pictures, but no plane."""
  params = quick_jit(mar.init_params, static_argnums=0)(tiny.MODEL, jax.random.key(0))
  checkpoint.save_model(tmp_path / "model", "mar", tiny.MODEL, params)
  done = start(tmp_path, "--quality", "--checkpoint=model", "--num_images=3", "--batch_size=2",
               "--policies=full,full:temperature=0.5", "--quality_out=q",
               "--compilation_cache=")  # fmt: skip
  assert done.returncode == 0, done.stderr
  report = json.loads((tmp_path / "q" / "quality.json").read_text())
  assert tables.quality_table(report) in done.stdout
  assert report["policies"]["full:temperature=0.5"]["difference"]["latent_rmse"] > 0
  assert report["num_images"] == 3 and report["weights"] == "model"
  assert "no q/quality.png: the plane of speed and quality" in done.stderr
  with Image.open(tmp_path / "q" / "images.png") as picture:
    assert picture.size[0] > 3 * 8 * 7
  assert len(list((tmp_path / "q" / "batches").rglob("*.npz"))) == 4


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    ([], "error: --checkpoint is missing: only fashion_mnist is embedded"),
    (["--random_weights", "--out=absent/report.json"], "error: --out=absent/report.json: expected"),
    (["--random_weights", "--policies=full,marche:speed=3"],
     "error: --policies, 'marche:speed=3': unknown field 'speed'; expected one of num_iter, "),
    (["--random_weights", "--policy=gtr", "--policies=full"], "error: expected one of --policy"),
    (["--quality", "--estimate"], "error: --estimate: not with --quality"),
  ],
)  # fmt: skip
def test_mistakes_on_the_command_line(
  tmp_path: pathlib.Path, argv: list[str], message: str
) -> None:
  done = start(tmp_path, *argv, "--compilation_cache=")
  assert done.returncode == 1 and done.stderr.startswith(message), done.stderr
  assert len(done.stderr.splitlines()) == 1
