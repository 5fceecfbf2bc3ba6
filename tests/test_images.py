"""Rounding, grids and PNG files."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from marche_jax import images


def test_to_uint8_inverts_the_scaling_of_every_byte():
  pixels = np.arange(256, dtype=np.uint8).reshape(2, 8, 16, 1)
  scaled = pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)
  result = images.to_uint8(scaled)
  assert result.dtype == np.uint8
  np.testing.assert_array_equal(result, pixels)


def test_to_uint8_cuts_and_clips():
  values = np.float32([-7.0, -1.0, -0.999, 0.0, 0.5, 0.9999, 1.0, 7.0])
  # 127.5 x + 128 is -764.5, 0.5, 0.6275, 128, 191.75, 255.49, 255.5, 1020.5.
  np.testing.assert_array_equal(images.to_uint8(values), [0, 0, 0, 128, 191, 255, 255, 255])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_to_uint8_refuses_non_finite_values(bad):
  with pytest.raises(ValueError, match="1 of 4 non-finite"):
    images.to_uint8(np.float32([0.0, bad, 0.5, 1.0]))


def test_to_uint8_refuses_bytes():
  with pytest.raises(ValueError, match=r"floats.*uint8"):
    images.to_uint8(np.zeros((2, 2), np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_images_row_by_row_in_white_gaps(channels):
  rng = np.random.default_rng(0)
  batch = rng.integers(0, 200, (5, 4, 6, channels), np.uint8)  # no white pixel
  result = images.grid(batch, 3)
  assert result.dtype == np.uint8 and result.shape == (2 * 4 + 2, 3 * 6 + 2 * 2, channels)
  covered = np.zeros(result.shape, bool)
  for n in range(5):
    top, left = n // 3 * (4 + 2), n % 3 * (6 + 2)
    np.testing.assert_array_equal(result[top : top + 4, left : left + 6], batch[n])
    covered[top : top + 4, left : left + 6] = True
  assert (result[~covered] == 255).all()


def test_grid_is_no_wider_than_its_images():
  batch = np.zeros((2, 3, 3, 1), np.uint8)
  assert images.grid(batch, 10).shape == (3, 8, 1)
  np.testing.assert_array_equal(images.grid(batch[:1], 10), batch[0])


@pytest.mark.parametrize(
  ("batch", "columns", "message"),
  [
    (np.zeros((2, 3, 3, 1), np.float32), 2, "float32"),
    (np.zeros((3, 3, 1), np.uint8), 2, r"\(3, 3, 1\)"),
    (np.zeros((0, 3, 3, 1), np.uint8), 2, r"\(0, 3, 3, 1\)"),
    (np.zeros((2, 3, 3, 2), np.uint8), 2, "found 2"),
    (np.zeros((2, 3, 3, 1), np.uint8), 0, "columns=0"),
  ],
)
def test_grid_refuses(batch, columns, message):
  with pytest.raises(ValueError, match=message):
    images.grid(batch, columns)


@pytest.mark.parametrize(("shape", "mode"), [((3, 5), "L"), ((3, 5, 1), "L"), ((3, 5, 3), "RGB")])
def test_write_png_enlarges_by_whole_pixels(tmp_path, shape, mode):
  image = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
  path = tmp_path / "image.png"
  images.write_png(path, image, scale=4)
  with Image.open(path) as written:
    assert written.format == "PNG" and written.mode == mode and written.size == (20, 12)
    pixels = np.asarray(written).reshape(12, 20, -1)
  expected = image.reshape(3, 5, -1)
  for row in range(12):
    for column in range(20):
      np.testing.assert_array_equal(pixels[row, column], expected[row // 4, column // 4])
  assert os.listdir(tmp_path) == ["image.png"]


@pytest.mark.parametrize(
  ("image", "scale", "message"),
  [
    (np.zeros((3, 3), np.float32), 1, "float32"),
    (np.zeros((1, 3, 3, 1), np.uint8), 1, r"\(1, 3, 3, 1\)"),
    (np.zeros((3, 3, 4), np.uint8), 1, "found 4"),
    (np.zeros((3, 3), np.uint8), 0, "scale=0"),
  ],
)
def test_write_png_refuses(tmp_path, image, scale, message):
  with pytest.raises(ValueError, match=message):
    images.write_png(tmp_path / "image.png", image, scale)
  assert os.listdir(tmp_path) == []
