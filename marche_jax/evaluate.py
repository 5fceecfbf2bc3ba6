"""`python -m marche_jax.evaluate --samples=DIR/samples.npz`: how good Fashion-MNIST samples are.

Prints, and with `--out=FILE` saves as JSON, what `quality.evaluate_samples` measures. Judge
5,000 samples or more: the distance of fewer is biased upwards, and a warning says so.
"""

from __future__ import annotations

import json
import math
import pathlib
import tokenize
import zipfile
import zlib
from typing import NamedTuple

import numpy as np
from absl import flags, logging

from marche_jax import flags as flags_lib
from marche_jax.evaluation import quality
from marche_jax.files import atomic_write, check_file_writable, user_path

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
           "ankle boot")  # fmt: skip

ENOUGH = 5000
"""Samples whose Fréchet distance means something; fewer are warned of."""

MAX_IMAGES = 1_000_000
"""More than anybody judges: a small archive can say that it holds any number of zeros."""


def define_flags() -> None:
  """Defines the command's flags: when it runs, not when its functions are imported."""
  flags.DEFINE_string("samples", "samples/samples.npz", "File that `marche_jax.sample` wrote.")
  flags.DEFINE_string("out", None, "Also write the report here, as JSON.")


def read_samples(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """Images uint8 [num, H, W, C] and labels int [num] of a `samples.npz`.

  Names, dtypes, shapes and sizes are looked at before any array is read: other arrays (latents)
  never are.

  Raises:
    ValueError: where there is no such file, or it is no such archive; starts with the path and
      names what is missing or wrong.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      for name in ("arr_0", "arr_1"):
        if f"{name}.npy" not in archive.namelist():
          raise ValueError(f"no array {name}")
      images, labels = (_header(archive, name) for name in ("arr_0", "arr_1"))
      num = images.shape[0] if images.shape else 0
      if images != (np.uint8, (num, *quality.IMAGE_SHAPE)):
        raise ValueError(f"arr_0: expected uint8 [num, 28, 28, 1], found {images}")
      if num > MAX_IMAGES:
        raise ValueError(f"arr_0: expected at most {MAX_IMAGES:,} images, found {num:,}")
      if labels.dtype.kind not in "iu" or labels.shape != (num,):
        raise ValueError(
          f"arr_1: expected a label of every image, integers [{num}], found {labels}"
        )
    with np.load(path, allow_pickle=False) as file:
      return file["arr_0"], file["arr_1"]
  except OSError as error:
    reason = error.strerror or str(error)
  except (
    zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError,
    SyntaxError, tokenize.TokenError,  # numpy reads headers as Python
  ) as error:  # fmt: skip
    reason = str(error)
  raise ValueError(f"--samples={path}: expected a samples.npz of marche_jax.sample: {reason}")


class _Header(NamedTuple):
  """What the start of a stored array says of it."""

  dtype: np.dtype
  shape: tuple[int, ...]

  def __str__(self) -> str:
    return f"{self.dtype} {list(self.shape)}"


def _header(archive: zipfile.ZipFile, name: str) -> _Header:
  """The header of an array of an `.npz`; ValueError where its size is another."""
  with archive.open(f"{name}.npy") as file:
    version = np.lib.format.read_magic(file)
    read = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
      raise ValueError(f"{name}: unknown version {version} of the format")
    shape, _, dtype = read(file)
    header = _Header(dtype, shape)
    size = archive.getinfo(f"{name}.npy").file_size - file.tell()
  if dtype.hasobject or size != math.prod(shape) * dtype.itemsize:
    raise ValueError(f"{name}: {header} in {size} bytes")
  return header


def table(report: quality.Report) -> str:
  """The report as text."""
  low, high = report["frechet_interval"]
  lines = [f"{report['num_images']} samples: {report['recognised']:.1%} recognised, Fréchet "
           f"distance {report['frechet']:.2f} ({low:.2f} to {high:.2f})"]  # fmt: skip
  for name, share in zip(CLASSES, report["recognised_per_class"], strict=True):
    lines.append(f"  {name:10s} {'-' if share is None else f'{share:6.1%}'}")
  return "\n".join(lines)


def main() -> None:
  images, labels = read_samples(user_path(flags.FLAGS.samples, "--samples"))
  out = None
  if flags.FLAGS.out is not None:
    out = check_file_writable(user_path(flags.FLAGS.out, "--out"), "--out")
  report = quality.evaluate_samples(images, labels)
  if few := too_few(len(images)):
    logging.warning(few)
  print(table(report))
  if out is not None:
    with atomic_write(out) as aside:
      aside.write_text(json.dumps(report, indent=2) + "\n")


def too_few(num_images: int) -> str | None:
  """What is wrong with the Fréchet distance of this many samples; None of enough."""
  if num_images <= quality.NUM_FEATURES:
    return (
      f"{num_images} samples span no Gaussian of {quality.NUM_FEATURES} features: their Fréchet "
      f"distance says nothing; judge {ENOUGH:,} or more"
    )
  if num_images < ENOUGH:
    return (
      f"the Fréchet distance of {num_images:,} samples is biased upwards: compare it with that of "
      f"as many only; judge {ENOUGH:,} or more"
    )
  return None


if __name__ == "__main__":
  define_flags()
  flags_lib.run(main)
