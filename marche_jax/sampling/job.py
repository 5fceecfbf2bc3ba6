"""Drawing one image per label into a directory: batches that are kept, and files made of them.

Finished batches lie in `DIR/partial` until the end, in a directory named by all that the images
depend on, the versions that draw and the device among it: a job that was interrupted and is started
again with the same settings goes on where it was, and one with other settings, versions or devices
does not take what is not its own. Two jobs do not write to a directory at once (`lock`), and its
report names the samples.npz that it is about by a digest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import shutil
import time
import zipfile
from collections.abc import Callable
from typing import NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from marche_jax.benchmarking import profiling
from marche_jax.config import SampleConfig
from marche_jax.decoding.generation import RunSettings, draw_batch
from marche_jax.decoding.given import check_labels
from marche_jax.decoding.pixels import compile_to_images, require_decodable
from marche_jax.decoding.plan_runner import PlanRunner
from marche_jax.files import atomic_write, check_writable
from marche_jax.flags import say
from marche_jax.images import grid, write_png
from marche_jax.lock import only_run
from marche_jax.models.mar import inference_params
from marche_jax.planning.policies import make_plan
from marche_jax.progress import image_bar
from marche_jax.versions import versions
from marche_jax.weights.checkpoint import Model

CALLS = 8
"""Calls of the compiled program per batch, between which progress is told."""


class Asked(TypedDict):
  """What a job was asked for, as plain JSON values."""

  model: dict[str, object]
  sample: dict[str, object]
  policy: str
  seed: int
  batch_size: int
  num_images: int
  dtype: str
  save_latents: bool


class Environment(TypedDict):
  """What drew; images of other versions or devices may differ, and are not joined."""

  versions: dict[str, str]
  device: str


class Effective(TypedDict):
  """What the plan runs, which a policy may have decided otherwise than `sample` says."""

  iterations: int
  diffusion_steps: list[int]  # per iteration: the fewest, the most
  solver: str
  guidance: list[float]  # per iteration: the least, the most; 1: none
  temperature: float


class Report(Asked, Environment):
  """`report.json`."""

  effective: Effective
  compile_seconds: float
  run_seconds: float
  images_drawn: int  # by this run: others were kept from one that was interrupted
  images_per_second: float | None
  gflops_per_image: float
  samples_sha256: str  # of samples.npz
  split_seconds: NotRequired[dict[str, float]]  # per image, of 'transformer' and 'head'


def choose_labels(labels: list[int] | None, num_images: int, class_num: int) -> np.ndarray:
  """Label of every image, int [num_images]: the given ones in turn, or each class equally often."""
  if labels is not None:
    return np.resize(np.asarray(labels), num_images)
  return np.arange(num_images) * class_num // num_images


class Job:
  """One image per label, to be drawn into a directory.

  Attributes:
    plan: of the decoding.
    labels: of all images, int32 [num].
    settings: as given, but for the batch size: it is at most `num`, and as many images fall to
      every device.
    asked: what the report says that was asked for.
    environment: the versions and devices that draw.
    out: the directory.
    partial: where its batches lie.
  """

  def __init__(
    self,
    model: Model,
    sample_config: SampleConfig,
    labels: ArrayLike,
    settings: RunSettings,
    out: pathlib.Path,
    *,
    save_latents: bool = False,
  ) -> None:
    """Makes the plan; draws, compiles and writes nothing.

    Raises:
      ValueError: for a value out of range, or a model without the autoencoder that it needs.
    """
    self.labels = check_labels(labels, model.config)
    require_decodable(model)
    self.out = out
    num, devices = len(self.labels), jax.device_count()
    batch_size = -(-min(settings.batch_size, num) // devices) * devices
    self.settings = dataclasses.replace(settings, batch_size=batch_size)
    self.plan = make_plan(model.config, sample_config)
    asked = Asked(
      model=dataclasses.asdict(model.config),
      sample=dataclasses.asdict(sample_config),
      policy=sample_config.policy,
      seed=settings.seed,
      batch_size=batch_size,
      num_images=num,
      dtype=jnp.dtype(settings.dtype).name,
      save_latents=save_latents,
    )
    self.asked: Asked = json.loads(json.dumps(asked))  # as the report will be read back
    device = jax.devices()[0]
    self.environment: Environment = {
      "versions": versions(),
      "device": f"{devices} x {device.device_kind} ({device.platform})",
    }
    self.partial = self.out / "partial" / self._fingerprint(model)

    mesh = None
    if devices > 1:
      mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    self._runner = PlanRunner(
      self.plan, dtype=settings.dtype, head_dtype=settings.dtype, mesh=mesh,
      chunk=-(-len(self.plan.rows) // CALLS),
    )  # fmt: skip
    self.model = dataclasses.replace(
      model,
      params=self._runner.place(inference_params(model.params, settings.dtype)),
      vae_params=self._runner.place(model.vae_params),
    )

  def _fingerprint(self, model: Model) -> str:
    """Names what the images depend on; of the code, its version."""
    described = json.dumps([self.asked, self.environment])
    digest = hashlib.sha256(described.encode() + self.labels.tobytes())
    digest.update(model.weights_digest.encode())
    return digest.hexdigest()[:16]

  def _parts(self) -> dict[int, pathlib.Path]:
    """The file of every batch, by the number of its first image."""
    starts = range(0, len(self.labels), self.settings.batch_size)
    return {start: self.partial / f"{start:08d}.npz" for start in starts}

  def others(self) -> list[pathlib.Path]:
    """Directories of batches of unfinished jobs of other settings, versions or devices."""
    return sorted(path for path in self.partial.parent.glob("*") if path != self.partial)

  def _labels_from(self, start: int) -> np.ndarray:
    return self.labels[start : start + self.settings.batch_size]

  def missing(self) -> list[int]:
    """The first image of every batch that is not drawn yet."""
    return [start for start, part in self._parts().items() if not part.exists()]

  def num_missing(self) -> int:
    """Images of the batches that are not drawn yet."""
    return sum(len(self._labels_from(start)) for start in self.missing())

  def compile(self) -> float:
    """Compiles what `draw` runs; returns the seconds it took."""
    size = self.settings.batch_size
    seconds = self._runner.compile(self.model.params, size)
    return seconds + compile_to_images(self.model, size, self._runner.mesh)

  def draw(self, progress: Callable[[float], object] = lambda images: None) -> None:
    """Draws the batches that are missing, and keeps each.

    Args:
      progress: is told several times per batch how many images' worth was just done.

    Raises:
      NonFiniteLatentsError: names the iteration and the images.
    """
    parts = self._parts()
    self.partial.mkdir(parents=True, exist_ok=True)
    for start in self.missing():
      labels = self._labels_from(start)
      batch = draw_batch(self.model, self._runner, labels, start, self.settings, progress)
      arrays = {"images": batch.images}
      if self.asked["save_latents"]:
        arrays["latents"] = batch.latents
      with atomic_write(parts[start]) as aside, aside.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]

  def effective(self) -> Effective:
    """What the plan runs."""
    rows = self.plan.rows
    steps, guidance = [self.plan.diffusion_steps(row) for row in rows], [row.cfg for row in rows]
    return {
      "iterations": len(rows),
      "diffusion_steps": [min(steps), max(steps)],
      "solver": self.plan.step_shapes[0].head.solver,
      "guidance": [min(guidance), max(guidance)] if self.plan.guided else [1.0, 1.0],
      "temperature": self.plan.temperature,
    }

  def split_seconds(self) -> dict[str, float]:
    """Seconds per image of 'transformer' (encoder and decoder) and 'head'.

    Measured apart, on one device with its share of the batch.
    """
    size, dtype = self.settings.batch_size // jax.device_count(), self.settings.dtype
    split = profiling.split(self.plan, self.model.params, size, dtype, dtype)
    return {"transformer": split["encoder"] + split["decoder"], "head": split["head"]}

  def collect(self) -> str:
    """Joins the batches into samples.npz, one in memory at a time, and draws grid.png.

    An old report is removed before: it is not about these images.

    Returns:
      the SHA-256 of samples.npz.
    """
    (self.out / "report.json").unlink(missing_ok=True)
    parts = list(self._parts().values())

    def stream(archive: zipfile.ZipFile, name: str, source: str) -> None:
      with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        for number, part in enumerate(parts):
          with np.load(part, allow_pickle=False) as batch:
            array = batch[source]
          if number == 0:
            header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False,
                      "shape": (len(self.labels), *array.shape[1:])}  # fmt: skip
            np.lib.format.write_array_header_2_0(file, header)
          file.write(np.ascontiguousarray(array).tobytes())

    with atomic_write(self.out / "samples.npz") as aside, zipfile.ZipFile(aside, "w") as archive:
      stream(archive, "arr_0", "images")
      with archive.open("arr_1.npy", "w") as file:
        np.lib.format.write_array(file, self.labels, allow_pickle=False)
      if self.asked["save_latents"]:
        stream(archive, "latents", "latents")
    with (self.out / "samples.npz").open("rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()

    shown, images = min(len(self.labels), 100), []
    for part in parts:
      with np.load(part, allow_pickle=False) as batch:
        images.append(batch["images"])
      if sum(map(len, images)) >= shown:
        break
    picture = grid(np.concatenate(images)[:shown], columns=math.ceil(math.sqrt(shown)))
    write_png(self.out / "grid.png", picture, scale=max(1, 64 // images[0].shape[1]))
    return digest

  def clear(self) -> None:
    """Removes this job's batches; those of other, unfinished settings stay."""
    shutil.rmtree(self.partial)
    with contextlib.suppress(OSError):
      self.partial.parent.rmdir()


