"""Reports of `marche_jax.benchmark` as text."""

from __future__ import annotations

from collections.abc import Sequence

from marche_jax.benchmarking.reports import (
  Environment,
  QualityReport,
  SingleReport,
  SpeedReport,
)
from marche_jax.evaluation import quality


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of a table: the first column to the left, the others to the right."""
  widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

  def line(row: Sequence[str]) -> str:
    cells = [f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)]
    return "  ".join(cells).rstrip()

  return [line(head), *(line(row) for row in rows)]


def quality_table(report: QualityReport) -> str:
  """Quality and speed of several policies, and of real images."""
  head = ["policy", "recognised", "Fréchet", "(95%)", "latent RMSE", "PSNR", "s/image", "speed-up",
          "predicted", "GFLOP", "front"]  # fmt: skip
  rows, apart = [], False
  for name, found in report["policies"].items():
    difference = found["difference"]
    apart |= not found["timed_with_baseline"]
    rows.append(
      [
        name,
        *_judged(found["quality"]),
        "-" if difference is None else f"{difference['latent_rmse']:.3f}",
        "-" if difference is None else f"{difference['psnr']:.1f}",
        number(found["seconds_per_image"]["median"]),
        f"{found['speedup']:.2f}" + ("" if found["timed_with_baseline"] else "*"),
        f"{found['predicted_speedup']:.2f}",
        number(found["gflops_per_image"]),
        "yes" if found.get("on_front") else "",
      ]
    )
  for name, judged in report.get("real", {}).items():
    rows.append([f"({name})", *_judged(judged), *["-"] * 6, ""])
  lines = [
    f"{report['num_images']} images in batches of {report['batch_size']}, seed {report['seed']}, "
    f"{report['dtype']}; {_machine(report)}",
    "",
    *columns(head, rows),
    "",
    "Fréchet: distance to the training images by the shipped classifier's features. RMSE (over the "
    f"standard deviation) and PSNR: to the same images of {report['baseline']}.",
  ]
  if apart:
    lines.append(f"* timed in another run than {report['baseline']}")
  return "\n".join(lines)


def _machine(report: Environment) -> str:
  return f"{report['device']}, {report['cpus']} CPUs; jax {report['versions']['jax']}"


def speed_table(report: SpeedReport) -> str:
  """Speed of several policies."""
  policies = report["policies"]
  how = "median of the runs, their range"
  if report["estimated"]:
    how = "estimated from single rows: the least timings, the largest"
  speed = [
    [
      name,
      number(p["seconds_per_image"]["typical"]),
      " to ".join(number(p["seconds_per_image"][end]) for end in ("min", "max")),
      f"{p['speedup']:.2f}",
      f"{p['predicted_speedup']:.2f}",
      f"{p['measured_over_predicted']:.2f}",
      "-" if p["transformer_speedup"] is None else f"{p['transformer_speedup']:.2f}",
      f"{p['fraction_of_peak']['total']:.0%}",
      *(
        [number(p["whole_run_seconds"]), f"{p['estimate_over_whole_run']:.3f}"]
        if "whole_run_seconds" in p else []
      ),
    ]
    for name, p in policies.items()
  ]  # fmt: skip
  speed_head = ["policy", "s/image", "range", "speed-up", "predicted", "ratio", "transformer",
                "of peak"]  # fmt: skip
  if any("whole_run_seconds" in p for p in policies.values()):
    speed_head += ["whole run", "estimate / whole"]
  parts = ("encoder", "decoder", "head", "other")
  split = [
    [name, *(number((p["split_seconds"] or {}).get(part)) for part in parts)]
    for name, p in policies.items()
  ]
  resources = [
    [
      name,
      str(p["iterations"]),
      number(p["gflops_per_image"]["total"]),
      number(p["gflops_per_image"]["without_padding"]),
      number(p["cache_bytes_per_image"] / 2**20),
      number(p["memory_bytes"]["peak"] / 2**30),
      number(p["memory_bytes"]["temporary"] / 2**30),
      str(p["step_shapes"]),
      f"{p['compile_seconds']:.1f}" + ("c" if p["compiled_from_cache"] else ""),
      f"{p['lower_seconds']:.1f}",
    ]
    for name, p in policies.items()
  ]
  lines = [
    f"{report['name']}, batch {report['batch_size']}, {report['dtype']}, head "
    f"{report['head_dtype']}; weights {report['weight_bytes'] / 2**30:.3g} GiB; "
    f"{_machine(report)}; matmul peak {report['matmul_peak_gflops']:.0f} GFLOP/s",
    "",
    f"Seconds per image ({how}), speed-up over {report['baseline']}, of FLOPs as predicted, "
    "measured / predicted, of encoder and decoder alone:",
    *columns(speed_head, speed),
    "",
  ]
  if any(p["split_seconds"] is not None for p in policies.values()):
    lines += ["Seconds per image, parts apart:", *columns(["policy", *parts], split), ""]
  lines += [
    "GFLOP per image, padded and exact; cache, MiB per image in float32; memory of the batch, GiB; "
    "seconds (c: from the compilation cache):",
    *columns(
      ["policy", "iterations", "GFLOP", "exact", "cache", "peak", "temporary", "step shapes",
       "compile", "tracing"], resources,
    ),
  ]  # fmt: skip
  return "\n".join(lines)


def single_table(report: SingleReport) -> str:
  """Speed of one policy."""
  sample, padding = report["sample"], report["padding"]
  split, flops = report["split_seconds"], report["gflops_per_image"]
  fraction, seconds = report["fraction_of_peak"], report["seconds_per_image"]
  temporary, peak = (report["memory_bytes"][k] / 2**30 for k in ("temporary", "peak"))
  weights = report["weight_bytes"] / 2**30
  cached = ", from the compilation cache" if report["compiled_from_cache"] else ""
  diffusion_steps = " to ".join(dict.fromkeys(map(str, report["diffusion_steps"])))
  lines = [
    f"device            {_machine(report)}",
    f"model             {report['name']}, batch {report['batch_size']}, {report['dtype']}, head "
    f"{report['head_dtype']}",
    f"decoding          policy {report['policy']}, {report['iterations']} iterations, "
    f"{diffusion_steps} diffusion steps, guidance {sample['cfg']}",
    f"compile           {report['compile_seconds']:.1f} s{cached}, tracing "
    f"{report['lower_seconds']:.1f} s; {report['step_shapes']} step shapes",
    f"memory            {temporary:.3f} GiB temporary, {weights:.3f} GiB of weights "
    f"({temporary / weights:.2f}x); {peak:.3f} GiB in all",
    f"cache             {report['cache_bytes_per_image'] / 2**20:.1f} MiB per image in float32",
    f"matmul peak       {report['matmul_peak_gflops']:.0f} GFLOP/s in {report['dtype']}",
    f"padded / exact    tokens: encoder {padding['encoder']:.2f}, head {padding['head']:.2f}; "
    f"FLOPs: {flops['total'] / flops['without_padding']:.2f}",
    "",
    "per image      seconds   share     GFLOP   of peak",
  ]
  if split is not None:
    for name in ("encoder", "decoder", "head"):
      share = split[name] / seconds["typical"]
      lines.append(
        f"  {name:9s} {split[name]:10.3f} {share:7.0%} {flops[name]:9.1f} {fraction[name]:9.0%}"
      )
    lines.append(f"  other     {split['other']:10.3f} {split['other'] / seconds['typical']:7.0%}")
  how = f"median of {len(report['runs'])}"
  if report["estimated"]:
    how = f"estimated from {report['timed_rows']} of {report['iterations']} rows"
  lines.append(
    f"  total     {seconds['typical']:10.3f}         {flops['total']:9.1f} {fraction['total']:9.0%}"
    f"   ({how}; {seconds['min']:.3f} to {seconds['max']:.3f})"
  )
  if "whole_run_seconds" in report:
    lines.append(
      f"  whole run {report['whole_run_seconds']:10.3f}         estimate / whole run: "
      f"{report['estimate_over_whole_run']:.3f}"
    )
  return "\n".join(lines)


def number(value: float | None) -> str:
  """A number with three significant digits, in full from 100 on; a dash for None."""
  if value is None:
    return "-"
  return f"{value:.0f}" if value == 0 or abs(value) >= 100 else f"{value:#.3g}"


def _judged(found: quality.Report | None) -> list[str]:
  if found is None:
    return ["-"] * 3
  low, high = found["frechet_interval"]
  return [f"{found['recognised']:.1%}", f"{found['frechet']:.2f}", f"{low:.2f} to {high:.2f}"]
