"""`python -m marche_jax.benchmark`: its report, its errors, and programs kept between starts."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from marche_jax import benchmark, checkpoint
from marche_jax.config import SampleConfig
from marche_jax.models import mar
from marche_jax.policies import make_plan

SAMPLE = dataclasses.replace(tiny.SAMPLE, num_iter=2)
ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
from tiny import MODEL, SAMPLE
from marche_jax.config import Config, mutable
def get_config():
  return mutable(Config(name="tiny", model=MODEL, vae=None, sample=SAMPLE))
"""


@pytest.fixture(scope="module")
def params() -> dict:
  return benchmark.random_params(tiny.MODEL)


@pytest.fixture(autouse=True)
def small_peak(monkeypatch: pytest.MonkeyPatch) -> None:
  """Only the command lines below need the machine's true peak."""
  monkeypatch.setattr(benchmark, "matmul_peak", lambda dtype: 1e12)


def test_random_weights_are_complete_and_nowhere_zero(params: dict) -> None:
  expected = mar.abstract_params(tiny.MODEL)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(params))


def test_report(params: dict) -> None:
  report = benchmark.measure(tiny.MODEL, params, SAMPLE, batch_size=2, repeats=2)
  plan = make_plan(tiny.MODEL, SAMPLE)
  assert len(report["runs"]) == 2 and min(report["runs"]) > 0
  seconds, split = report["seconds_per_image"], report["split_seconds"]
  assert seconds["min"] <= seconds["median"] <= seconds["max"]
  assert min(split[part] for part in ("encoder", "decoder", "head")) > 0
  assert sum(split.values()) == pytest.approx(seconds["median"])
  flops = report["gflops_per_image"]
  assert flops["total"] == pytest.approx(plan.flops().total / 1e9)
  exact = plan.flops(padded=False).total
  assert flops["without_padding"] == pytest.approx(exact / 1e9)
  assert report["padding"] == dict(zip(("encoder", "head"), plan.padding(), strict=True))
  fraction = flops["total"] * 1e9 / seconds["median"] / 1e12
  assert report["fraction_of_peak"]["total"] == pytest.approx(fraction)
  assert report["weight_bytes"] == 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
  assert report["temporary_bytes"] > 0 and report["compile_seconds"] > 0
  assert json.loads(json.dumps(report)) == report
  text = benchmark.table({"name": "tiny", **report})
  assert f"{seconds['median']:10.3f}" in text and "policy full, 2 iterations" in text


@pytest.mark.parametrize(
  ("sample", "options", "message"),
  [
    (SAMPLE, {"batch_size": 0}, "batch_size=0: expected at least 1"),
    (SAMPLE, {"repeats": 0}, "repeats=0: expected at least 1"),
    (SampleConfig(num_iter=17), {}, "sample.num_iter=17: expected 1 to 16"),
  ],
)
def test_values_out_of_range(
  params: dict, sample: SampleConfig, options: dict, message: str
) -> None:
  with pytest.raises(ValueError, match=message):
    benchmark.measure(tiny.MODEL, params, sample, **options)


def test_latents_that_are_not_finite(params: dict) -> None:
  broken = {**params, "mask_token": params["mask_token"] * jnp.nan}
  sample = dataclasses.replace(SAMPLE, num_iter=1)
  with pytest.raises(ValueError, match="non-finite latents at iteration 0 of 1"):
    benchmark.measure(tiny.MODEL, broken, sample, repeats=1)


def start(path: pathlib.Path, *argv: str) -> subprocess.CompletedProcess:
  (path / "config.py").write_text(CONFIG)
  return subprocess.run(
    [sys.executable, "-m", "marche_jax.benchmark", "--config=config.py",
     "--config.sample.num_iter=1", "--repeats=1", *argv],
    cwd=path, capture_output=True, text=True,
    env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
  )  # fmt: skip


def test_a_second_start_takes_the_program_from_the_cache(tmp_path: pathlib.Path) -> None:
  """With `--checkpoint` as well as with `--random_weights`: weights are no part of a program."""
  params = mar.init_params(tiny.MODEL, jax.random.key(0))
  checkpoint.save_model(tmp_path / "model", "mar", tiny.MODEL, params)
  reports = []
  for weights in ("--random_weights", "--checkpoint=model"):
    done = start(tmp_path, weights, "--compilation_cache=cache")
    assert done.returncode == 0, done.stderr
    reports.append(json.loads((tmp_path / "benchmark.json").read_text()))
    assert benchmark.table(reports[-1]) in done.stdout
  assert [r["compiled_from_cache"] for r in reports] == [False, True]
  assert reports[1]["compile_seconds"] < reports[0]["compile_seconds"]
  assert [r["weights"] for r in reports] == ["random", "model"]
  assert reports[0]["matmul_peak_gflops"] > 1  # measured here


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    ([], "error: expected one of --checkpoint=DIR and --random_weights\n"),
    (["--random_weights", "--out=absent/report.json"], "error: --out=absent/report.json: expected"),
  ],
)
def test_mistakes_on_the_command_line(
  tmp_path: pathlib.Path, argv: list[str], message: str
) -> None:
  done = start(tmp_path, *argv, "--compilation_cache=")
  assert done.returncode == 1 and done.stderr.startswith(message)
