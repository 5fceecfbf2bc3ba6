"""`python -m marche_jax.benchmark`: how long decoding takes, where, and what a policy gains.

With one policy (`--policy`, or that of the configuration): seconds per image, their split, and how
near the machine's peak they are. With several (`--policies=full,marche,gtr`): the same side by
side, policies taking turns. `--estimate` times single rows instead of whole runs, for large models.

On one device. The program is the one that sampling runs, but in one piece; the split is measured
apart (see `profiling.py`). What is left of the whole is `other` (drawing noise, gathering and
scattering tokens, laying out the head's weights), which is slightly negative where the parts on
their own were slower than in the whole.

`--quality` compares the images too, on the embedded model where no other is given: it draws the
same ones under every policy and writes quality.json, quality.png and images.png to `--quality_out`.
A run that was interrupted goes on, and one with more policies draws what is missing (see
`comparison.py`).
"""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from marche_jax import flags as flags_lib
from marche_jax.benchmarking import comparison, speed, tables, timing
from marche_jax.benchmarking.entries import ALL, all_entries, parse_entries
from marche_jax.benchmarking.reports import QualityReport, SpeedReport
from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.embedded import CONFIG
from marche_jax.files import atomic_write, user_path
from marche_jax.images import write_png
from marche_jax.models.mar import Params, abstract_params
from marche_jax.sampling.loading import load
from marche_jax.training.sources import IdxSource
from marche_jax.visualization import plots

SPEED_FLAGS = ("random_weights", "repeats", "estimate", "check", "split", "head_dtype", "plot")
QUALITY_FLAGS = ("num_images", "seed", "quality_out", "data")


def define_flags() -> None:
  """Defines the command's flags: when it runs, not when its functions are imported."""
  flags.DEFINE_string("checkpoint", None, "Checkpoint directory; default: embedded.")
  flags.DEFINE_bool("random_weights", False, "Measure without a checkpoint.")
  flags.DEFINE_list(
    "policies", None,
    "Policies to compare, each with fields of its own: full,marche:refresh_interval=9; 'all' are "
    f"{','.join(ALL)}, and full in half the iterations",
  )  # fmt: skip
  flags.DEFINE_string("policy", None, "One policy, as in --policies.")
  flags.DEFINE_integer(
    "batch_size", None, "Images decoded together; default: 1, with --quality 250."
  )
  flags.DEFINE_integer("repeats", 3, "Timed runs, after one that warms up.")
  flags.DEFINE_bool("estimate", False, "Time one row of every step shape, not whole runs.")
  flags.DEFINE_bool("check", False, "With --estimate: also time one whole run.")
  flags.DEFINE_bool("split", True, "Also time encoder, decoder and head apart.")
  flags.DEFINE_string("out", "benchmark.json", "File for the report (with --quality: see there).")
  flags.DEFINE_string("plot", None, "PNG file for a chart of several policies.")
  flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of activations and matrix products."
  )
  flags.DEFINE_enum(
    "head_dtype", None, ["float32", "bfloat16"], "Of the head's matrix operands; default: --dtype."
  )
  flags.DEFINE_bool("quality", False, "Compare the policies' images too.")
  flags.DEFINE_integer("num_images", 5000, "--quality: images per policy.")
  flags.DEFINE_integer("seed", 0, "--quality: image i depends on (seed, i, label) alone.")
  flags.DEFINE_string("quality_out", "quality", "--quality: directory of images and report.")
  flags.DEFINE_string("data", None, "--quality: IDX files of real test images, judged as well.")
  flags_lib.define_config(str(CONFIG))
  flags_lib.define_compilation_cache()


