"""Plan files of `sample --calibrate`: when MARché refreshes, and with which fields.

JSON, so that it can be read and edited. What is in it is checked like any other input.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np

from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.files import atomic_write
from marche_jax.planning.policies import parse_policy

FORMAT = "marche_jax refresh plan, version 2"

FIELDS = (
  "policy", "refresh_iterations", "active_size", "encoder_active_size", "select_layer", "selection",
  "condition_cache",
)  # fmt: skip
"""Fields of `SampleConfig` that a plan file decides on."""


def save_plan(
  path: pathlib.Path, config: ModelConfig, sample: SampleConfig, drift: np.ndarray
) -> None:
  """Writes a plan file: what `load_plan` reads, and the drift since each refresh to look at.

  Args:
    path: of the file.
    config: of the model that was measured.
    sample: how it decodes, with its refresh_iterations.
    drift: float64 [R, R], of `calibration.calibrate`.
  """
  refreshes = sample.refresh_iterations
  since = [max(r for r in refreshes if r <= k) for k in range(len(drift))]
  content = {
    "format": FORMAT,
    **{field: getattr(sample, field) for field in FIELDS},
    "num_iter": sample.num_iter,
    "seq_len": config.seq_len,
    "drift": [float(drift[r, k]) for k, r in enumerate(since)],
  }
  with atomic_write(path) as aside:
    aside.write_text(json.dumps(content, indent=2) + "\n")


def load_plan(path: pathlib.Path, config: ModelConfig, sample: SampleConfig) -> SampleConfig:
  """`sample` with what a plan file decides on.

  Raises:
    ValueError: where the file is none, holds what it should not, or was made for another number of
      iterations or tokens; starts with its path.
    OSError: where it cannot be read.
  """
  try:
    content = json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path}: expected a plan file of --calibrate: {error}") from error
  if not isinstance(content, dict) or content.get("format") != FORMAT:
    raise ValueError(f"{path}: expected a plan file of --calibrate ({FORMAT!r})")
  expected = {"format", *FIELDS, "num_iter", "seq_len", "drift"}
  if missing := expected - content.keys():
    raise ValueError(f"{path}: missing field {min(missing)}")
  if unknown := content.keys() - expected:
    raise ValueError(f"{path}: unknown field {min(unknown)}")
  for field, found in (("num_iter", sample.num_iter), ("seq_len", config.seq_len)):
    if content[field] != found:
      raise ValueError(f"{path}: made for {field}={content[field]!r}, expected {found}")
  try:
    loaded = dataclasses.replace(sample, **{field: content[field] for field in FIELDS})
    if "marche" not in parse_policy(loaded.policy):
      raise ValueError(f"policy={loaded.policy!r}: expected marche in it")
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  last = sample.num_iter - 1
  if not (loaded.refresh_iterations and loaded.refresh_iterations[-1] <= last):
    raise ValueError(
      f"{path}: refresh_iterations={list(loaded.refresh_iterations)}: expected iterations from 0 "
      f"to {last}"
    )
  return loaded
