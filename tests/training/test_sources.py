"""Sources of training data, and each failure named."""

from __future__ import annotations

import dataclasses
import gzip
import logging
import os
import pathlib
import pickle

import numpy as np
import pytest
from PIL import Image
from records import (
  COLOUR,
  LABELS,
  LATENT,
  PIXELS,
  SIZE,
  break_image,
  folder,
  idx_bytes,
  latents,
  numbered,
  open_latents,
  save,
  write_idx,
  write_pets,
)

from marche_jax.config import DataConfig, ModelConfig
from marche_jax.training import sources


@pytest.fixture
def pets(tmp_path) -> pathlib.Path:
  write_pets(tmp_path)
  return tmp_path


# Sources: IDX files.


@pytest.mark.parametrize("split", ["train", "t10k"])
def test_idx_gives_pixels_and_labels(tmp_path, split):
  images, labels = numbered(7), np.uint8([0, 1, 2, 3, 0, 1, 2])
  write_idx(tmp_path, images, labels, split)
  source = sources.open_source(DataConfig(path=str(tmp_path), split=split), PIXELS)
  assert len(source) == 7 and source.labels.tolist() == labels.tolist()
  for n in range(7):
    assert source[n]["image"].dtype == np.uint8 and source[n]["label"] == labels[n]
    np.testing.assert_array_equal(source[n]["image"], images[n, :, :, None])
    np.testing.assert_array_equal(source.mirrored(n)["image"], images[n, :, ::-1, None])


def test_idx_is_padded_with_black_to_the_size_of_the_model(tmp_path):
  images = numbered(3)
  write_idx(tmp_path, images, np.uint8([0, 1, 2]))
  model = dataclasses.replace(PIXELS, img_size=SIZE + 4)
  source = sources.open_source(DataConfig(path=str(tmp_path), pad=2), model)
  for n in range(3):
    image = source[n]["image"][..., 0]
    np.testing.assert_array_equal(image[2:-2, 2:-2], images[n])
    assert image.shape == (SIZE + 4, SIZE + 4) and image.sum() == images[n].sum()
  with pytest.raises(ValueError, match=r"\[6, 6\] pixels, expected \[8, 8\]"):
    sources.open_source(DataConfig(path=str(tmp_path), pad=1), model)
  with pytest.raises(ValueError, match=r"data\.pad=5: expected less than half"):
    sources.open_source(DataConfig(path=str(tmp_path), pad=5), model)
  with pytest.raises(ValueError, match=r"data\.pad=1: expected 0 with data\.source='folder'"):
    DataConfig(source="folder", pad=1)


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("images", b"", "magic bytes"),
    ("images", b"\x89PNG" + bytes(40), "magic bytes 89 50 4e 47, expected 00 00 08 03"),
    ("images", idx_bytes(numbered(4), 9), "data type code 0x09, expected 0x08"),
    ("images", idx_bytes(np.zeros(4, np.uint8)), "1 dimensions, expected 3"),
    ("images", idx_bytes(numbered(4))[:10], "10 bytes of header, expected 16"),
    (
      "images",
      idx_bytes(numbered(4).repeat(2, 2)),
      r"images of \[6, 12\] pixels, expected \[6, 6\]",
    ),
    ("images", idx_bytes(numbered(0)), "0 records"),
    ("images", idx_bytes(numbered(4))[:-1], "143 bytes of data, expected 144"),
    ("images", idx_bytes(numbered(4)) + b"\0", "more data after the end, expected 144"),
    ("images", b"\0\0\x08\x03" + b"\xff" * 4 + idx_bytes(numbered(4))[8:], "144 bytes of data"),
    ("labels", idx_bytes(np.zeros((4, 1), np.uint8)), "2 dimensions, expected 1"),
    ("labels", idx_bytes(np.uint8([0, 1, 2])), "3 labels, expected 4, as many as images"),
    ("labels", idx_bytes(np.uint8([0, 1, 4, 2])), "labels 0 to 4, expected 0 to 3"),
  ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_names_what_is_wrong(tmp_path, name, content, message, suffix):
  files = {"images": numbered(4), "labels": np.uint8([0, 1, 2, 3])}
  for kind, ndim in (("images", 3), ("labels", 1)):
    written = content if kind == name else idx_bytes(files[kind])
    path = tmp_path / f"train-{kind}-idx{ndim}-ubyte{suffix}"
    path.write_bytes(gzip.compress(written) if suffix else written)
  with pytest.raises(ValueError, match=rf"train-{name}-idx.-ubyte{suffix}: found {message}"):
    sources.open_source(DataConfig(path=str(tmp_path)), PIXELS)


