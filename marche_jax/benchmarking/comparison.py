"""Quality and speed of several policies on the same images: the same seeds, labels and noise.

Every batch of every policy is kept in a directory named by what it depends on (weights, plan, seed,
batch size, dtype, device), so that a run which was interrupted goes on, and a later one with more
policies or more images draws only what is missing. The code that draws is not in the name: after a
change of it, use another directory.

Every policy draws a batch that is not kept, to warm up. Then policies take turns, batch by batch,
so that noise of the machine hits all alike. A speed-up is the median over the batches of the
baseline's seconds over the policy's; where the two were not drawn in the same run, that of their
medians.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
import secrets
import statistics
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from marche_jax.benchmarking import profiling
from marche_jax.benchmarking.entries import Entry, baseline
from marche_jax.benchmarking.reports import Difference, PolicyQuality, QualityFindings
from marche_jax.config import ModelConfig
from marche_jax.decoding.generation import Batch, RunSettings, draw_batch
from marche_jax.decoding.pixels import compile_to_images, require_decodable
from marche_jax.decoding.plan_runner import NonFiniteLatentsError, PlanRunner
from marche_jax.evaluation import quality
from marche_jax.files import atomic_write, check_writable
from marche_jax.flags import say
from marche_jax.models.mar import inference_params
from marche_jax.planning.plan import DecodePlan
from marche_jax.progress import image_bar
from marche_jax.weights.checkpoint import Model

MAX_PSNR = 100.0
"""dB of two images that are equal in every byte."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(RunSettings):
  """What all policies of a comparison share."""

  num_images: int

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.num_images < 1:
      raise ValueError(f"num_images={self.num_images}: expected at least 1")

  def starts(self) -> range:
    """First image of every batch."""
    return range(0, self.num_images, self.batch_size)


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
  """The images of one policy."""

  images: np.ndarray  # uint8 [num, H, W, channels]
  latents: np.ndarray  # float32 [num, channels, h, w]
  seconds: list[float]  # per image, of every batch
  runs: list[str]  # in which every batch was drawn


def labels_of(start: int, count: int, config: ModelConfig) -> np.ndarray:
  """Labels of images start, start + 1, ..., int32 [count]: the classes in turn."""
  return (np.arange(start, start + count) % config.class_num).astype(np.int32)


def fingerprint(model: Model, plan: DecodePlan, settings: Settings) -> str:
  """Names what the images of a policy and their timing depend on, but for the code."""
  environment = profiling.environment()
  shared = {
    "model": dataclasses.asdict(model.config),
    "vae": None if model.vae_config is None else dataclasses.asdict(model.vae_config),
    "weights": model.weights_digest,
    "seed": settings.seed,
    "batch_size": settings.batch_size,
    "dtype": jnp.dtype(settings.dtype).name,
    "device": [environment["device"], environment["cpus"]],
    "plan": repr((plan.step_shapes, plan.rows, plan.temperature, plan.raster_groups)),
    "stages": None if plan.stages is None else plan.stages.tolist(),
    "timesteps": [process.timesteps.tolist() for process in plan.processes],
  }
  return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


def directories(
  out: pathlib.Path, model: Model, entries: Sequence[Entry], settings: Settings
) -> dict[str, pathlib.Path]:
  """Where the batches of every entry lie; entries of a policy that decode alike share one."""
  return {
    e.name: out / "batches"
    / f"{re.sub('[^a-z+]', '_', e.sample.policy)}-{fingerprint(model, e.plan, settings)}"
    for e in entries
  }  # fmt: skip


