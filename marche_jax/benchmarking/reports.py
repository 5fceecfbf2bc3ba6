"""What reports of `marche_jax.benchmark` hold: plain JSON values, so that they are files as well.

Seconds, FLOPs and bytes of caches are per image where the name says so; memory is of the batch.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

from marche_jax.evaluation import quality


class Environment(TypedDict):
  """The machine, and what decodes on it."""

  device: str
  cpus: int | None  # that this process may use
  versions: dict[str, str]


class Seconds(TypedDict):
  """Of several timings."""

  typical: float  # the median; of an estimate, made of the least timing of every row
  min: float
  max: float


class Timed(TypedDict):
  """How long one policy takes."""

  runs: list[float]  # seconds per image of every run, or estimated in every round
  seconds_per_image: Seconds
  timed_rows: NotRequired[int]  # of an estimate


class PolicySpeed(Timed):
  """One policy on its own."""

  sample: dict[str, object]
  iterations: int
  diffusion_steps: list[int]  # per iteration: the fewest, the most
  step_shapes: int
  shapes: list[str]
  lower_seconds: float
  compile_seconds: float
  compiled_from_cache: bool
  split_seconds: dict[str, float] | None  # encoder, decoder, head, other
  padding: dict[str, float]  # tokens padded over exact: encoder, head
  gflops_per_image: dict[str, float]
  fraction_of_peak: dict[str, float]
  cache_bytes_per_image: int
  memory_bytes: dict[str, int]  # see `timing.Program.memory`
  whole_run_seconds: NotRequired[float]  # of the run that checks an estimate
  estimate_over_whole_run: NotRequired[float]


class Gains(TypedDict):
  """One policy against the baseline."""

  speedup: float
  predicted_speedup: float
  measured_over_predicted: float
  transformer_speedup: float | None  # of encoder and decoder, where they were timed apart


class ComparedSpeed(PolicySpeed, Gains):
  """One of several policies."""


class SpeedConditions(Environment):
  """What the policies of a report of speed share."""

  model: dict[str, object]
  batch_size: int
  dtype: str
  head_dtype: str
  estimated: bool
  repeats: int
  matmul_peak_gflops: float
  weight_bytes: int


class Subject(TypedDict):
  """What was measured."""

  name: str  # of the model
  weights: str  # 'random', 'embedded' or the checkpoint


class SpeedFindings(SpeedConditions):
  """Of `speed.compare`."""

  baseline: str
  policies: dict[str, ComparedSpeed]


class SpeedReport(Subject, SpeedFindings):
  """`benchmark.json` of several policies."""


class SingleReport(Subject, SpeedConditions, PolicySpeed):
  """`benchmark.json` of one policy."""

  policy: str


class SecondsOfBatches(TypedDict):
  """Seconds per image, of all batches."""

  median: float
  min: float
  max: float


class Difference(TypedDict):
  """How far the images of a policy are from those of the baseline."""

  latent_rmse: float  # over the standard deviation of the baseline's latents
  psnr: float  # dB, the mean over the images


class PolicyQuality(TypedDict):
  """The images of one policy."""

  sample: dict[str, object]
  seconds_per_image: SecondsOfBatches
  batch_seconds_per_image: list[float]
  compile_seconds: float | None  # None: nothing was missing
  speedup: float
  timed_with_baseline: bool  # in the same run
  predicted_speedup: float
  gflops_per_image: float
  cache_bytes_per_image: int
  difference: Difference | None  # None: the baseline
  quality: quality.Report | None  # None: the classifier cannot judge them
  on_front: NotRequired[bool]  # the Pareto front, where all could be judged


class QualityFindings(Environment):
  """Of `comparison.report`."""

  model: dict[str, object]
  num_images: int
  batch_size: int
  seed: int
  dtype: str
  baseline: str
  policies: dict[str, PolicyQuality]
  real: dict[str, quality.Report | None]  # images that no policy drew


class QualityReport(Subject, QualityFindings):
  """`quality.json`."""
