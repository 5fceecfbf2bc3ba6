"""Sources of training data, each failure named, and the order of the batches."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import os
import pathlib
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from marche_jax import data
from marche_jax.config import DataConfig, ModelConfig

SIZE = 6
PIXELS = ModelConfig(img_size=SIZE, vae_stride=1, patch_size=2, vae_embed_dim=1, class_num=4)
COLOUR = ModelConfig(img_size=SIZE, vae_stride=1, patch_size=2, vae_embed_dim=3, class_num=4)
LATENT = ModelConfig(img_size=8, vae_stride=4, vae_embed_dim=3, class_num=4)


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


@pytest.fixture
def digits(tmp_path) -> data.Source:
  write_idx(tmp_path, numbered(23), np.arange(23, dtype=np.uint8) % 4)
  return data.open_source(DataConfig(path=str(tmp_path)), PIXELS)


def make(source: data.Source, seed=3, batch_size=5, flip=True, num_workers=0, model=PIXELS):
  return data.make_iterator(source, batch_size, seed, flip, num_workers, model)


def take(iterator, num: int) -> list[dict[str, np.ndarray]]:
  return list(itertools.islice(iterator, num))


def assert_equal(found, expected):
  assert len(found) == len(expected)
  for a, b in zip(found, expected):
    assert a.keys() == b.keys()
    for key in a:
      assert a[key].dtype == b[key].dtype
      np.testing.assert_array_equal(a[key], b[key])


def numbers(batches) -> list[int]:
  first = np.concatenate([batch["images"][:, 0, 0, 0] for batch in batches])
  return np.round((first + 1.0) * 127.5).astype(int).tolist()


def mirrored(batches) -> np.ndarray:
  left = np.concatenate([batch["images"][:, 0, 1, 0] for batch in batches])
  return np.round((left + 1.0) * 127.5) == 20


# Sources: IDX files.


@pytest.mark.parametrize("split", ["train", "t10k"])
def test_idx_gives_pixels_and_labels(tmp_path, split):
  images, labels = numbered(7), np.uint8([0, 1, 2, 3, 0, 1, 2])
  write_idx(tmp_path, images, labels, split)
  source = data.open_source(DataConfig(path=str(tmp_path), split=split), PIXELS)
  assert len(source) == 7 and source.labels.tolist() == labels.tolist()
  for n in range(7):
    assert source[n]["image"].dtype == np.uint8 and source[n]["label"] == labels[n]
    np.testing.assert_array_equal(source[n]["image"], images[n, :, :, None])
    np.testing.assert_array_equal(source.mirrored(n)["image"], images[n, :, ::-1, None])


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
    data.open_source(DataConfig(path=str(tmp_path)), PIXELS)


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
    data.open_source(DataConfig(path=str(tmp_path)), PIXELS)


def test_idx_names_missing_files(tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
    data.open_source(DataConfig(path=str(tmp_path)), PIXELS)
  monkeypatch.setattr(data, "FASHION_MNIST", tmp_path / "none")
  with pytest.raises(FileNotFoundError, match=r"apt-get install.*--config.data.path"):
    data.open_source(DataConfig(), PIXELS)


def test_idx_is_grey(tmp_path):
  write_idx(tmp_path, numbered(4), np.uint8([0, 1, 2, 3]))
  for model in (COLOUR, LATENT):
    with pytest.raises(ValueError, match="found 1 channel, expected 3"):
      data.open_source(DataConfig(path=str(tmp_path)), model)


@pytest.mark.skipif(not data.FASHION_MNIST.is_dir(), reason="needs dataset-fashion-mnist")
def test_fashion_mnist():
  model = ModelConfig(img_size=28, vae_stride=1, patch_size=4, vae_embed_dim=1, class_num=10)
  source = data.open_source(DataConfig(split="t10k"), model)
  assert np.bincount(source.labels).tolist() == [1000] * 10
  assert source[0]["image"].shape == (28, 28, 1) and source[0]["label"] == 9


# Sources: folders.


def save(path: pathlib.Path, pixels: np.ndarray):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path)


@pytest.fixture
def pets(tmp_path) -> pathlib.Path:
  rng = np.random.default_rng(5)
  for name in ("dog/b.png", "cat/z.png", "cat/sub/a.PNG", "dog/a.jpg"):
    save(tmp_path / name, rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8))
  (tmp_path / "dog" / "notes.txt").write_text("not an image")
  (tmp_path / ".cache").mkdir()
  (tmp_path / "list.csv").write_text("not a class")
  return tmp_path


def folder(path: pathlib.Path, on_error="raise", model=COLOUR) -> data.Source:
  return data.open_source(DataConfig(source="folder", path=str(path), on_error=on_error), model)


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


def break_image(path: pathlib.Path):
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])


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


def test_folder_names_an_image_that_breaks_later(pets):
  iterator = make(folder(pets), batch_size=4, flip=False, model=COLOUR)
  break_image(pets / "dog/b.png")
  with pytest.raises(ValueError, match=r"dog/b.png: broken image"):
    next(iterator)


def test_folder_refuses_16_bit_images(pets):
  save(pets / "cat/deep.png", np.full((SIZE, SIZE), 40000, np.uint16))
  with pytest.raises(ValueError, match=r"cat/deep.png.*expected 8 bits"):
    folder(pets)


def test_folder_refuses_what_is_no_set_of_classes(tmp_path, pets):
  with pytest.raises(FileNotFoundError, match="absent"):
    folder(tmp_path / "absent")
  with pytest.raises(ValueError, match=r"data.path=''"):
    data.open_source(DataConfig(source="folder"), COLOUR)
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
  found = data.center_crop(Image.fromarray(fine.astype(np.uint8)), 4)
  np.testing.assert_array_equal(np.asarray(found), coarse)
  wide = np.random.default_rng(1).integers(0, 256, (6, 11), np.uint8)
  for turn in (False, True):  # (11 - 6) // 2 = 2 to the left or above
    found = data.center_crop(Image.fromarray(wide.T if turn else wide), 6)
    expected = wide[:, 2:8].T if turn else wide[:, 2:8]
    np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.parametrize("shape", [(3, 200), (7, 7), (13, 12), (100, 31), (1, 1)])
def test_center_crop_fills_the_size(shape):
  image = Image.fromarray(np.full(shape, 9, np.uint8))
  found = np.asarray(data.center_crop(image, 6))
  np.testing.assert_array_equal(found, np.full((6, 6), 9, np.uint8))


# Sources: latents.


def latents(num: int, seed=0, dtype=np.float32) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(num, 6, 2, 2)).astype(dtype)


def open_latents(path: pathlib.Path, flip=True, model=LATENT) -> data.Source:
  return data.open_source(DataConfig(source="latents", path=str(path), flip=flip), model)


LABELS = np.array([0, 3, 1, 2, 0])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_latents_round_trip(tmp_path, dtype):
  path = tmp_path / "new" / "latents"
  moments, other = latents(5, 0, dtype), latents(5, 1, dtype)
  data.write_latents(path, moments, LABELS.astype(np.int32), other)
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
  data.write_latents(tmp_path / "x", latents(4000), np.zeros(4000, int))
  source = open_latents(tmp_path / "x", flip=False)
  assert isinstance(source._moments, np.memmap)
  assert len(pickle.dumps(source)) < 5000  # not the 384 kB of the file


def test_latents_need_the_mirrored_ones_to_flip(tmp_path):
  data.write_latents(tmp_path / "x", latents(5), LABELS)
  with pytest.raises(ValueError, match=r"data.flip=True: expected .*moments_flip.npy"):
    open_latents(tmp_path / "x")
  source = open_latents(tmp_path / "x", flip=False)
  with pytest.raises(ValueError, match="flip=True"):
    make(source, model=LATENT)


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
  data.write_latents(tmp_path / "x", latents(5), LABELS, latents(5, 1))
  np.save(tmp_path / "x" / f"{name}.npy", array)
  with pytest.raises(ValueError, match=rf"x/{name}.npy: found .*{message}"):
    open_latents(tmp_path / "x")


@pytest.mark.parametrize("name", ["moments", "moments_flip", "labels"])
@pytest.mark.parametrize("damage", ["truncated", "longer", "empty", "text", "pickle"])
def test_latents_name_damaged_files(tmp_path, name, damage):
  data.write_latents(tmp_path / "x", latents(5), LABELS, latents(5, 1))
  path = tmp_path / "x" / f"{name}.npy"
  whole = path.read_bytes()
  if damage == "pickle":
    np.save(path, np.array([{}] * 5, object), allow_pickle=True)
  else:
    contents = {"truncated": whole[:-1], "longer": whole + b"\0", "empty": b"", "text": b"x" * 99}
    path.write_bytes(contents[damage])
  with pytest.raises(ValueError, match=f"x/{name}.npy: found"):
    open_latents(tmp_path / "x")


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
    data.write_latents(tmp_path / "x", moments, labels, flip)
  assert os.listdir(tmp_path) == []


def test_write_latents_keeps_what_is_there(tmp_path):
  (tmp_path / "empty").mkdir()
  data.write_latents(tmp_path / "empty", latents(5), LABELS)
  before = (tmp_path / "empty" / "moments.npy").read_bytes()
  with pytest.raises(FileExistsError, match="empty"):
    data.write_latents(tmp_path / "empty", latents(5, 9), LABELS)
  assert (tmp_path / "empty" / "moments.npy").read_bytes() == before
  assert os.listdir(tmp_path) == ["empty"]


def test_write_latents_leaves_nothing_where_it_fails(tmp_path, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(data.np, "save", full)
  with pytest.raises(OSError, match="No space"):
    data.write_latents(tmp_path / "x", latents(5), LABELS)
  assert os.listdir(tmp_path) == []


# Batches.


def test_batches_are_scaled_and_carry_their_labels(digits):
  batch = next(make(digits))
  assert batch.keys() == {"images", "labels"}
  assert batch["images"].shape == (5, 1, SIZE, SIZE) and batch["images"].dtype == np.float32
  assert batch["labels"].shape == (5,) and batch["labels"].dtype == np.int32
  for n, image, label, flip in zip(
    numbers([batch]), batch["images"], batch["labels"], mirrored([batch])
  ):
    record = digits.mirrored(n) if flip else digits[n]
    expected = record["image"].transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - 1
    np.testing.assert_array_equal(image, expected)
    assert label == record["label"]


def test_colour_images_become_channels_first(pets):
  source = folder(pets)
  batch = next(make(source, batch_size=4, flip=False, model=COLOUR))
  found = np.round((batch["images"] + 1) * 127.5).astype(np.uint8)
  expected = np.stack([source[n]["image"].transpose(2, 0, 1) for n in range(4)])
  assert sorted(x.tobytes() for x in found) == sorted(x.tobytes() for x in expected)


def test_every_epoch_sees_every_image_once_up_to_the_remainder(digits):
  iterator = make(digits)
  assert iterator.batches_per_epoch == 4  # 23 // 5
  epochs = [numbers(take(iterator, 4)) for _ in range(6)]
  for epoch in epochs:
    assert len(set(epoch)) == 20 and set(epoch) <= set(range(23))
  assert len(set(map(tuple, epochs))) == 6  # reshuffled
  dropped = [frozenset(range(23)) - set(epoch) for epoch in epochs]
  assert len(set(dropped)) > 1
  whole = make(digits, batch_size=23)
  for _ in range(3):
    assert sorted(numbers(take(whole, 1))) == list(range(23))


def test_half_of_the_records_are_mirrored_anew_in_every_epoch(digits):
  iterator = make(digits, batch_size=23)
  epochs = [take(iterator, 1) for _ in range(60)]
  flips = np.array([mirrored(epoch)[np.argsort(numbers(epoch))] for epoch in epochs])
  assert abs(flips.mean() - 0.5) < 4 * 0.5 / np.sqrt(flips.size)  # four standard deviations
  assert flips.any(0).all() and not flips.all(0).any()  # no image is always the same way
  assert not mirrored(take(make(digits, flip=False), 12)).any()


def test_the_seed_decides(digits):
  first = take(make(digits), 9)
  assert_equal(take(make(digits), 9), first)
  other = take(make(digits, seed=4), 9)
  assert numbers(other) != numbers(first)
  assert not np.array_equal(mirrored(other), mirrored(first))


@pytest.mark.parametrize("consumed", [0, 1, 3, 4, 5, 11])  # 4 batches are an epoch
def test_a_restored_iterator_continues_exactly(digits, consumed):
  iterator = make(digits)
  take(iterator, consumed)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = take(iterator, 7)  # beyond the end of an epoch
  fresh = make(digits)
  fresh.set_state(state)
  assert fresh.get_state() == state
  assert_equal(take(fresh, 7), expected)
  iterator.set_state(state)  # back, in an iterator that has gone on
  assert_equal(take(iterator, 7), expected)


def test_closing_does_not_move_the_stream(digits):
  expected = take(make(digits), 4)
  iterator = make(digits)
  found = take(iterator, 2)
  iterator.close()
  iterator.close()
  assert_equal(found + take(iterator, 2), expected)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"seed": 4}, "seed=4: expected 3"),
    ({"batch_size": 6}, "batch_size=6: expected 5"),
    ({"flip": False}, "flip=False: expected True"),
    ({"records": 24}, "records=24: expected 23"),
    ({"labels_crc32": 0}, "labels_crc32=0: expected"),
    ({"batches": -1}, "batches=-1"),
    ({"batches": 1.5}, "batches=1.5"),
    ({"batches": None}, "batches=None"),
  ],
)
def test_a_state_of_other_data_is_refused(digits, change, message):
  iterator = make(digits)
  with pytest.raises(ValueError, match=message):
    iterator.set_state(iterator.get_state() | change)
  with pytest.raises(ValueError, match="seed=None"):
    iterator.set_state({})


def test_loader_processes_give_the_same_batches(digits):
  iterator = make(digits)
  take(iterator, 3)
  state = iterator.get_state()
  with_worker = make(digits, num_workers=1)
  with_worker.set_state(state)
  try:
    assert_equal(take(with_worker, 5), take(iterator, 5))
    assert with_worker.get_state() == iterator.get_state()
  finally:
    with_worker.close()


def test_latents_take_the_moments_of_the_mirrored_image(tmp_path):
  moments, other = latents(5), latents(5, 1)
  data.write_latents(tmp_path / "x", moments, LABELS, other)
  iterator = make(open_latents(tmp_path / "x"), batch_size=5, model=LATENT)
  kinds = set()
  for batch in take(iterator, 8):
    assert batch.keys() == {"moments", "labels"}
    assert batch["moments"].shape == (5, 6, 2, 2) and batch["moments"].dtype == np.float32
    for found, label in zip(batch["moments"], batch["labels"]):
      matches = [(n, k) for k, m in enumerate((moments, other)) for n in range(5)
                 if np.array_equal(found, m[n])]  # fmt: skip
      assert len(matches) == 1 and label == LABELS[matches[0][0]]
      kinds.add(matches[0][1])
  assert kinds == {0, 1}


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"batch_size": 24}, "batch_size=24: expected 1 to 23"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"seed": -1}, "seed=-1"),
    ({"seed": 2**32}, "seed=4294967296"),
    ({"num_workers": -1}, "num_workers=-1"),
    ({"model": COLOUR}, r"image: expected \(6, 6, 3\), found \(6, 6, 1\)"),
  ],
)
def test_make_iterator_refuses(digits, arguments, message):
  with pytest.raises(ValueError, match=message):
    make(digits, **arguments)
