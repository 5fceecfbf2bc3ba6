"""Pictures: uint8 images, grids of them, PNG files."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from marche_jax.files import atomic_write

GAP = 2
"""Pixels of white between the images of a grid."""


def to_uint8(images: np.ndarray) -> np.ndarray:
  """Pixels of a model as bytes, rounded as the reference does (MAR's `engine_mar.py`, ADM).

  clip(127.5 x + 128, 0, 255), cut to an integer: the inverse of x = u / 127.5 - 1 for every byte u.

  Args:
    images: floats of any shape, nominally in [-1, 1]; whatever is outside is clipped.

  Returns:
    uint8, of the same shape.

  Raises:
    ValueError: for NaN or infinity, which have no colour, and for anything but floats.
  """
  images = np.asarray(images)
  if not np.issubdtype(images.dtype, np.floating):
    raise ValueError(f"images: expected floats in [-1, 1], found {images.dtype}")
  finite = np.isfinite(images)
  if not finite.all():
    bad = images.size - int(np.count_nonzero(finite))
    raise ValueError(f"images: expected finite values, found {bad} of {images.size} non-finite")
  return np.clip(images.astype(np.float32) * 127.5 + 128.0, 0.0, 255.0).astype(np.uint8)


def grid(images: np.ndarray, columns: int) -> np.ndarray:
  """Lays images out row by row, with gaps of 2 white pixels between them (none at the border).

  Args:
    images: uint8 [num, height, width, channels], num at least 1, channels 1 (grey) or 3 (RGB).
    columns: images in a row, at least 1. The places that the last row leaves free are white.

  Returns:
    uint8 [rows * height + (rows - 1) * 2, columns * width + (columns - 1) * 2, channels]; with
    fewer images than columns, the grid is only as wide as the images.

  Raises:
    ValueError: for other shapes or dtypes, or columns below 1.
  """
  images = np.asarray(images)
  if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
    raise ValueError(
      f"images: expected uint8 [num, height, width, channels], found {images.dtype} {images.shape}"
    )
  _check_channels(images.shape[3])
  if columns < 1:
    raise ValueError(f"columns={columns}: expected at least 1")
  num, height, width, channels = images.shape
  columns = min(columns, num)
  rows = -(-num // columns)
  # Every cell brings a gap below and to its right; the last ones are cut off.
  cells = np.full((rows * columns, height + GAP, width + GAP, channels), 255, np.uint8)
  cells[:num, :height, :width] = images
  cells = cells.reshape(rows, columns, height + GAP, width + GAP, channels).swapaxes(1, 2)
  return cells.reshape(rows * (height + GAP), columns * (width + GAP), channels)[:-GAP, :-GAP]


def write_png(path: str | os.PathLike[str], image: np.ndarray, scale: int = 1) -> None:
  """Writes one image as a PNG file, aside and renamed.

  Args:
    path: the file; its directory exists.
    image: uint8 [height, width] or [height, width, channels], channels 1 (grey) or 3 (RGB).
    scale: every pixel becomes scale x scale pixels (nearest neighbour).

  Raises:
    ValueError: for other shapes or dtypes, or a scale below 1.
    OSError: where the file cannot be written.
  """
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim not in (2, 3) or 0 in image.shape:
    raise ValueError(
      f"image: expected uint8 [height, width, channels], found {image.dtype} {image.shape}"
    )
  if image.ndim == 3:
    _check_channels(image.shape[2])
    image = image[..., 0] if image.shape[2] == 1 else image
  if scale < 1:
    raise ValueError(f"scale={scale}: expected at least 1")
  picture = Image.fromarray(np.ascontiguousarray(image.repeat(scale, 0).repeat(scale, 1)))
  with atomic_write(path) as aside:
    picture.save(aside, format="PNG")


def _check_channels(channels: int) -> None:
  if channels not in (1, 3):
    raise ValueError(f"image: expected 1 (grey) or 3 (RGB) channels, found {channels}")
