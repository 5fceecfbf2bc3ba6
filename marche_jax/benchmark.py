"""`python -m marche_jax.benchmark`: how long decoding takes, where, and how near the peak that is.

On one device. The program is the one that sampling runs, but in one piece; the split is measured
apart (see `profiling.py`). What is left of the whole is `other` (drawing noise, gathering and
scattering tokens, laying out the head's weights), which is slightly negative where the parts on
their own were slower than in the whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from marche_jax import checkpoint, comparison, generation, plots, profiling, sampler, tables
from marche_jax import flags as flags_lib
from marche_jax import sample as sample_lib
from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.embedded import CONFIG
from marche_jax.entries import parse_entries
from marche_jax.images import atomic_write, write_png
from marche_jax.models.mar import Params, abstract_params, inference_params
from marche_jax.policies import make_plan
from marche_jax.sources import IdxSource


def define_flags() -> None:
  """Defines the command's flags: when it runs, not when its functions are imported."""
  flags.DEFINE_string("checkpoint", None, "Checkpoint directory to take weights from.")
  flags.DEFINE_bool("random_weights", False, "Measure without a checkpoint.")
  flags.DEFINE_integer(
    "batch_size", None, "Images decoded together; default: 1, with --quality 250."
  )
  flags.DEFINE_integer("repeats", 3, "Timed runs, after one that warms up.")
  flags.DEFINE_string("out", "benchmark.json", "File for the report.")
  flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of activations and matrix products."
  )
  flags.DEFINE_enum(
    "head_dtype", None, ["float32", "bfloat16"], "Of the head's matrix operands; default: --dtype."
  )
  flags.DEFINE_list(
    "policies", ["full", "marche", "recap", "lazymar", "disa", "gtr", "turbo"],
    "Policies to compare, each with fields of its own: full,marche:refresh_interval=9.",
  )  # fmt: skip
  flags.DEFINE_bool("quality", False, "Compare the policies' images too, on the embedded model.")
  flags.DEFINE_integer("num_images", 5000, "--quality: images per policy.")
  flags.DEFINE_integer("seed", 0, "--quality: image i depends on (seed, i, label) alone.")
  flags.DEFINE_string("quality_out", "quality", "--quality: directory of images and report.")
  flags.DEFINE_string("data", None, "--quality: IDX files of real test images, judged as well.")
  flags_lib.define_config(str(CONFIG))
  flags_lib.define_compilation_cache()


def random_params(config: ModelConfig, seed: int = 0) -> Params:
  """Weights of the true size, N(0, 0.02^2) and norm scales 1 + that: nothing in them is zero."""
  rng = np.random.default_rng(seed)

  def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    centre = 1.0 if path[-1].key == "scale" else 0.0
    return jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32) + np.float32(centre))

  return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def matmul_peak(dtype: Any, tries: int = 5) -> float:
  """FLOP/s of a square matrix product, the best of some tries."""
  size = 2048 if jax.default_backend() == "cpu" else 8192
  x = jnp.full((size, size), 1 / size, dtype)
  product = jax.jit(jnp.matmul).lower(x, x).compile()
  return 2 * size**3 / min(profiling.seconds(lambda: product(x, x), tries))