def random_params(config: ModelConfig, seed: int = 0) -> Params:
  """Weights of the true size, N(0, 0.02^2) and norm scales 1 + that: nothing in them is zero."""
  rng = np.random.default_rng(seed)

  def draw(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    centre = 1.0 if path[-1].key == "scale" else 0.0
    return jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32) + np.float32(centre))

  return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def measure_speed() -> None:
  """Measures one policy, or several side by side."""
  values = flags.FLAGS
  if values.random_weights and values.checkpoint is not None:
    raise ValueError("expected one of --checkpoint=DIR and --random_weights, found both")
  out = user_path(values.out, "--out")
  plot = None if values.plot is None else user_path(values.plot, "--plot")
  for flag, path in (("out", out), ("plot", plot)):
    if path is not None and not path.absolute().parent.is_dir():
      raise ValueError(f"--{flag}={path}: expected a file in a directory that exists")
    if path is not None and path.is_dir():
      raise ValueError(f"--{flag}={path}: expected a file, found a directory")
  options = timing.Options(
    batch_size=1 if values.batch_size is None else values.batch_size,
    repeats=values.repeats,
    dtype=jnp.dtype(values.dtype),
    head_dtype=jnp.dtype(values.head_dtype or values.dtype),
    estimate=values.estimate,
    check=values.check,
    split=values.split,
  )
  if plot is not None:
    plots.require_matplotlib()
  if values.random_weights:
    config = flags_lib.parsed_config()
    model, sample, weights = config.model, config.sample, "random"
    entries = parse_entries(asked(sample), model, sample)
    params = random_params(model)
  else:
    loaded, sample = load(values.checkpoint, values["config"])
    model, params, weights = loaded.config, loaded.params, values.checkpoint or "embedded"
    entries = parse_entries(asked(sample), model, sample, lambda: loaded.weights_digest)
  if plot is not None and len(entries) == 1:
    raise ValueError("--plot: expected several policies to compare, found one")
  found = speed.compare(model, params, entries, options, progress=flags_lib.say)
  report: SpeedReport = {"name": model_name(), "weights": weights, **found}
  single = speed.single(report) if len(entries) == 1 else None
  with atomic_write(out) as aside:
    aside.write_text(json.dumps(single or report, indent=2) + "\n")
  print(tables.speed_table(report) if single is None else tables.single_table(single))
  if plot is not None:
    plots.plot_speed(plot, report)


def measure_quality() -> None:
  """Draws and judges the same images under several policies."""
  values = flags.FLAGS
  out = user_path(values.quality_out, "--quality_out")
  model, sample = load(values.checkpoint, values["config"])
  entries = parse_entries(
    asked(sample, all_entries(sample)), model.config, sample, lambda: model.weights_digest
  )
  settings = comparison.Settings(
    num_images=values.num_images,
    batch_size=250 if values.batch_size is None else values.batch_size,
    seed=values.seed,
    dtype=jnp.dtype(values.dtype),
  )
  real = None
  if values.data is not None:
    source = IdxSource(user_path(values.data, "--data"), "t10k", model.config)
    real = source.images[: settings.num_images], source.labels[: settings.num_images]
  compile_seconds = comparison.draw(model, entries, settings, out)
  flags_lib.say("judging")
  report: QualityReport = {
    "name": model_name(),
    "weights": values.checkpoint or "embedded",
    **comparison.report(model, entries, settings, out, compile_seconds, real),
  }
  with atomic_write(out / "quality.json") as aside:
    aside.write_text(json.dumps(report, indent=2) + "\n")
  size = model.config.img_size
  images = comparison.example_images(model, entries, settings, out, max(8, min(20, 1600 // size)))
  write_png(out / "images.png", plots.compare_images(images, scale=max(1, 56 // size)))
  print(tables.quality_table(report))
  try:
    plots.plot_plane(out / "quality.png", report)
  except (ImportError, ValueError) as error:  # the table and the images are worth having without
    flags_lib.say(f"no {out / 'quality.png'}: {error}")


def asked(sample: SampleConfig, default: list[str] | None = None) -> list[str]:
  """The entries that the flags ask for; without any, the default or the configuration's policy."""
  values = flags.FLAGS
  if values.policy is not None and values.policies is not None:
    raise ValueError("expected one of --policy and --policies, found both")
  if values.policy is not None:
    return [values.policy]
  if values.policies is None:
    return default or [sample.policy]
  return all_entries(sample) if values.policies == ["all"] else values.policies


def model_name() -> str:
  """Of the configuration where one was given, else of the checkpoint."""
  given = flags.FLAGS["config"].present or flags.FLAGS.checkpoint is None
  return flags_lib.parsed_config().name if given else pathlib.Path(flags.FLAGS.checkpoint).name


def main() -> None:
  flags_lib.enable_compilation_cache()
  others = SPEED_FLAGS if flags.FLAGS.quality else QUALITY_FLAGS
  for flag in (*others, *(("out",) if flags.FLAGS.quality else ())):
    if flags.FLAGS[flag].present:
      raise ValueError(f"--{flag}: {'not with' if flags.FLAGS.quality else 'only with'} --quality")
  (measure_quality if flags.FLAGS.quality else measure_speed)()


if __name__ == "__main__":
  define_flags()
  flags_lib.run(main)
