"""The order of the batches and what is in them."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from records import (
  COLOUR,
  LABELS,
  LATENT,
  PIXELS,
  SIZE,
  break_image,
  folder,
  latents,
  numbered,
  open_latents,
  write_idx,
  write_pets,
)

from marche_jax.config import DataConfig
from marche_jax.training import data, sources


@pytest.fixture
def digits(tmp_path) -> sources.Source:
  write_idx(tmp_path, numbered(23), np.arange(23, dtype=np.uint8) % 4)
  return sources.open_source(DataConfig(path=str(tmp_path)), PIXELS)


def make(source: sources.Source, seed=3, batch_size=5, flip=True, num_workers=0, model=PIXELS):
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


def test_colour_images_become_channels_first(tmp_path):
  write_pets(tmp_path)
  source = folder(tmp_path)
  batch = next(make(source, batch_size=4, flip=False, model=COLOUR))
  found = np.round((batch["images"] + 1) * 127.5).astype(np.uint8)
  expected = np.stack([source[n]["image"].transpose(2, 0, 1) for n in range(4)])
  assert sorted(x.tobytes() for x in found) == sorted(x.tobytes() for x in expected)


def test_an_image_that_breaks_later_is_named(tmp_path):
  write_pets(tmp_path)
  iterator = make(folder(tmp_path), batch_size=4, flip=False, model=COLOUR)
  break_image(tmp_path / "dog/b.png")
  with pytest.raises(ValueError, match=r"dog/b.png: broken image"):
    next(iterator)


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
  sources.write_latents(tmp_path / "x", moments, LABELS, other)
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