def measure(
  config: ModelConfig,
  params: Params,
  sample: SampleConfig,
  *,
  batch_size: int = 1,
  repeats: int = 3,
  dtype: Any = jnp.float32,
  head_dtype: Any = jnp.float32,
) -> dict[str, Any]:
  """Measures decoding of one batch.

  Args:
    config, params: of `MAR`.
    sample: how to decode.
    batch_size: images decoded together.
    repeats: timed runs.
    dtype, head_dtype: as in `sampler.decode`.

  Returns:
    The report as plain JSON values; `table` shows what it holds. Seconds and FLOPs are per image,
    memory is of the batch.

  Raises:
    ValueError: for a value out of range, or where decoding gives NaN or infinity.
  """
  for name, value in (("batch_size", batch_size), ("repeats", repeats)):
    if value < 1:
      raise ValueError(f"{name}={value}: expected at least 1")
  if jnp.dtype(dtype) == jnp.dtype(head_dtype):
    params = inference_params(params, dtype)
  plan = make_plan(config, sample)
  rows, tables = sampler.plan_rows(plan)
  keys = sampler.image_keys(jax.random.key(0), jnp.arange(batch_size, dtype=jnp.uint32))
  inputs = sampler.Inputs(jnp.arange(batch_size, dtype=jnp.int32) % config.class_num, keys)
  state = generation.Decoder(plan, dtype=dtype).start(keys)

  clock = time.perf_counter()
  lowered = sampler.jitted_decode.lower(
    params, state, rows, tables, inputs,
    config=config, shapes=plan.shapes, dtype=dtype, head_dtype=head_dtype,
  )  # fmt: skip
  lower_seconds = time.perf_counter() - clock
  clock = time.perf_counter()
  with _cache_hits() as hits:
    program = lowered.compile()
  compile_seconds = time.perf_counter() - clock
  memory = program.memory_analysis()
  assert memory is not None

  finite = []

  def run() -> jax.Array:
    fresh = jax.tree.map(jnp.copy, state)  # the program takes its state's memory
    done, row_is_finite, _ = program(params, fresh, rows, tables, inputs)
    finite.append(row_is_finite)
    return done.tokens

  peaks = {name: matmul_peak(name) for name in {jnp.dtype(dtype), jnp.dtype(head_dtype)}}
  seconds = [s / batch_size for s in profiling.seconds(run, repeats)]
  bad = np.flatnonzero(~np.asarray(finite[-1]).all(axis=1))
  if bad.size:
    raise ValueError(f"non-finite latents at iteration {bad[0]} of {len(plan.rows)}")
  for name, before in peaks.items():
    peaks[name] = max(before, matmul_peak(name))  # other work on the machine lowers it
  peak = peaks[jnp.dtype(dtype)]
  median = statistics.median(seconds)
  parts = profiling.split(plan, params, batch_size, dtype, head_dtype)
  flops = plan.flops()
  weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
  device = jax.devices()[0]
  return {
    "model": dataclasses.asdict(config),
    "sample": dataclasses.asdict(sample),
    "batch_size": batch_size,
    "dtype": jnp.dtype(dtype).name,
    "head_dtype": jnp.dtype(head_dtype).name,
    "device": f"{device.device_kind} ({device.platform})",
    "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    "versions": {p: importlib.metadata.version(p) for p in ("marche_jax", "jax", "jaxlib", "flax")},
    "step_shapes": len(plan.shapes),
    "lower_seconds": lower_seconds,
    "compile_seconds": compile_seconds,
    "compiled_from_cache": bool(hits),
    "runs": seconds,
    "seconds_per_image": {"median": median, "min": min(seconds), "max": max(seconds)},
    "split_seconds": parts | {"other": median - sum(parts.values())},
    "padding": dict(zip(("encoder", "head"), plan.padding())),
    "gflops_per_image": {k: v / 1e9 for k, v in dataclasses.asdict(flops).items()}
    | {"total": flops.total / 1e9, "without_padding": plan.flops(padded=False).total / 1e9},
    "matmul_peak_gflops": peak / 1e9,
    "fraction_of_peak": {
      "encoder": flops.encoder / parts["encoder"] / peak,
      "decoder": flops.decoder / parts["decoder"] / peak,
      "head": flops.head / parts["head"] / peaks[jnp.dtype(head_dtype)],
      "total": flops.total / median / peak,
    },
    "temporary_bytes": memory.temp_size_in_bytes,
    "weight_bytes": weights,
  }


@contextlib.contextmanager
def _cache_hits() -> Iterator[list[str]]:
  """Collects an entry for every program that jax takes from its persistent compilation cache."""
  hits: list[str] = []

  def listen(event: str, **_: Any) -> None:
    if event == "/jax/compilation_cache/cache_hits":
      hits.append(event)

  jax.monitoring.register_event_listener(listen)
  try:
    yield hits
  finally:
    jax.monitoring.unregister_event_listener(listen)


