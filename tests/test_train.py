"""Training as a process: resumption after SIGKILL, non-finite losses, its files, its command."""

from __future__ import annotations

import csv
import dataclasses
import pathlib
import signal
import subprocess
import sys

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from golden import quick_environment
from golden import quick_programs as quick_programs

from marche_jax import lock, train
from marche_jax.config import ModelConfig, VAEConfig
from marche_jax.training import data, trainer
from marche_jax.weights import checkpoint

ROOT = pathlib.Path(__file__).parents[1]

# Kills itself after update 8, or within the save after update 9: Orbax fills 9.orbax-checkpoint-tmp
# and then renames first what is in it.
KILLED = """
import os, pathlib, signal, sys
import golden, jax, tiny
from marche_jax.training import trainer

jax.jit = golden.quick_jit  # as in the run that it is compared with: see golden.quick_programs
work, place = pathlib.Path(sys.argv[1]), sys.argv[2]

def die():
  os.kill(os.getpid(), signal.SIGKILL)

def on_sample(params, step):
  if place == "between" and step == 8:
    die()

def hook(event, args):
  if place == "within" and event == "os.rename" and "checkpoints/9." in str(args[0]):
    die()

sys.addaudithook(hook)
trainer.train(tiny.config(work / "data", sample_every=1), work / "run", on_sample)
"""

CONFIG = """
import pathlib
import tiny
from marche_jax.config import mutable
def get_config():
  return mutable(tiny.config(pathlib.Path("data"), epochs=1, sample_every=4))
"""


def start(work: pathlib.Path, *argv: str) -> subprocess.CompletedProcess[str]:
  env = quick_environment(ROOT / "tests", ROOT)
  return subprocess.run(
    [sys.executable, *argv], cwd=work, env=env, capture_output=True, text=True, check=False
  )


def make_data(work: pathlib.Path) -> None:
  (work / "data").mkdir(parents=True)
  tiny.write_idx(work / "data")


def assert_equal(found: object, expected: object) -> None:
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, trainer.TrainState]:
  """A run that nothing interrupted, and its final state."""
  work = tmp_path_factory.mktemp("whole")
  make_data(work)
  state = trainer.train(tiny.config(work / "data"), work / "run")
  assert int(state.step) == 15
  return work / "run", state


