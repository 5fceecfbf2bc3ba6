"""The `--config` flag that every command shares."""

from __future__ import annotations

from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

from marche_jax import config as config_lib

FLAGS = flags.FLAGS


def define_config(default: str | None = None) -> None:
  """Defines `--config=FILE` and `--config.FIELD=VALUE` over the dataclasses of `config`."""
  config_flags.DEFINE_config_file(
    "config", default, "Python file with a get_config(); override with --config.FIELD=VALUE."
  )


def usage_error(message: str) -> NoReturn:
  """Ends the program with a one-line message, without a traceback."""
  raise app.UsageError(message)


def parsed_config() -> config_lib.Config:
  """The configuration after overrides, validated and frozen.

  Raises:
    app.UsageError: where `--config` is missing or a value is out of range; names the field.
  """
  if FLAGS.config is None:
    usage_error("--config is missing: name a file such as configs/mar_base.py")
  try:
    return config_lib.freeze(FLAGS.config)
  except ValueError as error:
    usage_error(f"--config.{error}")