def table(report: dict[str, Any]) -> str:
  """The report as text."""
  sample, versions, padding = report["sample"], report["versions"], report["padding"]
  split, flops = report["split_seconds"], report["gflops_per_image"]
  fraction, seconds = report["fraction_of_peak"], report["seconds_per_image"]
  temporary, weights = (report[k] / 2**30 for k in ("temporary_bytes", "weight_bytes"))
  cached = ", from the compilation cache" if report["compiled_from_cache"] else ""
  lines = [
    f"device            {report['device']}, {report['cpus']} CPUs; jax {versions['jax']}",
    f"model             {report['name']}, batch {report['batch_size']}, {report['dtype']}, head "
    f"{report['head_dtype']}",
    f"decoding          policy {sample['policy']}, {sample['num_iter']} iterations, "
    f"{sample['num_sampling_steps']} diffusion steps, guidance {sample['cfg']}",
    f"compile           {report['compile_seconds']:.1f} s{cached}, tracing "
    f"{report['lower_seconds']:.1f} s; {report['step_shapes']} step shapes",
    f"memory            {temporary:.3f} GiB temporary, {weights:.3f} GiB of weights "
    f"({temporary / weights:.2f}x)",
    f"matmul peak       {report['matmul_peak_gflops']:.0f} GFLOP/s in {report['dtype']}",
    f"padded / exact    tokens: encoder {padding['encoder']:.2f}, head {padding['head']:.2f}; "
    f"FLOPs: {flops['total'] / flops['without_padding']:.2f}",
    "",
    "per image      seconds   share     GFLOP   of peak",
  ]
  for name in ("encoder", "decoder", "head"):
    share = split[name] / seconds["median"]
    lines.append(
      f"  {name:9s} {split[name]:10.3f} {share:7.0%} {flops[name]:9.1f} {fraction[name]:9.0%}"
    )
  lines.append(f"  other     {split['other']:10.3f} {split['other'] / seconds['median']:7.0%}")
  lines.append(
    f"  total     {seconds['median']:10.3f}         {flops['total']:9.1f} {fraction['total']:9.0%}"
    f"   (median of {len(report['runs'])}; {seconds['min']:.3f} to {seconds['max']:.3f})"
  )
  return "\n".join(lines)


def quality_main() -> None:
  """`--quality`: draws and judges the same images under several policies."""
  model, sample = sample_lib.load(flags.FLAGS.checkpoint, flags.FLAGS["config"])
  entries = parse_entries(flags.FLAGS.policies, model.config, sample)
  settings = comparison.Settings(
    flags.FLAGS.num_images, flags.FLAGS.batch_size or 250, flags.FLAGS.seed,
    jnp.dtype(flags.FLAGS.dtype),
  )  # fmt: skip
  real = None
  if flags.FLAGS.data is not None:
    source = IdxSource(pathlib.Path(flags.FLAGS.data), "t10k", model.config)
    real = source.images[: settings.num_images], source.labels[: settings.num_images]
  out = pathlib.Path(flags.FLAGS.quality_out)
  compile_seconds = comparison.draw(model, entries, settings, out)
  print("judging ...", file=sys.stderr, flush=True)
  report = comparison.report(model, entries, settings, out, compile_seconds, real)
  with atomic_write(out / "quality.json") as aside:
    aside.write_text(json.dumps(report, indent=2) + "\n")
  size = model.config.img_size
  images = comparison.example_images(model, entries, settings, out, max(8, min(20, 1600 // size)))
  scale = max(1, 56 // size)
  write_png(out / "images.png", plots.compare_images(images, scale))
  print(tables.quality_table(report))
  try:
    plots.plot_plane(out / "quality.png", report)
  except (ImportError, ValueError) as error:  # the table and the images are worth having without
    print(f"no {out / 'quality.png'}: {error}", file=sys.stderr)


def main() -> None:
  flags_lib.enable_compilation_cache()
  if flags.FLAGS.quality:
    quality_main()
    return
  config = flags_lib.parsed_config()
  if flags.FLAGS.random_weights == (flags.FLAGS.checkpoint is not None):
    raise ValueError("expected one of --checkpoint=DIR and --random_weights")
  out = pathlib.Path(flags.FLAGS.out)
  if not out.absolute().parent.is_dir():
    raise ValueError(f"--out={out}: expected a file in a directory that exists")
  if flags.FLAGS.checkpoint is None:
    params = random_params(config.model)
  else:
    params = checkpoint.load_model(flags.FLAGS.checkpoint, config.model).params
  report = {"name": config.name, "weights": flags.FLAGS.checkpoint or "random"} | measure(
    config.model,
    params,
    config.sample,
    batch_size=flags.FLAGS.batch_size or 1,
    repeats=flags.FLAGS.repeats,
    dtype=jnp.dtype(flags.FLAGS.dtype),
    head_dtype=jnp.dtype(flags.FLAGS.head_dtype or flags.FLAGS.dtype),
  )
  with atomic_write(out) as aside:
    aside.write_text(json.dumps(report, indent=2) + "\n")
  print(table(report))


if __name__ == "__main__":
  define_flags()
  flags_lib.run(main)
