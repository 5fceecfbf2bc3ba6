"""Small data sets of every kind of source, and what reads them."""

from __future__ import annotations

import gzip
import pathlib
import struct

import numpy as np
from PIL import Image

from marche_jax.config import DataConfig, ModelConfig
from marche_jax.training import sources

SIZE = 6
PIXELS = ModelConfig(img_size=SIZE, vae_stride=1, patch_size=2, vae_embed_dim=1, class_num=4)
COLOUR = ModelConfig(img_size=SIZE, vae_stride=1, patch_size=2, vae_embed_dim=3, class_num=4)
LATENT = ModelConfig(img_size=8, vae_stride=4, vae_embed_dim=3, class_num=4)
LABELS = np.array([0, 3, 1, 2, 0])


def idx_bytes(array: np.ndarray, code: int = 8) -> bytes:
  return struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()


def write_idx(directory: pathlib.Path, images: np.ndarray, labels: np.ndarray, split="train"):
  (directory / f"{split}-images-idx3-ubyte").write_bytes(idx_bytes(images))
  (directory / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))


def numbered(num: int) -> np.ndarray:
  """Images whose top row tells their number and that no mirroring leaves as they are."""
  images = np.random.default_rng(num).integers(0, 256, (num, SIZE, SIZE), np.uint8)
  images[:, 0, :] = np.arange(num)[:, None]
  images[:, 1, 0], images[:, 1, -1] = 10, 20
  return images


def save(path: pathlib.Path, pixels: np.ndarray):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path)


def write_pets(directory: pathlib.Path):
  """Four colour images of two classes, among files that are no images."""
  rng = np.random.default_rng(5)
  for name in ("dog/b.png", "cat/z.png", "cat/sub/a.PNG", "dog/a.jpg"):
    save(directory / name, rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8))
  (directory / "dog" / "notes.txt").write_text("not an image")
  (directory / ".cache").mkdir()
  (directory / "list.csv").write_text("not a class")


def break_image(path: pathlib.Path):
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])


def folder(path: pathlib.Path, on_error="raise", model=COLOUR) -> sources.Source:
  return sources.open_source(DataConfig(source="folder", path=str(path), on_error=on_error), model)


def latents(num: int, seed=0, dtype=np.float32) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(num, 6, 2, 2)).astype(dtype)


def open_latents(path: pathlib.Path, flip=True, model=LATENT) -> sources.Source:
  return sources.open_source(DataConfig(source="latents", path=str(path), flip=flip), model)
