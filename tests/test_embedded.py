"""The model inside the package: whole, small, what its configuration says, and any good."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import marche_jax
from marche_jax import embedded, evaluate
from marche_jax.config import freeze
from marche_jax.embedded.config import get_config
from marche_jax.evaluation import quality
from marche_jax.weights import checkpoint

MAX_BYTES = 12_000_000


def test_the_checkpoint_is_the_configurations() -> None:
  config = freeze(get_config())
  model = checkpoint.load_model(embedded.CHECKPOINT, config.model)
  assert model.sample_config == config.sample
  files = [p for p in embedded.CHECKPOINT.rglob("*") if p.is_file()]
  assert 0 < sum(p.stat().st_size for p in files) <= MAX_BYTES


def test_it_is_what_is_loaded_without_a_directory() -> None:
  model, named = marche_jax.load_model(), marche_jax.load_model(embedded.CHECKPOINT)
  assert (model.config, model.sample_config) == (named.config, named.sample_config)
  jax.tree.map(np.testing.assert_array_equal, model.params, named.params)


@pytest.mark.slow
def test_the_command_without_flags_draws_images_of_every_class(tmp_path: pathlib.Path) -> None:
  done = subprocess.run(
    [sys.executable, "-m", "marche_jax.sample", "--compilation_cache="],
    cwd=tmp_path, capture_output=True, text=True, timeout=600,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "samples" / "grid.png").stat().st_size > 10_000
  images, labels = evaluate.read_samples(tmp_path / "samples" / "samples.npz")
  assert images.shape == (100, 28, 28, 1) and (labels == [i // 10 for i in range(100)]).all()
  assert quality.evaluate_samples(images, labels)["recognised"] >= 0.85
