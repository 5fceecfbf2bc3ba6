"""`python -m marche_jax.evaluate --samples=DIR/samples.npz`: how good Fashion-MNIST samples are.

Prints, and with `--out=FILE` saves as JSON, what `quality.evaluate_samples` measures. Judge
5,000 samples or more: the distance of fewer is biased upwards.
"""

from __future__ import annotations

import json
import pathlib
import zipfile

import numpy as np
from absl import flags

from marche_jax import flags as flags_lib
from marche_jax.evaluation import quality
from marche_jax.files import atomic_write

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
           "ankle boot")  # fmt: skip


def define_flags() -> None:
  """Defines the command's flags: when it runs, not when its functions are imported."""
  flags.DEFINE_string("samples", "samples/samples.npz", "File that `marche_jax.sample` wrote.")
  flags.DEFINE_string("out", None, "Also write the report here, as JSON.")


def read_samples(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """Images uint8 [num, H, W, C] and labels int [num] of a `samples.npz`.

  Raises:
    FileNotFoundError: where there is no such file.
    ValueError: where it is no such archive; names what is missing.
  """
  try:
    with np.load(path, allow_pickle=False) as file:  # TypeError: of a .npy, which is no archive
      if missing := {"arr_0", "arr_1"} - set(file.files):
        raise ValueError(f"no array {min(missing)}")
      return file["arr_0"], file["arr_1"]
  except (zipfile.BadZipFile, EOFError, ValueError, TypeError) as error:
    raise ValueError(
      f"--samples={path}: expected a samples.npz of marche_jax.sample: {error}"
    ) from error


def table(report: quality.Report) -> str:
  """The report as text."""
  low, high = report["frechet_interval"]
  lines = [f"{report['num_images']} samples: {report['recognised']:.1%} recognised, Fréchet "
           f"distance {report['frechet']:.2f} ({low:.2f} to {high:.2f})"]  # fmt: skip
  for name, share in zip(CLASSES, report["recognised_per_class"], strict=True):
    lines.append(f"  {name:10s} {'-' if share is None else f'{share:6.1%}'}")
  return "\n".join(lines)


def main() -> None:
  report = quality.evaluate_samples(*read_samples(pathlib.Path(flags.FLAGS.samples)))
  print(table(report))
  if flags.FLAGS.out is not None:
    with atomic_write(pathlib.Path(flags.FLAGS.out)) as aside:
      aside.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
  define_flags()
  flags_lib.run(main)
