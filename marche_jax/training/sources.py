"""Training data at rest: IDX files, image folders and pre-computed latents.

`open_source` checks everything that it can before training starts and gives random access to single
records.
"""

from __future__ import annotations

import abc
import concurrent.futures
import contextlib
import gzip
import os
import pathlib
import secrets
import shutil
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Required, TypedDict

import numpy as np
from absl import logging
from PIL import Image

from marche_jax.config import DataConfig, ModelConfig

FASHION_MNIST = pathlib.Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package dataset-fashion-mnist installs; used where `data.path` is empty."""

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff",
                            ".webp"})  # fmt: skip
_MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels
_CHUNK = 1 << 20  # bytes read at once: a header that promises too much costs no memory


class Record(TypedDict, total=False):
  """A labelled image, or the moments of its latents."""

  image: np.ndarray  # uint8 [height, width, channels]
  moments: np.ndarray  # float32 [2 * channels, height, width]
  label: Required[int]


class Source(abc.ABC):
  """Random access to labelled records, of one of the two kinds.

  A source that is to be read by loader processes can be pickled.
  """

  labels: np.ndarray
  """int64 [num], the class of every record."""

  def __len__(self) -> int:
    return len(self.labels)

  @abc.abstractmethod
  def __getitem__(self, index: int) -> Record:
    """Record `index`, in [0, len)."""

  def mirrored(self, index: int) -> Record:
    """The same record, flipped left to right."""
    record = self[index]
    return {"image": record["image"][:, ::-1], "label": record["label"]}


class IdxSource(Source):
  """Images in the IDX format of MNIST, held in memory."""

  def __init__(self, directory: pathlib.Path, split: str, model: ModelConfig, pad: int = 0) -> None:
    """Args: directory, split: of the files; model: sizes; pad: black pixels added on every side."""
    channels = image_channels(model)
    image_file = _find_idx(directory, f"{split}-images-idx3-ubyte")
    label_file = _find_idx(directory, f"{split}-labels-idx1-ubyte")
    _require(channels == 1, image_file, "1 channel", f"{channels} channels (see config.model)")
    side = model.img_size - 2 * pad
    if side < 1:
      raise ValueError(
        f"data.pad={pad}: expected less than half of model.img_size={model.img_size}"
      )
    images = _read_idx(image_file, (side, side))[..., None]
    self.images = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    labels = _read_idx(label_file, ())
    _require(len(labels) == len(self.images), label_file, f"{len(labels)} labels",
             f"{len(self.images)}, as many as images in {image_file.name}")  # fmt: skip
    self.labels = _check_labels(label_file, labels, model)

  def __getitem__(self, index: int) -> Record:
    return {"image": self.images[index], "label": int(self.labels[index])}


class FolderSource(Source):
  """Images in one subfolder per class, sorted by name (torchvision's ImageFolder).

  Opening decodes every image once, in threads (JPEG at an eighth of the size), so that a broken one
  is found before training and the order of the data does not depend on when it would have been met.
  Hidden folders and files, at any depth, and files of other suffixes are ignored.
  """

  def __init__(self, directory: pathlib.Path, on_error: str, model: ModelConfig) -> None:
    self._size, self._channels = model.img_size, image_channels(model)
    if self._channels not in _MODES:
      raise ValueError(f"model.vae_embed_dim={self._channels}: expected 1 (grey) or 3 (RGB) for "
                       "data.source='folder' in pixel space")  # fmt: skip
    if not directory.is_dir():
      raise FileNotFoundError(f"data.path={str(directory)!r}: expected a directory")
    folders = sorted(p for p in directory.iterdir() if p.is_dir() and p.name[0] != ".")
    _require(len(folders) > 0, directory, "no subfolder", "one subfolder per class")
    _require(len(folders) <= model.class_num, directory, f"{len(folders)} subfolders",
             f"at most model.class_num = {model.class_num} classes")  # fmt: skip
    files: list[tuple[pathlib.Path, int]] = []
    for label, folder in enumerate(folders):
      found = sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in IMAGE_SUFFIXES
        and not any(part[0] == "." for part in p.relative_to(folder).parts)
      )
      _require(len(found) > 0, folder, "no image", f"images ({', '.join(sorted(IMAGE_SUFFIXES))})")
      files += [(p, label) for p in found]
    logging.info("%s: checking %d images of %d classes", directory, len(files), len(folders))
    chunks = [files[start : start + 256] for start in range(0, len(files), 256)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
      errors = [error for chunk in pool.map(self._check, chunks) for error in chunk]
    for error in filter(None, errors):
      if on_error == "raise":
        raise error
      logging.warning("skipped: %s", error)
    kept = [file for file, error in zip(files, errors) if error is None]
    _require(len(kept) > 0, directory, f"{len(files)} broken images", "a readable image")
    self.paths = [path for path, _ in kept]
    self.labels = np.array([label for _, label in kept], np.int64)

  def _check(self, files: list[tuple[pathlib.Path, int]]) -> list[ValueError | None]:
    errors: list[ValueError | None] = []
    for path, _ in files:
      try:
        _decode(path, self._channels, draft=True)
        errors.append(None)
      except ValueError as error:
        errors.append(error)
    return errors

  def __getitem__(self, index: int) -> Record:
    image = center_crop(_decode(self.paths[index], self._channels), self._size)
    pixels = np.asarray(image).reshape(self._size, self._size, self._channels)
    return {"image": pixels, "label": int(self.labels[index])}


class LatentSource(Source):
  """Moments of the autoencoder's posterior, computed beforehand; mapped, never loaded whole.

  A directory with `moments.npy`, float32 or float16 [num, 2 * channels, height, width] (the mean,
  then the log-variance, not scaled by `latent_scale`); `labels.npy`, integers [num]; and, for
  `flip`, `moments_flip.npy`, the moments of the mirrored images (mirroring a latent is not the
  latent of the mirrored image).
  """

  def __init__(self, directory: pathlib.Path, flip: bool, model: ModelConfig) -> None:
    self._arguments = (directory, flip, model)
    if model.vae_stride == 1:
      raise ValueError("data.source='latents': expected idx or folder in pixel space "
                       "(model.vae_stride=1)")  # fmt: skip
    channels, height, width = model.latent_shape
    shape = (2 * channels, height, width)
    self.moments = _map_moments(directory / "moments.npy", shape)
    label_file, flip_file = directory / "labels.npy", directory / "moments_flip.npy"
    labels = _map_array(label_file)
    one_each = labels.dtype.kind in "iu" and labels.shape == self.moments.shape[:1]
    _require(one_each, label_file, f"{labels.dtype} {list(labels.shape)}",
             f"integers [{len(self.moments)}]")  # fmt: skip
    self.labels = _check_labels(label_file, labels, model)
    self._flipped = None
    if flip and not flip_file.exists():
      raise ValueError(f"data.flip=True: expected {flip_file}, the moments of the mirrored images; "
                       "write it, or set data.flip=False")  # fmt: skip
    if flip:
      self._flipped = _map_moments(flip_file, shape)
      _require(len(self._flipped) == len(self.labels), flip_file, f"{len(self._flipped)} records",
               f"{len(self.labels)}, as in moments.npy")  # fmt: skip

  def __reduce__(self) -> tuple[type[LatentSource], tuple[pathlib.Path, bool, ModelConfig]]:
    return LatentSource, self._arguments  # a pickled memory map would be the whole file

  def _record(self, moments: np.ndarray, index: int) -> Record:
    return {"moments": moments[index].astype(np.float32), "label": int(self.labels[index])}

  def __getitem__(self, index: int) -> Record:
    return self._record(self.moments, index)

  def mirrored(self, index: int) -> Record:
    """The moments of the mirrored image."""
    if self._flipped is None:
      raise ValueError("flip=True: this source was opened with data.flip=False")
    return self._record(self._flipped, index)


def open_source(config: DataConfig, model: ModelConfig) -> Source:
  """Opens and validates training data.

  Raises:
    FileNotFoundError: for a missing directory or file; names it.
    ValueError: for data that is damaged or does not fit the model; names the file, what was found
      and what was expected.
  """
  if model.vae_stride > 1 and config.source != "latents":
    raise ValueError(f"data.source={config.source!r}: expected latents for a model with an "
                     f"autoencoder (model.vae_stride={model.vae_stride}); make them with "
                     "tools/encode_latents.py")  # fmt: skip
  path = pathlib.Path(config.path)
  if config.source == "idx":
    if not config.path:
      path = FASHION_MNIST
      if not path.is_dir():
        raise FileNotFoundError(f"data.path is empty and there is no {path}: install Fashion-MNIST "
                                "(apt-get install dataset-fashion-mnist), or name a directory of "
                                "IDX files (--config.data.path=DIR)")  # fmt: skip
    return IdxSource(path, config.split, model, config.pad)
  if not config.path:
    raise ValueError(f"data.path='': expected a directory, for data.source={config.source!r}")
  if config.source == "folder":
    return FolderSource(path, config.on_error, model)
  return LatentSource(path, config.flip, model)


def write_latents(
  directory: str | os.PathLike[str],
  moments: np.ndarray,
  labels: np.ndarray,
  moments_flip: np.ndarray | None = None,
) -> None:
  """Writes what `LatentSource` reads, as a whole: aside, then renamed.

  Args:
    directory: does not exist yet, or is empty.
    moments: float32 or float16 [num, 2 * channels, height, width]; may be a memory map.
    labels: non-negative integers [num].
    moments_flip: of the mirrored images, like `moments`.

  Raises:
    ValueError: for other shapes, dtypes or non-finite moments.
    OSError: where the directory cannot be written, or has something in it already.
  """
  labels = np.asarray(labels)
  arrays = {"moments": np.asarray(moments)}
  if moments_flip is not None:
    arrays["moments_flip"] = np.asarray(moments_flip)
  if labels.shape != moments.shape[:1] or labels.dtype.kind not in "iu" or (labels < 0).any():
    raise ValueError(f"labels: expected non-negative integers [{len(moments)}], found "
                     f"{labels.dtype} {list(labels.shape)}")  # fmt: skip
  for name, array in arrays.items():
    halves = array.ndim == 4 and array.shape[1] % 2 == 0 and array.size > 0
    if array.dtype not in (np.float32, np.float16) or not halves or array.shape != moments.shape:
      raise ValueError(f"{name}: expected float32 or float16 [num, 2 * channels, height, width], "
                       f"found {array.dtype} {list(array.shape)}")  # fmt: skip
    for start in range(0, len(array), 1024):
      if not np.isfinite(array[start : start + 1024]).all():
        raise ValueError(f"{name}: expected finite values, found NaN or infinity from {start} on")
  with new_directory(directory) as aside:
    for name, array in {**arrays, "labels": labels.astype(np.int64)}.items():
      np.save(aside / f"{name}.npy", array, allow_pickle=False)


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Gives a directory to fill, which becomes `directory` only where the block succeeds.

  Raises:
    OSError: at once where `directory` cannot be written, or has something in it already.
  """
  target = pathlib.Path(directory)
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise FileExistsError(f"{target}: expected a new or an empty directory")
  aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
  aside.mkdir(parents=True)
  try:
    yield aside
    aside.rename(target)  # takes the place of an empty directory, and of nothing else
  finally:
    shutil.rmtree(aside, ignore_errors=True)


def image_channels(model: ModelConfig) -> int:
  """Channels of the images that a model is trained on: 3 for an autoencoder, else of the pixels."""
  return model.vae_embed_dim if model.vae_stride == 1 else 3


def center_crop(image: Image.Image, size: int) -> Image.Image:
  """The central size x size pixels at the smallest scale that fills them (ADM, `image_datasets`).

  Halved by averaging while the shorter side is at least twice the size, then bicubic, then cut.
  """
  while min(image.size) >= 2 * size:
    image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
  scale = size / min(image.size)
  shape = (round(image.width * scale), round(image.height * scale))
  image = image.resize(shape, Image.Resampling.BICUBIC)
  left, top = (image.width - size) // 2, (image.height - size) // 2
  return image.crop((left, top, left + size, top + size))


def _require(condition: bool, path: pathlib.Path, found: str, expected: str) -> None:
  if not condition:
    raise ValueError(f"{path}: found {found}, expected {expected}")


def _check_labels(path: pathlib.Path, labels: np.ndarray, model: ModelConfig) -> np.ndarray:
  low, high = int(labels.min()), int(labels.max())
  _require(0 <= low and high < model.class_num, path, f"labels {low} to {high}",
           f"0 to {model.class_num - 1} (model.class_num = {model.class_num})")  # fmt: skip
  return labels.astype(np.int64)


def _find_idx(directory: pathlib.Path, name: str) -> pathlib.Path:
  for path in (directory / name, directory / f"{name}.gz"):
    if path.is_file():
      return path
  raise FileNotFoundError(f"data.path={str(directory)!r}: found neither {name} nor {name}.gz")


def _read_idx(path: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray:
  """uint8 [num, *shape] of an IDX file, checked in every byte of its header and in its length."""
  with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
    try:
      ndim = 1 + len(shape)
      header = _read(file, 4 + 4 * ndim)
      _require(header[:2] == b"\0\0", path, f"magic bytes {header[:4].hex(' ')}",
               f"00 00 08 {ndim:02x}")  # fmt: skip
      _require(header[2:3] == b"\x08", path, f"data type code 0x{header[2:3].hex()}",
               "0x08 (unsigned bytes)")  # fmt: skip
      _require(header[3:4] == bytes([ndim]), path, f"{int.from_bytes(header[3:4])} dimensions",
               f"{ndim}")  # fmt: skip
      _require(len(header) == 4 + 4 * ndim, path, f"{len(header)} bytes of header",
               f"{4 + 4 * ndim}")  # fmt: skip
      found = tuple(int(n) for n in np.frombuffer(header, ">u4", offset=4))
      _require(found[1:] == shape, path, f"images of {list(found[1:])} pixels",
               f"{list(shape)} (model.img_size)")  # fmt: skip
      _require(found[0] > 0, path, "0 records in the header", "at least 1")
      expected = found[0] * int(np.prod(shape))
      data = _read(file, expected + 1)  # reading on to the end also checks gzip's checksum
    except (OSError, EOFError, zlib.error) as error:
      raise ValueError(f"{path}: found a damaged file ({error}), expected a whole one") from error
  _require(len(data) == expected, path,
           f"{len(data)} bytes of data" if len(data) < expected else "more data after the end",
           f"{expected} bytes, for {list(found)} of the header")  # fmt: skip
  return np.frombuffer(data, np.uint8).reshape(found)


def _read(file: BinaryIO | gzip.GzipFile, size: int) -> bytes:
  data = bytearray()
  while len(data) < size and (chunk := file.read(min(_CHUNK, size - len(data)))):
    data += chunk
  return bytes(data)


def _decode(path: pathlib.Path, channels: int, draft: bool = False) -> Image.Image:
  """A decoded image of 1 (grey) or 3 (RGB) channels; `draft` decodes a JPEG at low resolution."""
  try:
    with Image.open(path) as image:
      if image.mode[0] in "IF":  # Pillow would cut them to 8 bits, not scale them
        raise ValueError(f"found pixels of mode {image.mode}, expected 8 bits a channel")
      if draft:
        image.draft(None, (1, 1))
      return image.convert(_MODES[channels])
  except Exception as error:  # Pillow's decoders raise many kinds
    raise ValueError(f"{path}: broken image: {error}") from error


def _map_array(path: pathlib.Path) -> np.ndarray:
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file; expected moments.npy and labels.npy there")
  try:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
  except (ValueError, EOFError, OSError) as error:
    raise ValueError(f"{path}: found a damaged file ({error}), expected a .npy array") from error
  _require(isinstance(array, np.memmap), path, type(array).__name__, "a .npy array")
  size = array.offset + array.nbytes
  _require(path.stat().st_size == size, path, f"{path.stat().st_size} bytes", f"{size}")
  return array


def _map_moments(path: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray:
  array = _map_array(path)
  fits = array.dtype in (np.float32, np.float16) and array.shape[1:] == shape and len(array) > 0
  _require(fits, path, f"{array.dtype} {list(array.shape)}",
           f"float32 or float16 [num, {', '.join(map(str, shape))}] (config.model)")  # fmt: skip
  return array