def run(job: Job, *, profile: bool = False) -> Report:
  """Draws a job's images into its directory; returns the report that it wrote there.

  Where it is interrupted, the exception's note says what is kept.

  Args:
    job: what to draw.
    profile: also measure transformer and head apart, for the report's `split_seconds`.

  Raises:
    ValueError: for a directory that cannot be written, or that another run writes to; where latents
      are not finite (`NonFiniteLatentsError`).
    OSError: where a file cannot be written; names it.
  """
  with only_run(check_writable(job.out)):
    try:
      return _run(job, profile)
    except KeyboardInterrupt as interrupt:
      kept = len(job.labels) - job.num_missing()
      interrupt.add_note(
        f"{kept} of {len(job.labels)} images are kept in {job.partial}; the same command goes on "
        "with the others"
      )
      raise


def _run(job: Job, profile: bool) -> Report:
  compile_seconds, run_seconds = 0.0, 0.0
  num, todo = len(job.labels), job.num_missing()
  if others := job.others():
    say(f"{others[0].parent}: batches of other settings, versions or devices are not used")
  if todo:
    say(f"compiling ({len(job.plan.step_shapes)} step shapes) ...")
    compile_seconds = job.compile()
    with image_bar(num, "sampling", done=num - todo) as bar:
      clock = time.perf_counter()
      job.draw(bar.update)
      run_seconds = time.perf_counter() - clock
  split_seconds = None
  if profile:
    say("profiling ...")
    split_seconds = job.split_seconds()
  report: Report = {
    **job.asked,
    **job.environment,
    "effective": job.effective(),
    "compile_seconds": compile_seconds,
    "run_seconds": run_seconds,
    "images_drawn": todo,
    "images_per_second": todo / run_seconds if todo else None,
    "gflops_per_image": job.plan.flops().total / 1e9,
    "samples_sha256": job.collect(),
  }
  if split_seconds is not None:
    report["split_seconds"] = split_seconds
  with atomic_write(job.out / "report.json") as aside:
    aside.write_text(json.dumps(report, indent=2) + "\n")
  job.clear()
  return report
