"""`python -m marche_jax.train --config=FILE [--workdir=DIR]`: trains a MAR.

Killed at any moment and started again with the same arguments, it continues from its last
checkpoint. `--export=DIR` writes the EMA weights of the last checkpoint as a model that
`marche_jax.sample --checkpoint=DIR` loads, and trains nothing.
"""

from __future__ import annotations

import pathlib

import numpy as np
from absl import flags

from marche_jax import config as config_lib
from marche_jax import flags as flags_lib
from marche_jax.config import Config, ModelConfig, VAEConfig
from marche_jax.decoding.generation import generate
from marche_jax.decoding.pixels import to_images
from marche_jax.decoding.plan_runner import NonFiniteLatentsError
from marche_jax.decoding.state import run_key
from marche_jax.files import user_path
from marche_jax.images import grid, write_png
from marche_jax.models.params import Params
from marche_jax.planning.policies import make_plan
from marche_jax.training import trainer
from marche_jax.weights import checkpoint


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


def load_autoencoder(directory: str, config: ModelConfig) -> tuple[VAEConfig, Params]:
  """The autoencoder of a checkpoint, which must fit the model.

  Raises:
    ValueError: names the directory and what does not fit.
  """
  vae_config, params = checkpoint.load_part(directory, "vae")
  try:
    config_lib.check_vae(config, vae_config)
  except ValueError as error:
    raise ValueError(f"--vae={directory}: {error}") from error
  return vae_config, params


def draw_grid(model: checkpoint.Model, path: pathlib.Path) -> None:
  """Writes a grid of samples: eight columns, a class per row at most."""
  rows = min(model.config.class_num, 10)
  labels = np.repeat(np.arange(rows), 8)
  latents = generate(model, labels, run_key(0))
  write_png(path, grid(to_images(model, latents), columns=8), scale=2)


def export(
  config: Config, workdir: pathlib.Path, directory: str | pathlib.Path, dtype: str
) -> None:
  """Writes the EMA weights of the last checkpoint in `workdir` as a model.

  Raises:
    ValueError: for a place that holds a model already or cannot be written, or no run of this model
      in `workdir`.
  """
  try:
    checkpoint.check_destination(directory, "mar", config.model)
  except ValueError as error:
    if (pathlib.Path(directory) / "mar").exists():
      raise ValueError(f"{error}: take another --export, or remove {directory}") from error
    raise
  params, updates = trainer.load_ema(workdir, config.model)
  checkpoint.save_model(
    directory, "mar", config.model, params, sample_config=config.sample, dtype=dtype
  )
  print(f"{directory}: EMA weights of update {updates}")


def main() -> None:
  flags_lib.enable_compilation_cache()
  values = flags.FLAGS
  config = flags_lib.parsed_config()
  make_plan(config.model, config.sample)  # refuses now what sampling would refuse later
  workdir = pathlib.Path("runs") / config.name
  if values.workdir is not None:
    workdir = user_path(values.workdir, "--workdir")
  if values.export is not None:
    export(config, workdir, user_path(values.export, "--export"), values.export_dtype)
    return
  vae_config, vae_params = None, None
  if values.vae is not None:
    vae = str(user_path(values.vae, "--vae"))
    vae_config, vae_params = load_autoencoder(vae, config.model)

  def on_sample(params: Params, update: int) -> None:
    model = checkpoint.Model(config.model, params, vae_config, vae_params, config.sample)
    try:
      draw_grid(model, workdir / f"samples-{update:08d}.png")
    except NonFiniteLatentsError as error:
      print(f"no samples at update {update}: {error}")

  draws = config.model.vae_stride == 1 or vae_config is not None
  if not draws and config.train.sample_every:
    print("no sample grids: latents need --vae=DIR to become images")
  last = int(trainer.train(config, workdir, on_sample if draws else None).step)
  print(
    f"{workdir}: trained to the end, {last} updates; --export=DIR writes the EMA weights of "
    f"{workdir / 'checkpoints' / str(last)} as a model"
  )


if __name__ == "__main__":
  define_flags()
  flags_lib.run(main)