@pytest.mark.parametrize("damage", ["truncated", "data", "checksum", "plain"])
def test_idx_names_damaged_gzip(tmp_path, damage):
  write_idx(tmp_path, numbered(4), np.uint8([0, 1, 2, 3]))
  path = tmp_path / "train-labels-idx1-ubyte.gz"
  content = bytearray(path.read_bytes())
  if damage == "truncated":
    content = content[:-6]
  elif damage == "data":
    content[12] ^= 0xFF
  elif damage == "checksum":
    content[-8] ^= 1
  else:
    content = bytearray(idx_bytes(np.uint8([0, 1, 2, 3])))
  path.write_bytes(content)
  with pytest.raises(ValueError, match=r"labels-idx1-ubyte.gz: found a damaged file"):
    sources.open_source(DataConfig(path=str(tmp_path)), PIXELS)


def test_idx_names_missing_files(tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
    sources.open_source(DataConfig(path=str(tmp_path)), PIXELS)
  monkeypatch.setattr(sources, "FASHION_MNIST", tmp_path / "none")
  with pytest.raises(FileNotFoundError, match=r"apt-get install.*--config.data.path"):
    sources.open_source(DataConfig(), PIXELS)


def test_idx_is_grey(tmp_path):
  write_idx(tmp_path, numbered(4), np.uint8([0, 1, 2, 3]))
  with pytest.raises(ValueError, match="found 1 channel, expected 3"):
    sources.open_source(DataConfig(path=str(tmp_path)), COLOUR)


@pytest.mark.skipif(not sources.FASHION_MNIST.is_dir(), reason="needs dataset-fashion-mnist")
def test_fashion_mnist():
  model = ModelConfig(img_size=28, vae_stride=1, patch_size=4, vae_embed_dim=1, class_num=10)
  source = sources.open_source(DataConfig(split="t10k"), model)
  assert np.bincount(source.labels).tolist() == [1000] * 10
  assert source[0]["image"].shape == (28, 28, 1) and source[0]["label"] == 9


# Sources: folders.


def test_folder_sorts_classes_and_files(pets):
  source = folder(pets)
  assert source.labels.tolist() == [0, 0, 1, 1]
  names = ["cat/sub/a.PNG", "cat/z.png", "dog/a.jpg", "dog/b.png"]
  for n, name in enumerate(names):
    assert source[n]["label"] == source.labels[n]
    with Image.open(pets / name) as image:
      np.testing.assert_array_equal(source[n]["image"], np.asarray(image))


def test_folder_converts_to_the_channels_of_the_model(pets):
  assert folder(pets, model=PIXELS)[0]["image"].shape == (SIZE, SIZE, 1)
  save(pets / "cat" / "grey.png", np.full((SIZE, SIZE), 77, np.uint8))
  source = folder(pets)
  np.testing.assert_array_equal(source[0]["image"], np.full((SIZE, SIZE, 3), 77, np.uint8))
  with pytest.raises(ValueError, match="vae_embed_dim=4"):
    folder(pets, model=ModelConfig(img_size=SIZE, vae_stride=1, patch_size=2, vae_embed_dim=4))


def test_folder_ignores_what_is_hidden_at_any_depth(pets):
  expected = folder(pets).paths
  for name in (
    "cat/.ipynb_checkpoints/z.png",
    "dog/._b.png",
    "cat/sub/.thumbs/x/a.jpg",
    ".d/a.png",
  ):
    (pets / name).parent.mkdir(parents=True, exist_ok=True)
    (pets / name).write_bytes(b"not an image")
  assert folder(pets).paths == expected
  hidden = pets.rename(pets.with_name(".pets"))  # above the classes a dot says nothing
  assert len(folder(hidden)) == len(expected)


@pytest.mark.parametrize("name", ["dog/a.jpg", "cat/z.png"])
def test_folder_refuses_a_broken_image_by_name(pets, name):
  break_image(pets / name)
  with pytest.raises(ValueError, match=f"{name}: broken image"):
    folder(pets)


def test_folder_skips_broken_images_with_a_warning(pets, caplog):
  break_image(pets / "cat/z.png")
  (pets / "dog/a.jpg").write_bytes(b"")
  with caplog.at_level(logging.WARNING, logger="absl"):
    source = folder(pets, "skip")
  assert source.labels.tolist() == [0, 1]
  warnings = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
  assert len(warnings) == 2 and "cat/z.png" in warnings[0] and "dog/a.jpg" in warnings[1]
  for name in ("cat/sub/a.PNG", "dog/b.png"):
    break_image(pets / name)
  with pytest.raises(ValueError, match="4 broken images, expected a readable image"):
    folder(pets, "skip")


def test_folder_refuses_16_bit_images(pets):
  save(pets / "cat/deep.png", np.full((SIZE, SIZE), 40000, np.uint16))
  with pytest.raises(ValueError, match=r"cat/deep.png.*expected 8 bits"):
    folder(pets)


def test_folder_refuses_what_is_no_set_of_classes(tmp_path, pets):
  with pytest.raises(FileNotFoundError, match="absent"):
    folder(tmp_path / "absent")
  with pytest.raises(ValueError, match=r"data.path=''"):
    sources.open_source(DataConfig(source="folder"), COLOUR)
  with pytest.raises(ValueError, match="no subfolder, expected one subfolder per class"):
    folder(pets / "dog")
  model = ModelConfig(img_size=SIZE, vae_stride=1, patch_size=2, vae_embed_dim=3, class_num=1)
  with pytest.raises(ValueError, match=r"2 subfolders, expected at most model.class_num = 1"):
    folder(pets, model=model)
  (pets / "emu").mkdir()
  with pytest.raises(ValueError, match="emu: found no image"):
    folder(pets)


def test_center_crop_averages_then_cuts_the_middle():
  coarse = np.random.default_rng(0).integers(9, 240, (4, 4)).astype(np.uint8)
  # Every pixel becomes four that average to it, and each of these again: halving twice is exact.
  fine = coarse.astype(int)
  for offsets in ([[-3, 3], [1, -1]], [[2, 4], [-1, -5]]):
    fine = fine.repeat(2, 0).repeat(2, 1) + np.tile(offsets, fine.shape)
  found = sources.center_crop(Image.fromarray(fine.astype(np.uint8)), 4)
  np.testing.assert_array_equal(np.asarray(found), coarse)
  wide = np.random.default_rng(1).integers(0, 256, (6, 11), np.uint8)
  for turn in (False, True):  # (11 - 6) // 2 = 2 to the left or above
    found = sources.center_crop(Image.fromarray(wide.T if turn else wide), 6)
    expected = wide[:, 2:8].T if turn else wide[:, 2:8]
    np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.parametrize("shape", [(3, 200), (7, 7), (13, 12), (100, 31), (1, 1)])
def test_center_crop_fills_the_size(shape):
  image = Image.fromarray(np.full(shape, 9, np.uint8))
  found = np.asarray(sources.center_crop(image, 6))
  np.testing.assert_array_equal(found, np.full((6, 6), 9, np.uint8))


# Sources: latents.


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_latents_round_trip(tmp_path, dtype):
  path = tmp_path / "new" / "latents"
  moments, other = latents(5, 0, dtype), latents(5, 1, dtype)
  sources.write_latents(path, moments, LABELS.astype(np.int32), other)
  assert sorted(os.listdir(path)) == ["labels.npy", "moments.npy", "moments_flip.npy"]
  assert os.listdir(path.parent) == ["latents"]
  source = open_latents(path)
  for copy in (source, pickle.loads(pickle.dumps(source))):
    assert len(copy) == 5
    for n in range(5):
      for record, expected in ((copy[n], moments[n]), (copy.mirrored(n), other[n])):
        assert record["label"] == LABELS[n] and record["moments"].dtype == np.float32
        np.testing.assert_array_equal(record["moments"], expected.astype(np.float32))


def test_latents_are_mapped_not_loaded(tmp_path):
  sources.write_latents(tmp_path / "x", latents(4000), np.zeros(4000, int))
  source = open_latents(tmp_path / "x", flip=False)
  assert isinstance(source.moments, np.memmap)
  assert len(pickle.dumps(source)) < 5000  # not the 384 kB of the file


def test_latents_need_the_mirrored_ones_to_flip(tmp_path):
  sources.write_latents(tmp_path / "x", latents(5), LABELS)
  with pytest.raises(ValueError, match=r"data.flip=True: expected .*moments_flip.npy"):
    open_latents(tmp_path / "x")
  source = open_latents(tmp_path / "x", flip=False)
  with pytest.raises(ValueError, match="flip=True"):
    source.mirrored(0)


@pytest.mark.parametrize(
  ("name", "array", "message"),
  [
    ("moments", latents(5).astype(np.float64), "float64"),
    ("moments", latents(5)[:, :3], r"float32 \[5, 3, 2, 2\], expected .*\[num, 6, 2, 2\]"),
    ("moments", latents(0), r"\[0, 6, 2, 2\]"),
    ("moments_flip", latents(4), "4 records, expected 5"),
    ("labels", LABELS.astype(np.float32), r"float32 \[5\], expected integers \[5\]"),
    ("labels", LABELS[:4], r"int64 \[4\], expected integers \[5\]"),
    ("labels", LABELS - 1, "labels -1 to 2, expected 0 to 3"),
    ("labels", LABELS + 1, "labels 1 to 4, expected 0 to 3"),
  ],
)
def test_latents_name_what_is_wrong(tmp_path, name, array, message):
  sources.write_latents(tmp_path / "x", latents(5), LABELS, latents(5, 1))
  np.save(tmp_path / "x" / f"{name}.npy", array)
  with pytest.raises(ValueError, match=rf"x/{name}.npy: found .*{message}"):
    open_latents(tmp_path / "x")


@pytest.mark.parametrize("name", ["moments", "moments_flip", "labels"])
@pytest.mark.parametrize("damage", ["truncated", "longer", "empty", "text", "pickle"])
def test_latents_name_damaged_files(tmp_path, name, damage):
  sources.write_latents(tmp_path / "x", latents(5), LABELS, latents(5, 1))
  path = tmp_path / "x" / f"{name}.npy"
  whole = path.read_bytes()
  if damage == "pickle":
    np.save(path, np.array([{}] * 5, object), allow_pickle=True)
  else:
    contents = {"truncated": whole[:-1], "longer": whole + b"\0", "empty": b"", "text": b"x" * 99}
    path.write_bytes(contents[damage])
  with pytest.raises(ValueError, match=f"x/{name}.npy: found"):
    open_latents(tmp_path / "x")


@pytest.mark.parametrize("source", ["idx", "folder"])
def test_an_autoencoder_needs_latents(tmp_path, source):
  message = rf"data.source='{source}': expected latents .*vae_stride=4.*tools/encode_latents.py"
  with pytest.raises(ValueError, match=message):  # before any look at the data
    sources.open_source(DataConfig(source=source, path=str(tmp_path / "absent")), LATENT)


def test_latents_need_files_and_an_autoencoder(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"moments.npy"):
    open_latents(tmp_path)
  with pytest.raises(ValueError, match="vae_stride=1"):
    open_latents(tmp_path, model=PIXELS)


@pytest.mark.parametrize(
  ("moments", "labels", "flip", "message"),
  [
    (latents(5).astype(np.float64), LABELS, None, "moments: .*float64"),
    (latents(5)[:, :5], LABELS, None, r"moments: .*\[5, 5, 2, 2\]"),
    (latents(0), LABELS[:0], None, r"moments: .*\[0, 6, 2, 2\]"),
    (np.where(latents(5) > 1.5, np.float32(np.nan), latents(5)), LABELS, None, "moments: .*NaN"),
    (latents(5), LABELS[:4], None, r"labels: expected .*\[5\], found int64 \[4\]"),
    (latents(5), LABELS - 1, None, "labels: expected non-negative"),
    (latents(5), LABELS, latents(4), r"moments_flip: .*\[4, 6, 2, 2\]"),
  ],
)
def test_write_latents_refuses(tmp_path, moments, labels, flip, message):
  with pytest.raises(ValueError, match=message):
    sources.write_latents(tmp_path / "x", moments, labels, flip)
  assert os.listdir(tmp_path) == []


def test_write_latents_keeps_what_is_there(tmp_path):
  (tmp_path / "empty").mkdir()
  sources.write_latents(tmp_path / "empty", latents(5), LABELS)
  before = (tmp_path / "empty" / "moments.npy").read_bytes()
  with pytest.raises(FileExistsError, match="empty"):
    sources.write_latents(tmp_path / "empty", latents(5, 9), LABELS)
  assert (tmp_path / "empty" / "moments.npy").read_bytes() == before
  assert os.listdir(tmp_path) == ["empty"]


def test_write_latents_leaves_nothing_where_it_fails(tmp_path, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(sources.np, "save", full)
  with pytest.raises(OSError, match="No space"):
    sources.write_latents(tmp_path / "x", latents(5), LABELS)
  assert os.listdir(tmp_path) == []