def test_killed_and_resumed_equals_uninterrupted(
  tmp_path: pathlib.Path, whole: tuple[pathlib.Path, trainer.TrainState]
) -> None:
  make_data(tmp_path)
  checkpoints, metrics = tmp_path / "run" / "checkpoints", tmp_path / "run" / "metrics.csv"
  for place in ("between", "within"):
    process = start(tmp_path, "-c", KILLED, str(tmp_path), place)
    assert process.returncode == -signal.SIGKILL, process.stderr
    latest = max(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
    assert latest == 6
    lines = metrics.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + (8 if place == "between" else 9)
    if place == "between":
      kept = lines[: 1 + latest]
  partial = [p for p in checkpoints.iterdir() if p.name.startswith("9.")]
  assert len(partial) == 1 and any(p.is_file() and p.stat().st_size for p in partial[0].rglob("*"))

  state = trainer.train(tiny.config(tmp_path / "data"), tmp_path / "run")
  assert_equal(state, whole[1])  # step, parameters, EMA and the optimizer's moments
  # A run that had started afresh would have logged other images_per_second.
  assert metrics.read_bytes().splitlines(keepends=True)[: 1 + latest] == kept
  with metrics.open(newline="") as file:
    steps = [int(row["step"]) for row in csv.DictReader(file)]
  assert steps == list(range(1, 16))


@pytest.mark.parametrize(
  ("number", "kept"), [(2, "there is no checkpoint yet"), (5, r"checkpoint is .*checkpoints/3\.")]
)
def test_a_non_finite_loss_names_update_and_checkpoint(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, number: int, kept: str
) -> None:
  make_data(tmp_path)
  closed = []

  def poisoned(state, batch, **options):
    state = state.replace(step=state.step + 1)
    names = ("loss", "mse", "vb", "grad_norm")
    return state, {name: jnp.where(state.step == number, jnp.nan, 1.0) for name in names}

  def record_close(cls: type) -> None:
    real = cls.close
    monkeypatch.setattr(cls, "close", lambda self: (closed.append(cls), real(self)))

  monkeypatch.setattr(trainer, "update", poisoned)
  record_close(data.BatchIterator)
  record_close(trainer.MetricsWriter)
  with pytest.raises(trainer.NonFiniteLossError, match=rf"update {number}: .*; .*{kept}"):
    trainer.train(tiny.config(tmp_path / "data"), tmp_path / "run")
  assert closed == [trainer.MetricsWriter, data.BatchIterator]


def test_the_export_is_a_model(
  tmp_path: pathlib.Path,
  whole: tuple[pathlib.Path, trainer.TrainState],
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  run, state = whole
  config = tiny.config(tmp_path)
  before = sorted(run.rglob("*"))
  train.export(config, run, str(tmp_path / "model"), "float32")
  assert sorted(run.rglob("*")) == before
  model = checkpoint.load_model(tmp_path / "model")
  assert model.sample_config == config.sample
  assert_equal(model.params, state.ema)

  monkeypatch.setattr(trainer, "load_ema", None)  # the place is refused before anything is read
  again = "holds a 'mar' already.*: take another --export, or remove .*model"
  with pytest.raises(ValueError, match=again):
    train.export(config, run, str(tmp_path / "model"), "float32")


def test_a_run_of_another_model_or_data_is_named(
  tmp_path: pathlib.Path, whole: tuple[pathlib.Path, trainer.TrainState]
) -> None:
  run, _ = whole
  make_data(tmp_path)
  config = tiny.config(tmp_path / "data")
  deeper = dataclasses.replace(config, model=dataclasses.replace(tiny.MODEL, encoder_depth=3))
  message = (
    r"run/checkpoints/15: of another model: encoder_blocks/fc1/bias is \[2, 64\], "
    r"expected \[3, 64\]"
  )
  before = sorted(run.rglob("*"))
  with pytest.raises(ValueError, match=message):
    trainer.train(deeper, run)
  with pytest.raises(ValueError, match=message):
    trainer.load_ema(run, deeper.model)
  with pytest.raises(ValueError, match="run: state of the data: seed="):
    trainer.train(tiny.config(tmp_path / "data", seed=5), run)
  with lock.only_run(run), pytest.raises(ValueError, match="writes there since"):
    trainer.train(config, run)
  assert sorted(run.rglob("*")) == before


def test_a_finished_run_is_left_as_it_is(
  tmp_path: pathlib.Path, whole: tuple[pathlib.Path, trainer.TrainState]
) -> None:
  run, state = whole
  make_data(tmp_path)
  assert_equal(trainer.train(tiny.config(tmp_path / "data"), run), state)


@pytest.mark.parametrize(
  ("last", "kept"), [(2, "no checkpoint was due yet"), (4, "run/checkpoints/3 is kept")]
)
def test_an_interrupt_says_what_is_kept(tmp_path: pathlib.Path, last: int, kept: str) -> None:
  make_data(tmp_path)

  def interrupt(params: object, update: int) -> None:
    if update == last:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt) as caught:
    trainer.train(tiny.config(tmp_path / "data", sample_every=1), tmp_path / "run", interrupt)
  (note,) = caught.value.__notes__
  assert kept in note
  assert not (tmp_path / "run" / lock.NAME).exists()


def test_no_run_to_export(tmp_path: pathlib.Path) -> None:
  with pytest.raises(ValueError, match="typo: expected the directory of a training run"):
    trainer.load_ema(tmp_path / "typo", tiny.MODEL)
  (tmp_path / "new" / "checkpoints").mkdir(parents=True)
  with pytest.raises(ValueError, match="found no checkpoint"):
    trainer.load_ema(tmp_path / "new", tiny.MODEL)
  assert [p.name for p in tmp_path.rglob("*")] == ["new", "checkpoints"]


def test_an_autoencoder_must_fit_the_model(tmp_path: pathlib.Path) -> None:
  config = VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=3, embed_dim=3)
  params = golden.random_params(config)
  checkpoint.save_model(tmp_path, "vae", config, params)
  found, loaded = train.load_autoencoder(str(tmp_path), ModelConfig(vae_stride=2, vae_embed_dim=3))
  assert found == config
  assert_equal(loaded, params)
  for model in (tiny.MODEL, ModelConfig(vae_stride=16, vae_embed_dim=3)):
    with pytest.raises(ValueError, match=rf"--vae={tmp_path}: vae.ch_mult=.*vae_stride"):
      train.load_autoencoder(str(tmp_path), model)


# ---- the command line


def run_command(work: pathlib.Path, *flags: str) -> subprocess.CompletedProcess[str]:
  (work / "config.py").write_text(CONFIG)
  common = ("--config=config.py", "--compilation_cache=")
  return start(work, "-m", "marche_jax.train", *common, *flags)


def test_the_command_trains_samples_and_exports(tmp_path: pathlib.Path) -> None:
  make_data(tmp_path)
  done = run_command(tmp_path)
  assert done.returncode == 0, done.stderr
  run = tmp_path / "runs" / "tiny"
  assert sorted(p.name for p in run.glob("*.png")) == [
    "samples-00000004.png", "samples-00000005.png"
  ]  # fmt: skip
  with (run / "metrics.csv").open(newline="") as file:
    assert [int(row["step"]) for row in csv.DictReader(file)] == [1, 2, 3, 4, 5]
  events = list((run / "tensorboard").glob("events.out.tfevents.*"))
  assert len(events) == 1 and events[0].stat().st_size > 0

  end = "--export=DIR writes the EMA weights of runs/tiny/checkpoints/5 as a model"
  assert done.stdout == f"runs/tiny: trained to the end, 5 updates; {end}\n"

  done = run_command(tmp_path, "--export=model", "--export_dtype=float16")
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == "model: EMA weights of update 5\n"
  assert checkpoint.load_model(tmp_path / "model").config == tiny.MODEL


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (
      ["--config.sample.policy=fast"],
      "sample.policy='fast': unknown policy 'fast'; expected one of full",
    ),
    (["--vae=absent"], "checkpoint absent: no such directory"),
    (["--workdir=typo", "--export=model"], "typo: expected the directory of a training run"),
    (["--workdir="], "--workdir: expected a path"),
    (["--config.data.path=absent"], "data.path='absent': found neither"),
  ],
)
def test_a_mistake_ends_the_command_at_once(
  tmp_path: pathlib.Path, flags: list[str], message: str
) -> None:
  done = run_command(tmp_path, *flags)
  assert done.returncode == 1 and done.stderr.startswith(f"error: {message}")
  assert [p.name for p in tmp_path.iterdir() if p.name != "__pycache__"] == ["config.py"]