def draw(
  model: Model, entries: Sequence[Entry], settings: Settings, out: pathlib.Path
) -> dict[str, float]:
  """Draws the batches that are missing, policies in turn; returns seconds of compilation by name.

  Image i depends on (seed, i, label) alone, and its label on i. Batches are whole: the last one may
  hold images beyond `num_images`, which a later run can use.

  Raises:
    ValueError: where `out` cannot be written, or images are not finite (`NonFiniteLatentsError`).
  """
  require_decodable(model)
  kept = directories(check_writable(out), model, entries, settings)
  batch_size, dtype = settings.batch_size, settings.dtype
  model = dataclasses.replace(model, params=inference_params(model.params, dtype))
  todo = [
    (start, entry) for start in settings.starts() for entry in entries
    if not _file(kept[entry.name], start).exists()
  ]  # fmt: skip
  runners: dict[str, PlanRunner] = {}
  compile_seconds: dict[str, float] = {}

  def draw_from(start: int, entry: Entry, progress: Callable[[float], object]) -> Batch:
    labels = labels_of(start, batch_size, model.config)
    try:
      return draw_batch(model, runners[entry.name], labels, start, settings, progress)
    except NonFiniteLatentsError as error:
      raise NonFiniteLatentsError(f"{entry.name}: {error}") from error

  if not todo:
    return compile_seconds
  compile_to_images(model, batch_size)
  for entry in entries:
    if any(entry is waiting for _, waiting in todo):
      kept[entry.name].mkdir(parents=True, exist_ok=True)
      say(f"compiling {entry.name} ...")
      runners[entry.name] = PlanRunner(entry.plan, dtype=dtype, head_dtype=dtype)
      compile_seconds[entry.name] = runners[entry.name].compile(model.params, batch_size)
      draw_from(0, entry, lambda images: None)  # warms up
  run = secrets.token_hex(8)
  total = len(settings.starts()) * len(entries)
  with (
    image_bar(total * batch_size, "drawing", done=(total - len(todo)) * batch_size) as bar,
    _noting_what_is_kept(out),
  ):
    for start, entry in todo:
      file = _file(kept[entry.name], start)
      if file.exists():  # another entry decodes in the same way
        bar.update(batch_size)
        continue
      bar.set_postfix_str(
        f"{entry.name}, images {start} to {start + batch_size - 1}", refresh=False
      )
      batch = draw_from(start, entry, bar.update)
      with atomic_write(file) as aside, aside.open("wb") as opened:
        np.savez(
          opened, images=batch.images, latents=batch.latents, seconds=np.asarray(batch.seconds),
          run=np.asarray(run),
        )  # fmt: skip
  return compile_seconds


