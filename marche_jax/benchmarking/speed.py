"""How long decoding takes under several policies, measured side by side on one device.

All programs are compiled first. Then the policies take turns, A B C A B C, so that noise of the
machine hits all alike. Only the split into parts, and the whole runs that check an estimate, come
afterwards, policy by policy. Weights are shared; a policy's caches exist only while it runs.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from marche_jax.benchmarking import profiling
from marche_jax.benchmarking.entries import Entry, baseline
from marche_jax.benchmarking.timing import (
  Options,
  Program,
  estimate_seconds,
  interleave,
  rows_to_time,
)
from marche_jax.config import ModelConfig
from marche_jax.models.mar import Params, inference_params
from marche_jax.planning.plan import DecodePlan
from marche_jax.planning.shapes import describe


def compare(
  config: ModelConfig,
  params: Params,
  entries: Sequence[Entry],
  options: Options,
  progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
  """Measures decoding of one batch under several policies.

  Args:
    config, params: of `MAR`.
    entries: what to compare.
    options: how to measure.
    progress: is told what happens next.

  Returns:
    The report as plain JSON values; `tables.speed_table` shows what it holds. Seconds and FLOPs are
    per image, memory is of the batch. `typical` seconds are the median of whole runs, which follow
    one that warms up; of an estimate, the sum of the least timing of every row, with the sum of the
    largest as `max`. Of an estimate, memory and compilation are those of the program for one row,
    which differs from the sampler's in the number of its trips.

  Raises:
    ValueError: where a whole run gives NaN or infinity (single rows are not looked at).
  """
  if jnp.dtype(options.dtype) == jnp.dtype(options.head_dtype):
    params = inference_params(params, options.dtype)
  programs = {}
  for entry in entries:
    progress(f"compiling {entry.name} ({len(entry.plan.step_shapes)} step shapes)")
    programs[entry.name] = Program(entry.plan, params, options, one_row=options.estimate)

  dtypes = {jnp.dtype(options.dtype), jnp.dtype(options.head_dtype)}
  peaks = {dtype: profiling.matmul_peak(dtype) for dtype in dtypes}
  measure = _estimates if options.estimate else _whole_runs
  seconds = measure(programs, options, progress)
  checked = _check(programs, options, progress) if options.check else {}
  for dtype, before in peaks.items():  # other work on the machine lowers it
    peaks[dtype] = max(before, profiling.matmul_peak(dtype))

  found: dict[str, dict[str, Any]] = {}
  for entry in entries:
    split = None
    if options.split:
      progress(f"encoder, decoder and head of {entry.name} apart")
      split = profiling.split(
        entry.plan, params, options.batch_size, options.dtype, options.head_dtype
      )
    found[entry.name] = _describe(programs[entry.name], entry, seconds[entry.name], split, peaks)
    if checked:
      whole = checked[entry.name]
      estimate = found[entry.name]["seconds_per_image"]["typical"]
      found[entry.name] |= {"whole_run_seconds": whole, "estimate_over_whole_run": estimate / whole}
  base = baseline(entries)
  for entry in entries:
    found[entry.name] |= _relative(
      found[entry.name], found[base.name], entry.plan.speedup(base.plan)
    )
  return {
    "model": dataclasses.asdict(config),
    "batch_size": options.batch_size,
    "dtype": jnp.dtype(options.dtype).name,
    "head_dtype": jnp.dtype(options.head_dtype).name,
    **profiling.environment(),
    "estimated": options.estimate,
    "repeats": options.repeats,
    "matmul_peak_gflops": peaks[jnp.dtype(options.dtype)] / 1e9,
    "weight_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)),
    "baseline": base.name,
    "policies": found,
  }


def single(report: dict[str, Any]) -> dict[str, Any]:
  """The report of `compare` for one policy, in one level: without what compares."""
  ((name, policy),) = report["policies"].items()
  compares = {"speedup", "predicted_speedup", "measured_over_predicted", "transformer_speedup"}
  shared = {key: value for key, value in report.items() if key not in ("policies", "baseline")}
  return shared | {"policy": name} | {k: v for k, v in policy.items() if k not in compares}


def _whole_runs(
  programs: dict[str, Program], options: Options, progress: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
  """Seconds per image by policy: `runs`, and `typical`, `min`, `max` of them."""
  runs = {name: program.whole_run for name, program in programs.items()}
  progress("warming up")
  interleave(runs, 1)
  found = {}
  for name, seconds in interleave(runs, options.repeats, progress).items():
    each = [s / options.batch_size for s in seconds]
    found[name] = {
      "runs": each,
      "seconds_per_image": {
        "typical": statistics.median(each), "min": min(each), "max": max(each)
      },
    }  # fmt: skip
  return found


def _estimates(
  programs: dict[str, Program], options: Options, progress: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
  """As `_whole_runs`, but estimated; `runs` holds the estimates of single rounds."""

  def timer(program: Program) -> Callable[[], dict[int, float]]:
    numbers = {number for pair in rows_to_time(program.plan).values() for number in pair}
    return lambda: program.time_rows(sorted(numbers))

  timers = {name: timer(program) for name, program in programs.items()}
  progress("warming up")
  for program in programs.values():
    program.warm_up()
  found = {}
  for name, rounds in interleave(timers, options.repeats, progress).items():
    plan = programs[name].plan

    def estimate(measured: dict[int, float], plan: DecodePlan = plan) -> float:
      return estimate_seconds(plan, measured) / options.batch_size

    least, most = (
      estimate({number: pick(timed[number] for timed in rounds) for number in rounds[0]})
      for pick in (min, max)
    )
    found[name] = {
      "runs": [estimate(timed) for timed in rounds],
      "seconds_per_image": {"typical": least, "min": least, "max": most},
      "timed_rows": len(rounds[0]) - 1,
    }
  return found


def _check(
  programs: dict[str, Program], options: Options, progress: Callable[[str], None]
) -> dict[str, float]:
  """Seconds per image of one whole run of every policy."""
  found = {}
  for name, program in programs.items():
    progress(f"whole run of {name}")
    whole = Program(program.plan, program.params, options)
    whole.warm_up()
    found[name] = whole.whole_run() / options.batch_size
  return found


def _describe(
  program: Program,
  entry: Entry,
  seconds: dict[str, Any],
  split: dict[str, float] | None,
  peaks: dict[Any, float],
) -> dict[str, Any]:
  """The report of one policy on its own."""
  plan, options = entry.plan, program.options
  flops, exact = plan.flops(), plan.flops(padded=False)
  typical, peak = seconds["seconds_per_image"]["typical"], peaks[jnp.dtype(options.dtype)]
  fraction = {"total": flops.total / typical / peak}
  if split is not None:
    fraction |= {
      "encoder": flops.encoder / split["encoder"] / peak,
      "decoder": flops.decoder / split["decoder"] / peak,
      "head": flops.head / split["head"] / peaks[jnp.dtype(options.head_dtype)],
    }
    split = split | {"other": typical - sum(split.values())}
  return {
    "sample": dataclasses.asdict(entry.sample),
    "iterations": len(plan.rows),
    "diffusion_steps": [
      pick(plan.diffusion_steps(row) for row in plan.rows) for pick in (min, max)
    ],
    "step_shapes": len(plan.step_shapes),
    "shapes": [describe(shape) for shape in plan.step_shapes],
    "lower_seconds": program.lower_seconds,
    "compile_seconds": program.compile_seconds,
    "compiled_from_cache": program.from_cache,
    **seconds,
    "split_seconds": split,
    "padding": dict(zip(("encoder", "head"), plan.padding())),
    "gflops_per_image": {k: v / 1e9 for k, v in dataclasses.asdict(flops).items()}
    | {"total": flops.total / 1e9, "without_padding": exact.total / 1e9},
    "fraction_of_peak": fraction,
    "cache_bytes_per_image": plan.cache_bytes_per_image,
    "memory_bytes": program.memory(),
  }


def _relative(policy: dict[str, Any], base: dict[str, Any], predicted: float) -> dict[str, Any]:
  """Speed-ups over the baseline: measured, predicted, and of encoder and decoder alone."""
  measured = base["seconds_per_image"]["typical"] / policy["seconds_per_image"]["typical"]
  transformer = None
  if policy["split_seconds"] is not None:
    ours, theirs = (p["split_seconds"]["encoder"] + p["split_seconds"]["decoder"]
                    for p in (policy, base))  # fmt: skip
    transformer = theirs / ours
  return {
    "speedup": measured,
    "predicted_speedup": predicted,
    "measured_over_predicted": measured / predicted,
    "transformer_speedup": transformer,
  }
