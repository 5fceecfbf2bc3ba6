"""`python -m marche_jax.sample`: draws images and writes them to `--out`.

Without a flag it samples the embedded Fashion-MNIST model. Finished batches are kept in
`--out/partial` until the end, so a run that was interrupted and is started again with the same
settings goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import pathlib
import shutil
import sys
import time
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags
from tqdm import tqdm

from marche_jax import flags as flags_lib
from marche_jax.benchmarking import profiling
from marche_jax.benchmarking.entries import with_policy
from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.decoding import calibration, generation
from marche_jax.decoding import state as state_lib
from marche_jax.decoding.state import Inputs
from marche_jax.embedded import CHECKPOINT, CONFIG
from marche_jax.files import atomic_write, check_writable
from marche_jax.images import grid, write_png
from marche_jax.models.mar import inference_params, unpatchify
from marche_jax.planning.plan_file import save_plan
from marche_jax.planning.policies import make_plan
from marche_jax.visualization import trace
from marche_jax.weights import checkpoint
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


def choose_labels(labels: list[int] | None, num_images: int, class_num: int) -> np.ndarray:
  """Label of every image, int [num_images]: the given ones in turn, or each class equally often."""
  if labels is not None:
    return np.resize(np.asarray(labels), num_images)
  return np.arange(num_images) * class_num // num_images


def run(
  model: Model,
  sample_config: SampleConfig,
  labels: np.ndarray,
  *,
  out: pathlib.Path,
  batch_size: int,
  seed: int,
  dtype: Any = jnp.float32,
  save_latents: bool = False,
  profile: bool = False,
) -> dict[str, Any]:
  """Draws one image per label into `out`; returns the report that it wrote there.

  With `profile` the report also holds `split_seconds`: seconds per image of 'transformer' (encoder
  and decoder) and 'head', measured apart on one device with its share of the batch.

  Raises:
    ValueError: for a value out of range, or a directory that cannot be written.
  """
  labels = generation.check_labels(labels, model.config)
  generation.require_decodable(model)
  devices = jax.devices()
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size}: expected at least 1")
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed={seed}: expected an integer in [0, 2**32)")
  out = check_writable(out)
  num = len(labels)
  batch_size = -(-min(batch_size, num) // len(devices)) * len(devices)  # as many on every device
  plan = make_plan(model.config, sample_config)
  settings = {
    "model": dataclasses.asdict(model.config),
    "sample": dataclasses.asdict(sample_config),
    "policy": sample_config.policy,
    "seed": seed,
    "batch_size": batch_size,
    "num_images": num,
    "dtype": jnp.dtype(dtype).name,
    "save_latents": save_latents,
  }
  settings = json.loads(json.dumps(settings))  # as the report will be read back
  fingerprint = hashlib.sha256(json.dumps(settings).encode() + labels.tobytes())
  for leaf in jax.tree.leaves((model.params, model.vae_params)):
    fingerprint.update(np.asarray(leaf).tobytes())
  partial = out / "partial" / fingerprint.hexdigest()[:16]
  partial.mkdir(parents=True, exist_ok=True)

  mesh = None
  if len(devices) > 1:
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  decoder = generation.PlanRunner(
    plan, dtype=dtype, head_dtype=dtype, mesh=mesh, chunk=-(-len(plan.rows) // 8)
  )
  model = dataclasses.replace(
    model,
    params=decoder.place(inference_params(model.params, dtype)),
    vae_params=decoder.place(model.vae_params),
  )
  starts = range(0, num, batch_size)
  parts = [partial / f"{start:08d}.npz" for start in starts]
  todo = [start for start, part in zip(starts, parts, strict=True) if not part.exists()]
  compile_seconds, run_seconds = 0.0, 0.0
  if todo:
    print(f"compiling ({len(plan.step_shapes)} step shapes) ...", file=sys.stderr, flush=True)
    compile_seconds = decoder.compile(model.params, batch_size)
    compile_seconds += generation.compile_to_images(model, batch_size, mesh)
    bar = tqdm(total=num * len(plan.rows), desc="sampling", unit="iteration", unit_scale=True)
    bar.update((num - sum(min(batch_size, num - s) for s in todo)) * len(plan.rows))
    start_clock = time.perf_counter()
    for start in todo:
      _draw(model, decoder, mesh, labels, start, batch_size, seed, save_latents, partial, bar)
    run_seconds = time.perf_counter() - start_clock
    bar.close()

  drawn = sum(min(batch_size, num - s) for s in todo)
  report = {
    **settings,
    "versions": {p: importlib.metadata.version(p) for p in ("marche_jax", "jax", "jaxlib", "flax")},
    "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
    "compile_seconds": compile_seconds,
    "run_seconds": run_seconds,
    "images_drawn": drawn,
    "images_per_second": drawn / run_seconds if drawn else None,
    "gflops_per_image": plan.flops().total / 1e9,
  }
  if profile:
    print("profiling ...", file=sys.stderr, flush=True)
    split = profiling.split(plan, model.params, batch_size // len(devices), dtype, dtype)
    report["split_seconds"] = {
      "transformer": split["encoder"] + split["decoder"], "head": split["head"]
    }  # fmt: skip
  _collect(parts, out, labels, save_latents)
  with atomic_write(out / "report.json") as aside:
    aside.write_text(json.dumps(report, indent=2) + "\n")
  shutil.rmtree(partial)
  with contextlib.suppress(OSError):  # batches of other, unfinished settings stay
    partial.parent.rmdir()
  return report


def _draw(
  model: Model,
  decoder: generation.PlanRunner,
  mesh: Mesh | None,
  labels: np.ndarray,
  start: int,
  batch_size: int,
  seed: int,
  save_latents: bool,
  partial: pathlib.Path,
  bar: tqdm,
) -> None:
  """One batch; a short last one is padded by repeating its last label."""
  real = labels[start : start + batch_size]
  batch = np.pad(real, (0, batch_size - len(real)), mode="edge")
  ids = jnp.arange(start, start + batch_size, dtype=jnp.uint32)
  keys = state_lib.image_keys(state_lib.run_key(seed), ids)
  tokens = decoder(
    model.params,
    decoder.start(keys),
    Inputs(batch, keys),
    progress=lambda iterations: bar.update(iterations * len(real)),
  )
  latents = unpatchify(tokens, model.config)
  arrays = {"images": generation.to_images(model, latents, mesh)[: len(real)]}
  if save_latents:
    arrays["latents"] = np.asarray(latents)[: len(real)]
  with atomic_write(partial / f"{start:08d}.npz") as aside, aside.open("wb") as file:
    np.savez(file, **arrays)  # type: ignore[arg-type]


def _collect(
  parts: list[pathlib.Path], out: pathlib.Path, labels: np.ndarray, save_latents: bool
) -> None:
  """Joins finished batches into samples.npz, one batch in memory at a time, and draws grid.png."""

  def stream(archive: zipfile.ZipFile, name: str, source: str) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
      for number, part in enumerate(parts):
        with np.load(part, allow_pickle=False) as batch:
          array = batch[source]
        if number == 0:
          header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False,
                    "shape": (len(labels), *array.shape[1:])}  # fmt: skip
          np.lib.format.write_array_header_2_0(file, header)
        file.write(np.ascontiguousarray(array).tobytes())

  with atomic_write(out / "samples.npz") as aside, zipfile.ZipFile(aside, "w") as archive:
    stream(archive, "arr_0", "images")
    with archive.open("arr_1.npy", "w") as file:
      np.lib.format.write_array(file, labels, allow_pickle=False)
    if save_latents:
      stream(archive, "latents", "latents")

  shown, images = min(len(labels), 100), []
  for part in parts:
    with np.load(part, allow_pickle=False) as batch:
      images.append(batch["images"])
    if sum(map(len, images)) >= shown:
      break
  picture = grid(np.concatenate(images)[:shown], columns=math.ceil(math.sqrt(shown)))
  write_png(out / "grid.png", picture, scale=max(1, 64 // images[0].shape[1]))


def config_overrides(config_flag: Any) -> dict[str, Any]:
  """What the command line changes of the configuration, as --config.NAME=VALUE, by name."""
  return dict(config_flags.get_override_values(config_flag)) if config_flag.value else {}


def load(checkpoint_dir: str | None, config_flag: Any) -> tuple[Model, SampleConfig]:
  """The model and how to sample it, from `--checkpoint`, `--config` and overrides of it."""
  overrides = config_overrides(config_flag)
  if config_flag.present:
    config = flags_lib.parsed_config()
    if checkpoint_dir is None and config.name != "fashion_mnist":
      raise ValueError(
        f"--checkpoint is missing: only fashion_mnist is embedded, found --config of {config.name}"
      )
    return checkpoint.load_model(checkpoint_dir or CHECKPOINT, config.model), config.sample
  model = checkpoint.load_model(checkpoint_dir or CHECKPOINT)
  sample = model.sample_config or SampleConfig()
  if wrong := [name for name in overrides if not name.startswith("sample.")]:
    raise ValueError(f"--config.{wrong[0]}: only sample.* can change without --config=FILE")
  changes = {name.removeprefix("sample."): value for name, value in overrides.items()}
  return model, dataclasses.replace(sample, **changes)


def configs(checkpoint_dir: str | None, config_flag: Any) -> tuple[ModelConfig, SampleConfig]:
  """As `load`, without the weights: those of `--config=FILE` need no checkpoint."""
  if config_flag.present and checkpoint_dir is None:
    config = flags_lib.parsed_config()
    return config.model, config.sample
  model, sample_config = load(checkpoint_dir, config_flag)
  return model.config, sample_config


def print_plan(config: ModelConfig, sample_config: SampleConfig) -> None:
  """Prints the plan, compared with that of `full`."""
  baseline = make_plan(config, dataclasses.replace(sample_config, policy="full"))
  print(make_plan(config, sample_config).table(baseline))


def main() -> None:
  flags_lib.enable_compilation_cache()
  values, asked = flags.FLAGS, asked_fields(flags.FLAGS["config"])
  if values.print_plan:
    if values.calibrate is not None:
      raise ValueError("expected one of --print_plan and --calibrate, found both")
    config, sample_config = configs(values.checkpoint, values["config"])
    print_plan(config, under_policy(values.policy, config, sample_config, asked))
    return
  model, sample_config = load(values.checkpoint, values["config"])
  policy = values.policy
  if values.calibrate is not None and policy is None and sample_config.policy == "full":
    policy = "marche"
  sample_config = under_policy(policy, model.config, sample_config, asked)
  if values.calibrate is not None:
    write_calibrated(values.calibrate, model, sample_config)
    return
  given = None if values.labels is None else parse_labels(values.labels)
  num_images = values.num_images
  if num_images is None:
    num_images = len(given) if given else 100
  if num_images < 1:
    raise ValueError(f"num_images={num_images}: expected at least 1")
  if given is not None:
    generation.check_labels(given, model.config)  # those beyond num_images too
  labels = choose_labels(given, num_images, model.config.class_num)
  traced = traced_images(values.trace, values.trace_images, values.trace_every, num_images)
  report = run(
    model,
    sample_config,
    labels,
    out=pathlib.Path(values.out),
    batch_size=values.batch_size,
    seed=values.seed,
    dtype=jnp.dtype(values.dtype),
    save_latents=values.save_latents,
    profile=values.profile,
  )
  seconds = f"compiled in {report['compile_seconds']:.1f} s, drawn in {report['run_seconds']:.1f} s"
  print(f"{num_images} images in {values.out}: {seconds}")
  if split := report.get("split_seconds"):
    print(", ".join(f"{name} {value:.3f} s" for name, value in split.items()) + " per image")
  if traced:
    trace.run(
      model,
      sample_config,
      labels,
      traced,
      out=pathlib.Path(values.trace),
      batch_size=values.batch_size,
      seed=values.seed,
      dtype=jnp.dtype(values.dtype),
      every=values.trace_every,
    )
    print(f"pictures of decoding images {', '.join(map(str, traced))} in {values.trace}")


def traced_images(
  directory: str | None, images: list[str] | None, every: int | None, num_images: int
) -> list[int]:
  """Numbers of the images that `--trace=directory` is about; none without it.

  Raises:
    ValueError: for wrong `--trace_images` or `--trace_every`, or a directory that cannot be
      written.
  """
  if directory is None:
    for name, value in (("trace_images", images), ("trace_every", every)):
      if value is not None:
        raise ValueError(f"--{name}: expected --trace=DIR with it")
    return []
  numbers = trace.parse_images(images, num_images)
  trace.pictured(1, every)
  check_writable(directory)
  return numbers


def asked_fields(config_flag: Any) -> list[str]:
  """Fields of `SampleConfig` that the command line names, as --config.sample.FIELD."""
  names = config_overrides(config_flag)
  return [name.removeprefix("sample.") for name in names if name.startswith("sample.")]


def under_policy(
  policy: str | None, config: ModelConfig, sample_config: SampleConfig, asked: list[str]
) -> SampleConfig:
  """`sample_config` under `--policy`, or its own policy where that is None; see `with_policy`.

  Raises:
    ValueError: as `with_policy`, or where the command line names two policies.
  """
  if policy is not None and "policy" in asked:
    raise ValueError("expected one of --policy and --config.sample.policy, found both")
  fields = [field for field in asked if field != "policy"]
  return with_policy(policy or sample_config.policy, config, sample_config, fields)


def write_calibrated(path: str, model: Model, sample_config: SampleConfig) -> None:
  """Measures the drift on `CALIBRATION_IMAGES` images and writes a plan file."""
  if not path.endswith(".json"):
    raise ValueError(f"--calibrate={path}: expected a file name that ends in .json")
  check_writable(pathlib.Path(path).absolute().parent)
  labels = choose_labels(None, CALIBRATION_IMAGES, model.config.class_num)
  key = state_lib.run_key(flags.FLAGS.seed)
  dtype = jnp.dtype(flags.FLAGS.dtype)
  chosen, drift = calibration.calibrate(model, sample_config, labels, key, dtype)
  save_plan(pathlib.Path(path), model.config, chosen, drift)
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