@contextlib.contextmanager
def _noting_what_is_kept(out: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except KeyboardInterrupt as interrupt:
    interrupt.add_note(f"finished batches are kept in {out / 'batches'}, the same command goes on")
    raise


def _file(directory: pathlib.Path, start: int) -> pathlib.Path:
  return directory / f"{start:08d}.npz"


def collect(directory: pathlib.Path, settings: Settings) -> Drawn:
  """The images of a policy from its batches.

  Raises:
    FileNotFoundError: where a batch is missing.
  """
  images, latents, seconds, runs = [], [], [], []
  for start in settings.starts():
    with np.load(_file(directory, start), allow_pickle=False) as batch:
      images.append(batch["images"])
      latents.append(batch["latents"])
      seconds.append(float(batch["seconds"]) / settings.batch_size)
      runs.append(str(batch["run"]))
  num = settings.num_images
  return Drawn(np.concatenate(images)[:num], np.concatenate(latents)[:num], seconds, runs)


def differences(drawn: Drawn, reference: Drawn) -> Difference:
  """How far the same images of two policies are apart.

  Returns:
    `latent_rmse`, over the standard deviation of the reference's latents, and `psnr`, in dB: the
    mean over the images of 10 log10(255^2 / mean squared error), at most `MAX_PSNR`.
  """
  error = np.square(np.float64(drawn.latents) - reference.latents).mean()
  squares = np.square(np.float64(drawn.images) - reference.images)
  squares = squares.reshape(len(squares), -1).mean(axis=1)
  floor = 255.0**2 / 10 ** (MAX_PSNR / 10)
  return {
    "latent_rmse": float(np.sqrt(error) / np.float64(reference.latents).std()),
    "psnr": float((10 * np.log10(255.0**2 / np.maximum(squares, floor))).mean()),
  }


def speedup(drawn: Drawn, reference: Drawn) -> tuple[float, bool]:
  """(speed-up over the reference, whether both were timed in the same runs); see the module."""
  ratios = [
    theirs / ours
    for ours, theirs, run, their_run in zip(
      drawn.seconds, reference.seconds, drawn.runs, reference.runs, strict=True
    )
    if run == their_run
  ]
  if ratios:
    return statistics.median(ratios), True
  return statistics.median(reference.seconds) / statistics.median(drawn.seconds), False


def can_judge(config: ModelConfig) -> bool:
  """Whether the shipped classifier can judge a model's images."""
  shape = (config.img_size, config.img_size, config.vae_embed_dim)
  return (
    config.vae_stride == 1 and shape == quality.IMAGE_SHAPE
    and config.class_num == quality.NUM_CLASSES
  )  # fmt: skip


def report(
  model: Model,
  entries: Sequence[Entry],
  settings: Settings,
  out: pathlib.Path,
  compile_seconds: dict[str, float] | None = None,
  real: tuple[np.ndarray, np.ndarray] | None = None,
) -> QualityFindings:
  """Judges what `draw` has drawn.

  Args:
    model, entries, settings, out: as in `draw`.
    compile_seconds: what `draw` returned.
    real: images uint8 [num, H, W, channels] and labels int [num] to judge beside them.

  Returns:
    The report; `tables.quality_table` shows what it holds.

  Raises:
    FileNotFoundError: where a batch is missing.
  """
  kept = directories(out, model, entries, settings)
  base = baseline(entries)
  reference = collect(kept[base.name], settings)
  labels = labels_of(0, settings.num_images, model.config)
  found: dict[str, PolicyQuality] = {}
  for entry in entries:
    drawn = reference if entry is base else collect(kept[entry.name], settings)
    gain, together = speedup(drawn, reference)
    found[entry.name] = {
      "sample": dataclasses.asdict(entry.sample),
      "seconds_per_image": {
        "median": statistics.median(drawn.seconds),
        "min": min(drawn.seconds),
        "max": max(drawn.seconds),
      },
      "batch_seconds_per_image": drawn.seconds,
      "compile_seconds": (compile_seconds or {}).get(entry.name),
      "speedup": gain,
      "timed_with_baseline": together,
      "predicted_speedup": entry.plan.speedup(base.plan),
      "gflops_per_image": entry.plan.flops().total / 1e9,
      "cache_bytes_per_image": entry.plan.cache_bytes_per_image,
      "difference": None if entry is base else differences(drawn, reference),
      "quality": judge(drawn.images, labels, model.config),
    }
  judged = [(p["speedup"], p["quality"]) for p in found.values()]
  points = [(gain, images["frechet"]) for gain, images in judged if images is not None]
  if len(points) == len(found):
    front = pareto(points)
    for number, policy in enumerate(found.values()):
      policy["on_front"] = number in front
  return {
    "model": dataclasses.asdict(model.config),
    "num_images": settings.num_images,
    "batch_size": settings.batch_size,
    "seed": settings.seed,
    "dtype": jnp.dtype(settings.dtype).name,
    **profiling.environment(),
    "baseline": base.name,
    "policies": found,
    "real": {} if real is None else {"test images": judge(*real, model.config)},
  }


def judge(images: np.ndarray, labels: np.ndarray, config: ModelConfig) -> quality.Report | None:
  """`quality.evaluate_samples`; None where the classifier cannot judge the images."""
  if not can_judge(config) or len(images) < 2:
    return None
  return quality.evaluate_samples(images, labels)


def example_images(
  model: Model, entries: Sequence[Entry], settings: Settings, out: pathlib.Path, count: int
) -> dict[str, np.ndarray]:
  """The first images of every entry, uint8 [count, H, W, channels]; what `compare_images` takes."""
  shown = dataclasses.replace(settings, num_images=min(count, settings.num_images))
  kept = directories(out, model, entries, settings)
  return {entry.name: collect(kept[entry.name], shown).images for entry in entries}


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
  """Indices of the points (gain, loss) on the Pareto front, by rising gain.

  A point is on it where no other has at least its gain and at most its loss, and one of them
  strictly; of equal points all are.
  """
  front = [
    i for i, (gain, loss) in enumerate(points)
    if not any(g >= gain and c <= loss and (g > gain or c < loss) for g, c in points)
  ]  # fmt: skip
  return sorted(front, key=lambda i: points[i][0])
