"""`python -m marche_jax.sample`: on two devices, its errors, the plan that it prints."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import golden
import numpy as np
import pytest
import tiny

from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.planning.policies import make_plan
from marche_jax.weights import checkpoint
from marche_jax.weights.checkpoint import Model

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model() -> Model:
  return Model(tiny.MODEL, golden.random_params(tiny.MODEL), sample_config=tiny.SAMPLE)


def test_two_devices_draw_the_same(model: Model, tmp_path: pathlib.Path) -> None:
  """Also with a number of images that the devices do not divide, and several calls per batch."""
  stored = tmp_path / "model"
  checkpoint.save_model(stored, "mar", tiny.MODEL, model.params, sample_config=tiny.SAMPLE)
  count, latents = "--xla_force_host_platform_device_count", []
  for devices in (1, 2):
    done = subprocess.run(
      [sys.executable, "-m", "marche_jax.sample", f"--checkpoint={stored}", "--num_images=5",
       "--batch_size=3", "--save_latents", f"--out={tmp_path / str(devices)}", "--profile",
       "--compilation_cache="],
      env={**os.environ, "XLA_FLAGS": f"{golden.QUICK_FLAGS} {count}={devices}"},
      capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / str(devices) / "report.json").read_text())
    assert report["device"].startswith(f"{devices} x") and report["batch_size"] == 2 + devices
    with np.load(tmp_path / str(devices) / "samples.npz") as file:
      latents.append(file["latents"])
  np.testing.assert_allclose(latents[1], latents[0], atol=1e-3 * latents[0].std())


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, "-m", "marche_jax.sample", *arguments],
    capture_output=True, text=True, timeout=120,
  )  # fmt: skip


def test_command_line_errors_are_one_line(model: Model, tmp_path: pathlib.Path) -> None:
  stored = tmp_path / "model"
  checkpoint.save_model(
    stored, "mar", tiny.MODEL, model.params, sample_config=tiny.SAMPLE
  )  # fmt: skip
  cases = {
    ("--labels=9",): "labels: found 9, expected 0 to 3",
    ("--labels=cat",): "labels: found 'cat'",
    ("--seed=-1",): "seed=-1",
    ("--num_images=0",): "num_images=0",
    ("--config.sample.num_iter=17",): "num_iter=17",
    ("--config.sample.nun_iter=3",): "nun_iter",
    ("--policy=magic",): "magic",
  }
  for arguments, message in cases.items():
    out = tmp_path / "out"
    result = command(f"--checkpoint={stored}", f"--out={out}", *arguments)
    assert result.returncode != 0, arguments
    assert message in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_plan_is_printed_without_drawing(model: Model, tmp_path: pathlib.Path) -> None:
  stored = tmp_path / "model"
  checkpoint.save_model(stored, "mar", tiny.MODEL, model.params, sample_config=tiny.SAMPLE)
  result = command(f"--checkpoint={stored}", "--print_plan", f"--out={tmp_path / 'out'}")
  assert result.returncode == 0 and "step shapes" in result.stdout
  assert not (tmp_path / "out").exists()


def test_plan_of_a_configuration_needs_no_checkpoint(tmp_path: pathlib.Path) -> None:
  """Neither does the embedded model have anything to do with it."""
  wanted = make_plan(ModelConfig(), SampleConfig(policy="gtr", num_iter=16, cfg=3.0))
  result = command(
    f"--config={ROOT / 'configs' / 'mar_base.py'}", "--policy=gtr", "--config.sample.num_iter=16",
    "--config.sample.cfg=3.0", "--print_plan",
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  assert result.stdout.splitlines()[:-1] == wanted.table().splitlines()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--out="], "--out: expected a path"),
    (["--policy="], "--policy: expected a policy"),
    (["--checkpoint="], "--checkpoint: expected a path"),
    (["--config.sample.num_iter=50", "--trace=~/trace"], "sample.num_iter=50"),
    (["--trace=/dev/null"], "/dev/null: expected a directory"),
    (["--config.sample.num_iter=50", "--calibrate=~/plans/a.json"], "sample.num_iter=50"),
  ],
)  # fmt: skip
def test_a_refused_command_makes_nothing(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
  monkeypatch.setenv("HOME", str(tmp_path))
  done = subprocess.run(
    [sys.executable, "-m", "marche_jax.sample", "--out=~/out", "--compilation_cache=", *arguments],
    cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    timeout=120,
  )  # fmt: skip
  assert done.returncode == 1 and done.stderr.startswith(f"error: {message}"), done.stderr
  assert len(done.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_an_interrupted_command_goes_on(
  model: Model, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Also: ~ is the home directory, and a second run in the same place is refused."""
  checkpoint.save_model(
    tmp_path / "model", "mar", tiny.MODEL, model.params, sample_config=tiny.SAMPLE
  )
  environment = {**golden.quick_environment(ROOT), "HOME": str(tmp_path)}
  arguments = [sys.executable, "-m", "marche_jax.sample", "--checkpoint=~/model", "--out=~/out",
               "--num_images=4000", "--batch_size=4", "--compilation_cache="]  # fmt: skip
  running = subprocess.Popen(
    arguments, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    text=True,
  )  # fmt: skip
  out = tmp_path / "out"
  while running.poll() is None and not list(out.rglob("0*.npz")):
    time.sleep(0.05)
  os.kill(running.pid, signal.SIGSTOP)
  second = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert second.returncode == 1 and len(second.stderr.splitlines()) == 1
  assert f"process {running.pid} on " in second.stderr
  os.kill(running.pid, signal.SIGTERM)
  os.kill(running.pid, signal.SIGCONT)
  _, errors = running.communicate(timeout=60)
  assert running.returncode == 143
  assert errors.splitlines()[-1].startswith("terminated: ") and "Traceback" not in errors
  assert f"of 4000 images are kept in {out / 'partial'}" in errors
  assert [p.name for p in out.iterdir()] == ["partial"]
