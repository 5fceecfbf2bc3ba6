"""`python -m marche_jax.train --config=FILE [--workdir=DIR]`: trains a MAR.

Killed at any moment and started again with the same arguments, it continues from its last
checkpoint. `--export=DIR` writes the EMA weights of the last checkpoint as a model that
`marche_jax.sample --checkpoint=DIR` loads, and trains nothing.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
from absl import flags

from marche_jax import checkpoint, generation, trainer
from marche_jax import flags as flags_lib
from marche_jax.config import Config
from marche_jax.images import check_writable, grid, write_png


def define_flags() -> None:
  """Defines the command's flags: when it runs, not when its functions are imported."""
  flags.DEFINE_string("workdir", None, "Where the run lives; default: runs/NAME.")
  flags.DEFINE_string("export", None, "Write the last EMA weights there and stop.")
  flags.DEFINE_enum(
    "export_dtype", "float32", list(checkpoint.DTYPES), "How --export stores weights."
  )
  flags.DEFINE_string(
    "vae", None, "Checkpoint directory with the autoencoder that decodes sample grids of latents."
  )
  flags_lib.define_config()
  flags_lib.define_compilation_cache()


def draw_grid(config: Config, params: Any, path: pathlib.Path) -> None:
  """Writes a grid of samples: eight columns, a class per row at most."""
  vae_config, vae_params = None, None
  if config.vae is not None and flags.FLAGS.vae is not None:
    vae_config, vae_params = checkpoint.load_part(flags.FLAGS.vae, "vae")
  model = checkpoint.Model(config.model, params, vae_config, vae_params)
  rows = min(config.model.class_num, 10)
  labels = np.repeat(np.arange(rows), 8)
  latents = generation.generate(model, labels, jax.random.key(0), config.sample)
  write_png(path, grid(generation.to_images(model, latents), columns=8), scale=2)


def main() -> None:
  flags_lib.enable_compilation_cache()
  config = flags_lib.parsed_config()
  workdir = check_writable(flags.FLAGS.workdir or pathlib.Path("runs") / config.name)
  if flags.FLAGS.export is not None:
    params, step = trainer.load_ema(workdir, config)
    checkpoint.save_model(
      flags.FLAGS.export, "mar", config.model, params,
      sample_config=config.sample, dtype=flags.FLAGS.export_dtype,
    )  # fmt: skip
    print(f"{flags.FLAGS.export}: EMA weights of update {step}")
    return

  def on_sample(params: Any, step: int) -> None:
    try:
      draw_grid(config, params, workdir / f"samples-{step:08d}.png")
    except generation.NonFiniteLatentsError as error:
      print(f"no samples at update {step}: {error}")

  draws = config.vae is None or flags.FLAGS.vae is not None
  trainer.train(config, workdir, on_sample if draws else None)


if __name__ == "__main__":
  define_flags()
  flags_lib.run(main)
