"""`python -m marche_jax.sample`: draws images and writes them to `--out`.

Without a flag it samples the embedded Fashion-MNIST model. Finished batches are kept in
`--out/partial` until the end, so a run that was interrupted and is started again with the same
settings goes on where it was.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import jax.numpy as jnp
from absl import flags

from marche_jax import flags as flags_lib
from marche_jax.benchmarking.entries import with_policy
from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.decoding import calibration
from marche_jax.decoding.generation import RunSettings
from marche_jax.decoding.given import check_labels
from marche_jax.decoding.state import run_key
from marche_jax.embedded import CONFIG
from marche_jax.files import check_writable, user_path
from marche_jax.planning.plan_file import save_plan
from marche_jax.planning.policies import make_plan
from marche_jax.sampling import job
from marche_jax.sampling.loading import config_overrides, configs, load
from marche_jax.visualization import trace
from marche_jax.weights.checkpoint import Model

CALIBRATION_IMAGES = 8
"""Images that --calibrate measures on."""


def define_flags() -> None:
  """Defines the command's flags: when it runs, not when its functions are imported."""
  flags.DEFINE_string("checkpoint", None, "Checkpoint directory; default: embedded.")
  flags.DEFINE_string("out", "samples", "Directory for samples.npz, grid.png, report.json.")
  flags.DEFINE_integer(
    "num_images", None, "Images to draw; default: one per entry of --labels, else 100."
  )
  flags.DEFINE_integer("batch_size", 50, "Images per batch, over all devices.")
  flags.DEFINE_list(
    "labels", None, "Classes, repeated in turn; default: all of them, equally often, in order."
  )
  flags.DEFINE_integer("seed", 0, "Image i depends on (seed, i, label) alone.")
  flags.DEFINE_string(
    "policy", None, "Short for --config.sample.policy; or FILE.json, a plan of --calibrate."
  )
  flags.DEFINE_string(
    "calibrate", None, "Measure on 8 images where the cache drifts, write a plan FILE.json, stop."
  )
  flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of activations and matrix products."
  )
  flags.DEFINE_bool("save_latents", False, "Also store latents in samples.npz.")
  flags.DEFINE_bool(
    "profile", False, "Also measure transformer and head apart (compiles and runs them once more)."
  )
  flags.DEFINE_bool("print_plan", False, "Print the plan and stop.")
  flags.DEFINE_string(
    "trace", None, "Directory for pictures of what decoding did; decodes some images once more."
  )
  flags.DEFINE_list("trace_images", None, "Numbers of these images; default: the first three.")
  flags.DEFINE_integer(
    "trace_every", None, "Every n-th iteration in a file; default: 12 of them. The GIF has all."
  )
  flags_lib.define_config(str(CONFIG))
  flags_lib.define_compilation_cache()


def print_plan(config: ModelConfig, sample_config: SampleConfig) -> None:
  """Prints the plan, compared with that of `full`."""
  baseline = make_plan(config, dataclasses.replace(sample_config, policy="full"))
  print(make_plan(config, sample_config).table(baseline))


