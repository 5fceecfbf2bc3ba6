"""Training batches, in a resumable random order.

`make_iterator` turns a source (`sources.open_source`) into an endless stream of batches through
grain: every epoch is shuffled anew, and of its records the last `len(source) % batch_size` are
dropped (others each time). Whether record n of the stream is mirrored depends on (seed, n). Batch k
is therefore a function of (source, seed, batch_size, flip, k) alone, and the state of an iterator
little but k.
"""

from __future__ import annotations

import signal
import zlib
from collections.abc import Iterator, Mapping

import grain
import numpy as np
from absl import flags

from marche_jax.config import ModelConfig
from marche_jax.training.sources import Record, Source, image_channels


class BatchIterator(Iterator[dict[str, np.ndarray]]):
  """Endless batches; made by `make_iterator`.

  Its state is JSON: `batches`, the number of batches given out, and what they depend on. It does
  not depend on `num_workers`, which may be another when a state is restored.
  """

  def __init__(
    self, source: Source, batch_size: int, seed: int, flip: bool, num_workers: int
  ) -> None:
    self._identity = {
      "seed": int(seed), "batch_size": int(batch_size), "flip": bool(flip), "records": len(source),
      "labels_crc32": zlib.crc32(source.labels.astype("<i8").tobytes()),
    }  # fmt: skip
    self.batches_per_epoch = len(source) // batch_size
    self._num_workers = num_workers
    self._batches = 0
    self._iterator: grain.DatasetIterator[dict[str, np.ndarray]] | None = (
      None  # started by the first batch, from `_batches` on
    )
    records = grain.MapDataset.range(len(source)).seed(seed).shuffle()
    self._dataset = records.random_map(_Load(source, flip)).batch(batch_size, drop_remainder=True)

  def _start(self) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    stream = self._dataset.repeat()[self._batches :]
    if self._num_workers == 0:
      return iter(stream.map(_finish).to_iter_dataset(grain.ReadOptions(2, 2)))
    if not flags.FLAGS.is_parsed():  # grain reads its own flags before it starts a process
      flags.FLAGS.mark_as_parsed()
    # A worker has whole batches to make (w, w + num_workers, ...), so that their content does not
    # depend on the number of workers; they travel through shared memory as bytes and are finished,
    # that is copied out of it, here.
    options = grain.multiprocessing.MultiprocessingOptions(self._num_workers, 2)
    loaded = stream.to_iter_dataset(grain.ReadOptions(1, 1))
    return iter(loaded.mp_prefetch(options, worker_init_fn=_ignore_interrupts).map(_finish))

  def __next__(self) -> dict[str, np.ndarray]:
    if self._iterator is None:
      self._iterator = self._start()
    batch = next(self._iterator)
    self._batches += 1
    return batch

  def get_state(self) -> dict[str, int]:
    """Where the stream is, as JSON values."""
    return {"batches": self._batches, **self._identity}

  def set_state(self, state: Mapping[str, object]) -> None:
    """Continues where the iterator that gave `state` was.

    Raises:
      ValueError: where the state is of other data, another seed, batch size or flip; names which.
    """
    for key, own in self._identity.items():
      if key not in state or state[key] != own:
        raise ValueError(f"state of the data: {key}={state.get(key)!r}: expected {own!r}")
    batches = state.get("batches")
    if not isinstance(batches, int) or isinstance(batches, bool) or batches < 0:
      raise ValueError(f"state of the data: batches={batches!r}: expected an integer of at least 0")
    self.close()
    self._batches = batches

  def close(self) -> None:
    """Ends threads and loader processes; the next batch, if any is asked for, starts them again."""
    if self._iterator is not None:
      self._iterator.close()
    self._iterator = None


def make_iterator(
  source: Source, batch_size: int, seed: int, flip: bool, num_workers: int, model: ModelConfig
) -> BatchIterator:
  """Endless, shuffled, resumable batches of a source, as the module's docstring says.

  Args:
    source: of `sources.open_source`, or another.
    batch_size: records in a batch, at most as many as the source has.
    seed: in [0, 2**32).
    flip: mirror half of the records.
    num_workers: loader processes; 0 loads in threads of this process.
    model: what the records are for.

  Returns:
    an iterator of `{'images': float32 [batch, channels, height, width] in [-1, 1], 'labels': int32
    [batch]}` or `{'moments': float32 [batch, 2 * channels, height, width], 'labels': ...}`.

  Raises:
    ValueError: for an argument out of range, or records that do not fit the model.
  """
  if not 1 <= batch_size <= len(source):
    raise ValueError(f"batch_size={batch_size}: expected 1 to {len(source)}, the number of records")
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed={seed}: expected an integer in [0, 2**32)")
  if num_workers < 0:
    raise ValueError(f"num_workers={num_workers}: expected at least 0")
  record = source.mirrored(0) if flip else source[0]
  channels, height, width = model.latent_shape
  expected = {"image": (model.img_size, model.img_size, image_channels(model)),
              "moments": (2 * channels, height, width)}  # fmt: skip
  name = "image" if "image" in record else "moments"
  found = (record["image"] if "image" in record else record["moments"]).shape
  if found != expected[name]:
    raise ValueError(f"{name}: expected {expected[name]}, found {found}")
  return BatchIterator(source, batch_size, seed, flip, num_workers)


def _ignore_interrupts(worker: int, num_workers: int) -> None:
  """Ctrl-C reaches loader processes too: they leave it to this process to end them, in order."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Load:
  """Index -> record, mirrored for half of the draws."""

  def __init__(self, source: Source, flip: bool) -> None:
    self._source, self._flip = source, flip

  def __call__(self, index: int, rng: np.random.Generator) -> Record:
    mirror = self._flip and rng.random() < 0.5
    return self._source.mirrored(index) if mirror else self._source[index]


def _finish(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  finished = {"labels": np.array(batch["label"], np.int32)}
  if "moments" in batch:
    return finished | {"moments": np.array(batch["moments"])}
  images = np.array(batch["image"].transpose(0, 3, 1, 2), np.float32, order="C")
  images /= 127.5
  images -= 1.0
  return finished | {"images": images}
