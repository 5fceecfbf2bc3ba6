"""The model that `--checkpoint` and `--config` ask for, and how to sample it."""

from __future__ import annotations

import dataclasses

from absl import flags
from ml_collections import config_flags

from marche_jax import flags as flags_lib
from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.files import user_path
from marche_jax.weights.checkpoint import Model, load_model


def config_overrides(config_flag: flags.Flag) -> dict[str, object]:
  """What the command line changes of the configuration, as --config.NAME=VALUE, by name."""
  return dict(config_flags.get_override_values(config_flag)) if config_flag.value else {}


def load(checkpoint_dir: str | None, config_flag: flags.Flag) -> tuple[Model, SampleConfig]:
  """The model and how to sample it, from `--checkpoint`, `--config` and overrides of it.

  Raises:
    ValueError: for a configuration without its checkpoint or one that does not fit it, an override
      of anything but how to sample where no configuration is given, a value out of range.
    OSError: where a file cannot be read.
  """
  overrides = config_overrides(config_flag)
  stored = None if checkpoint_dir is None else user_path(checkpoint_dir, "--checkpoint")
  if config_flag.present:
    config = flags_lib.parsed_config()
    if checkpoint_dir is None and config.name != "fashion_mnist":
      raise ValueError(
        f"--checkpoint is missing: only fashion_mnist is embedded, found --config of {config.name}"
      )
    return load_model(stored, config.model), config.sample
  model = load_model(stored)
  sample_config = model.sample_config or SampleConfig()
  if wrong := [name for name in overrides if not name.startswith("sample.")]:
    raise ValueError(f"--config.{wrong[0]}: only sample.* can change without --config=FILE")
  changes = {name.removeprefix("sample."): value for name, value in overrides.items()}
  return model, dataclasses.replace(sample_config, **changes)  # type: ignore[arg-type]


def configs(
  checkpoint_dir: str | None, config_flag: flags.Flag
) -> tuple[ModelConfig, SampleConfig]:
  """As `load`, without the weights: those of `--config=FILE` need no checkpoint."""
  if config_flag.present and checkpoint_dir is None:
    config = flags_lib.parsed_config()
    return config.model, config.sample
  model, sample_config = load(checkpoint_dir, config_flag)
  return model.config, sample_config
