"""Reports of `marche_jax.benchmark` as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of a table: the first column to the left, the others to the right."""
  widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

  def line(row: Sequence[str]) -> str:
    cells = [f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)]
    return "  ".join(cells).rstrip()

  return [line(head), *(line(row) for row in rows)]


def quality_table(report: dict[str, Any]) -> str:
  """The report of `comparison.report`."""
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
        f"{found['seconds_per_image']['median']:.4f}",
        f"{found['speedup']:.2f}" + ("" if found["timed_with_baseline"] else "*"),
        f"{found['predicted_speedup']:.2f}",
        f"{found['gflops_per_image']:.2f}",
        "yes" if found.get("on_front") else "",
      ]
    )
  for name, found in report.get("real", {}).items():
    rows.append([f"({name})", *_judged(found), *["-"] * 6, ""])
  lines = [
    f"{report['num_images']} images in batches of {report['batch_size']}, seed {report['seed']}, "
    f"{report['dtype']}; {report['device']}",
    "",
    *columns(head, rows),
    "",
    "Fréchet: distance to the training images by the shipped classifier's features. RMSE (over the "
    f"standard deviation) and PSNR: to the same images of {report['baseline']}.",
  ]
  if apart:
    lines.append(f"* timed in another run than {report['baseline']}")
  return "\n".join(lines)


def _judged(found: dict[str, Any] | None) -> list[str]:
  if found is None:
    return ["-"] * 3
  low, high = found["frechet_interval"]
  return [f"{found['recognised']:.1%}", f"{found['frechet']:.2f}", f"{low:.2f} to {high:.2f}"]
