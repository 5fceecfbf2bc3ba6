"""Two devices: the same images, a state that is compiled once, a profile of one of them."""

from __future__ import annotations

import os
import subprocess
import sys

import golden

SCRIPT = """
import dataclasses, pathlib, sys
import jax, numpy as np
import golden, tiny
from marche_jax.benchmarking import profiling
from marche_jax.decoding import plan_runner
from marche_jax.decoding.generation import RunSettings, draw_batch
from marche_jax.planning.policies import make_plan
from marche_jax.sampling import job
from marche_jax.weights.checkpoint import Model

assert jax.device_count() == 2
sample = dataclasses.replace(tiny.SAMPLE, policy="marche")
model = Model(tiny.MODEL, golden.random_params(tiny.MODEL), sample_config=sample)
settings = RunSettings(batch_size=4, seed=3)
labels = np.asarray([0, 1, 2, 3, 0, 1, 2])

created, ran = [], []
create = plan_runner.state_lib.empty_state
plan_runner.state_lib.empty_state = lambda *a, **k: created.append(1) or create(*a, **k)
measure = profiling.seconds
def seconds(run, repeats):
  ran.append(len(jax.tree.leaves(run())[0].devices()))
  return measure(run, repeats)
profiling.seconds = seconds

drawing = job.Job(model, sample, labels, settings, pathlib.Path(sys.argv[1]), save_latents=True)
report = job.run(drawing, profile=True)
assert report["device"].startswith("2 x") and report["split_seconds"]["head"] > 0
assert set(ran) == {1}, ran

runner = plan_runner.PlanRunner(plan := make_plan(tiny.MODEL, sample))
with np.load(pathlib.Path(sys.argv[1]) / "samples.npz") as file:
  two = file["latents"]
one = np.concatenate([
  draw_batch(model, runner, labels[i : i + 4], i, settings).latents for i in (0, 4)
])
assert np.abs(two - one).max() <= 1e-3 * one.std(), np.abs(two - one).max()

mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
sharded = plan_runner.PlanRunner(plan, mesh=mesh)
keys = plan_runner.state_lib.image_keys(plan_runner.state_lib.run_key(0), np.arange(4))
sharded.start(keys)
before = len(created)
for _ in range(3):
  assert len(sharded.start(keys).encoder_cache.k.devices()) == 2
assert len(created) == before, (before, len(created))
"""


def test_two_devices(tmp_path) -> None:
  tests = os.path.dirname(os.path.dirname(__file__))
  path = os.pathsep.join([os.path.dirname(tests), tests])
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT, str(tmp_path)],
    env={**golden.quick_environment(), "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": path},
    capture_output=True, text=True, timeout=240,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
