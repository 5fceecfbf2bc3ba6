"""Plan files of `sample --calibrate`: when MARché refreshes, and with which fields.

JSON, so that it can be read and edited. What is in it is checked like any other input. A file also
says what it was measured on: it is refused for another model or number of iterations, where it
means nothing, and warned of where the drift that it was chosen by may be another (weights,
guidance, ...).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
from absl import logging

from marche_jax.config import TRAINING_FIELDS, ModelConfig, SampleConfig
from marche_jax.files import atomic_write
from marche_jax.planning.policies import check_fields, parse_policy

FORMAT = "marche_jax refresh plan, version 3"

FIELDS = (
  "policy", "refresh_iterations", "active_size", "encoder_active_size", "select_layer", "selection",
  "condition_cache",
)  # fmt: skip
"""Fields of `SampleConfig` that a plan file decides on."""

MEASURED = tuple(
  field.name
  for field in dataclasses.fields(SampleConfig)
  if field.name not in (*FIELDS, "num_iter", "refresh_interval")
)
"""Fields of `SampleConfig` that the drift was measured under, guidance among them: a plan file may
be used with others."""


def save_plan(
  path: pathlib.Path, config: ModelConfig, weights: str, sample: SampleConfig, drift: np.ndarray
) -> None:
  """Writes a plan file: what `load_plan` reads, and the drift since each refresh to look at.

  Args:
    path: of the file.
    config: of the model that was measured.
    weights: their digest, `Model.weights_digest`.
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
    "model": _model_fields(config),
    "weights": weights,
    "sample": {field: getattr(sample, field) for field in MEASURED},
    "drift": [float(drift[r, k]) for k, r in enumerate(since)],
  }
  with atomic_write(path) as aside:
    aside.write_text(json.dumps(content, indent=2) + "\n")


def load_plan(
  path: pathlib.Path,
  config: ModelConfig,
  sample: SampleConfig,
  weights: Callable[[], str] | None = None,
) -> SampleConfig:
  """`sample` with what a plan file decides on.

  Warns, by field, where it was measured on other weights or under another guidance, temperature,
  ...: another schedule may then be better.

  Args:
    path: of the file.
    config: of the model that is to decode.
    sample: how it decodes otherwise.
    weights: gives the digest of its weights, `Model.weights_digest`; None: not at hand.

  Raises:
    ValueError: where the file is none, cannot be read, holds what it should not, or was made for
      another model or number of iterations; starts with its path.
  """
  try:
    content = json.loads(path.read_text())
  except OSError as error:
    reason = error.strerror or error
    raise ValueError(f"{path}: expected a plan file of --calibrate: {reason}") from error
  except (ValueError, RecursionError) as error:  # no JSON, no UTF-8
    raise ValueError(f"{path}: expected a plan file of --calibrate: {error}") from error
  found = content.get("format") if isinstance(content, dict) else None
  if isinstance(found, str) and found.startswith(FORMAT.rpartition(" ")[0]) and found != FORMAT:
    raise ValueError(
      f"{path}: format={found!r}, expected {FORMAT!r}, which says what it was made for: write it "
      "again with --calibrate"
    )
  if found != FORMAT:
    raise ValueError(f"{path}: expected a plan file of --calibrate ({FORMAT!r})")
  expected = {"format", *FIELDS, "num_iter", "seq_len", "model", "weights", "sample", "drift"}
  if missing := expected - content.keys():
    raise ValueError(f"{path}: missing field {min(missing)}")
  if unknown := content.keys() - expected:
    raise ValueError(f"{path}: unknown field {min(unknown)}")
  for field in ("model", "sample"):
    if not isinstance(content[field], dict):
      raise ValueError(f"{path}: {field}={content[field]!r}: expected fields and their values")
  if content["seq_len"] != config.seq_len:
    raise ValueError(f"{path}: made for seq_len={content['seq_len']!r}, expected {config.seq_len}")
  if differing := _differing("model", content["model"], _model_fields(config)):
    raise ValueError(f"{path}: made for another model: {'; '.join(differing)}")
  if (num_iter := content["num_iter"]) != sample.num_iter:
    raise ValueError(
      f"{path}: made for num_iter={num_iter!r}, expected {sample.num_iter}: use it with "
      f"--config.sample.num_iter={num_iter}"
    )
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
  names = [name for name in MEASURED if _is_read(loaded, name)]
  for text in _differing(
    "sample", content["sample"], {name: getattr(sample, name) for name in names}
  ):
    logging.warning("%s: measured with %s; calibrate again for the best refreshes", path, text)
  if weights is not None and content["weights"] != weights():
    logging.warning("%s: measured on other weights; calibrate again for the best refreshes", path)
  return loaded


def _model_fields(config: ModelConfig) -> dict[str, object]:
  """All that decoding depends on."""
  fields = dataclasses.asdict(config)
  return {name: value for name, value in fields.items() if name not in TRAINING_FIELDS}


def _differing(
  prefix: str, stored: Mapping[str, object], current: Mapping[str, object]
) -> list[str]:
  """The fields whose stored value is not the current one, with both."""
  return [
    f"{prefix}.{name}={stored.get(name)!r}, now {value!r}"
    for name, value in current.items()
    if stored.get(name) != value
  ]


def _is_read(sample: SampleConfig, field: str) -> bool:
  """Whether decoding depends on a field of `sample`."""
  try:
    check_fields(sample.policy, [field], sample.cfg != 1.0)
  except ValueError:
    return False
  return True