def main() -> None:
  flags_lib.enable_compilation_cache()
  values, asked = flags.FLAGS, asked_fields(flags.FLAGS["config"])
  out = user_path(values.out, "--out")
  trace_out = None if values.trace is None else user_path(values.trace, "--trace")
  plan_out = None if values.calibrate is None else user_path(values.calibrate, "--calibrate")
  if plan_out is not None and plan_out.suffix != ".json":
    raise ValueError(f"--calibrate={plan_out}: expected a file name that ends in .json")
  if values.print_plan:
    if plan_out is not None:
      raise ValueError("expected one of --print_plan and --calibrate, found both")
    config, sample_config = configs(values.checkpoint, values["config"])
    print_plan(config, under_policy(values.policy, config, sample_config, asked))
    return
  model, sample_config = load(values.checkpoint, values["config"])
  policy = values.policy
  if plan_out is not None and policy is None and sample_config.policy == "full":
    policy = "marche"
  weights = lambda: model.weights_digest
  sample_config = under_policy(policy, model.config, sample_config, asked, weights)
  if plan_out is not None:
    write_calibrated(plan_out, model, sample_config)
    return
  given = None if values.labels is None else parse_labels(values.labels)
  num_images = values.num_images
  if num_images is None:
    num_images = len(given) if given else 100
  if num_images < 1:
    raise ValueError(f"num_images={num_images}: expected at least 1")
  if given is not None:
    check_labels(given, model.config)  # those beyond num_images too
  labels = job.choose_labels(given, num_images, model.config.class_num)
  traced = traced_images(trace_out, values.trace_images, values.trace_every, num_images)
  settings = RunSettings(
    batch_size=values.batch_size, seed=values.seed, dtype=jnp.dtype(values.dtype)
  )
  drawing = job.Job(
    model, sample_config, labels, settings, out, save_latents=values.save_latents
  )  # fmt: skip
  if trace_out is not None:
    check_writable(trace_out)  # now that nothing else can be wrong: a refused command makes nothing
  report = job.run(drawing, profile=values.profile)
  seconds = f"compiled in {report['compile_seconds']:.1f} s, drawn in {report['run_seconds']:.1f} s"
  print(f"{num_images} images in {out}: {seconds}")
  if split := report.get("split_seconds"):
    print(", ".join(f"{name} {value:.3f} s" for name, value in split.items()) + " per image")
  if trace_out is not None:
    trace.run(model, sample_config, labels, traced, settings, trace_out, values.trace_every)
    print(f"pictures of decoding images {', '.join(map(str, traced))} in {trace_out}")


def traced_images(
  directory: pathlib.Path | None, images: list[str] | None, every: int | None, num_images: int
) -> list[int]:
  """Numbers of the images that `--trace=directory` is about; none without it.

  Raises:
    ValueError: for wrong `--trace_images` or `--trace_every`.
  """
  if directory is None:
    for name, value in (("trace_images", images), ("trace_every", every)):
      if value is not None:
        raise ValueError(f"--{name}: expected --trace=DIR with it")
    return []
  numbers = trace.parse_images(images, num_images)
  trace.pictured(1, every)
  return numbers


def asked_fields(config_flag: flags.Flag) -> list[str]:
  """Fields of `SampleConfig` that the command line names, as --config.sample.FIELD."""
  names = config_overrides(config_flag)
  return [name.removeprefix("sample.") for name in names if name.startswith("sample.")]


def under_policy(
  policy: str | None,
  config: ModelConfig,
  sample_config: SampleConfig,
  asked: list[str],
  weights: Callable[[], str] | None = None,
) -> SampleConfig:
  """`sample_config` under `--policy`, or its own policy where that is None; see `with_policy`.

  Raises:
    ValueError: as `with_policy`, or where the command line names two policies or an empty one.
  """
  if policy == "":
    raise ValueError("--policy: expected a policy or a FILE.json, found an empty text")
  if policy is not None and "policy" in asked:
    raise ValueError("expected one of --policy and --config.sample.policy, found both")
  fields = [field for field in asked if field != "policy"]
  return with_policy(policy or sample_config.policy, config, sample_config, fields, weights)


def write_calibrated(path: pathlib.Path, model: Model, sample_config: SampleConfig) -> None:
  """Measures the drift on `CALIBRATION_IMAGES` images and writes a plan file."""
  make_plan(model.config, sample_config)  # refuses now what would be refused with a directory made
  check_writable(path.absolute().parent)
  labels = job.choose_labels(None, CALIBRATION_IMAGES, model.config.class_num)
  key = run_key(flags.FLAGS.seed)
  dtype = jnp.dtype(flags.FLAGS.dtype)
  chosen, drift = calibration.calibrate(model, sample_config, labels, key, dtype)
  save_plan(path, model.config, model.weights_digest, chosen, drift)
  refreshes = ", ".join(map(str, chosen.refresh_iterations))
  print(f"full refreshes at iterations {refreshes}: {path}")


def parse_labels(values: list[str]) -> list[int]:
  """The integers of --labels; ValueError naming one that is none."""
  labels = []
  for value in values:
    try:
      labels.append(int(value))
    except ValueError:
      raise ValueError(f"labels: found {value!r}, expected integers such as 207,360") from None
  if not labels:
    raise ValueError("labels: found an empty list, expected integers such as 207,360")
  return labels


if __name__ == "__main__":
  define_flags()
  flags_lib.run(main)
