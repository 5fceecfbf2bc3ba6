"""`python -m marche_jax.train --config=FILE [--workdir=DIR]`: trains a MAR."""

from __future__ import annotations

import pathlib
import sys

from absl import app, flags

from marche_jax import flags as flags_lib
from marche_jax import trainer

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; default: runs/NAME.")
flags_lib.define_config()


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    flags_lib.usage_error(f"unknown argument {argv[1]!r}")
  config = flags_lib.parsed_config()
  workdir = pathlib.Path(_WORKDIR.value or pathlib.Path("runs") / config.name)
  try:
    trainer.train(config, workdir)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  app.run(main)
