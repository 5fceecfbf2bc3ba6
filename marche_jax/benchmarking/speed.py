"""How long decoding takes under several policies, measured side by side on one device.

All programs are compiled first. Then the policies take turns, A B C A B C, so that noise of the
machine hits all alike. Only the split into parts, and the whole runs that check an estimate, come
afterwards, policy by policy. Weights are shared; a policy's caches exist only while it runs.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from marche_jax.benchmarking import profiling
from marche_jax.benchmarking.entries import Entry, baseline
from marche_jax.benchmarking.reports import (
  ComparedSpeed,
  Gains,
  PolicySpeed,
  SingleReport,
  SpeedFindings,
  SpeedReport,
  Timed,
)
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
) -> SpeedFindings:
  """Measures decoding of one batch under several policies.

  Args:
    config, params: of `MAR`.
    entries: what to compare.
    options: how to measure.
    progress: is told what happens next.

  Returns:
    The report; `tables.speed_table` shows what it holds. Seconds and FLOPs are
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

  alone: dict[str, PolicySpeed] = {}
  for entry in entries:
    split = None
    if options.split:
      progress(f"encoder, decoder and head of {entry.name} apart")
      split = profiling.split(
        entry.plan, params, options.batch_size, options.dtype, options.head_dtype
      )
    found = _describe(programs[entry.name], entry, seconds[entry.name], split, peaks)
    if checked:
      whole, estimate = checked[entry.name], found["seconds_per_image"]["typical"]
      found["whole_run_seconds"] = whole
      found["estimate_over_whole_run"] = estimate / whole
    alone[entry.name] = found
  base = baseline(entries)
  policies: dict[str, ComparedSpeed] = {
    entry.name: {
      **alone[entry.name],
      **_relative(alone[entry.name], alone[base.name], entry.plan.speedup(base.plan)),
    }
    for entry in entries
  }
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
    "policies": policies,
  }


def single(report: SpeedReport) -> SingleReport:
  """The report of `compare` for one policy, in one level: without what compares."""
  ((name, policy),) = report["policies"].items()
  shared = {key: value for key, value in report.items() if key not in ("policies", "baseline")}
  own = {key: value for key, value in policy.items() if key not in Gains.__annotations__}
  return cast(SingleReport, shared | {"policy": name} | own)


def _whole_runs(
  programs: dict[str, Program], options: Options, progress: Callable[[str], None]
) -> dict[str, Timed]:
  """Seconds per image by policy: `runs`, and `typical`, `min`, `max` of them."""
  runs = {name: program.whole_run for name, program in programs.items()}
  progress("warming up")
  interleave(runs, 1)
  found: dict[str, Timed] = {}
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
) -> dict[str, Timed]:
  """As `_whole_runs`, but estimated; `runs` holds the estimates of single rounds."""

  def timer(program: Program) -> Callable[[], dict[int, float]]:
    numbers = {number for pair in rows_to_time(program.plan).values() for number in pair}
    return lambda: program.time_rows(sorted(numbers))

  timers = {name: timer(program) for name, program in programs.items()}
  progress("warming up")
  for program in programs.values():
    program.warm_up()
  found: dict[str, Timed] = {}
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
  seconds: Timed,
  split: dict[str, float] | None,
  peaks: dict[np.dtype, float],
) -> PolicySpeed:
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


def _relative(policy: PolicySpeed, base: PolicySpeed, predicted: float) -> Gains:
  """Speed-ups over the baseline: measured, predicted, and of encoder and decoder alone."""
  measured = base["seconds_per_image"]["typical"] / policy["seconds_per_image"]["typical"]
  transformer = None
  ours, theirs = policy["split_seconds"], base["split_seconds"]
  if ours is not None and theirs is not None:
    transformer = (theirs["encoder"] + theirs["decoder"]) / (ours["encoder"] + ours["decoder"])
  return {
    "speedup": measured,
    "predicted_speedup": predicted,
    "measured_over_predicted": measured / predicted,
    "transformer_speedup": transformer,
  }
