"""How good generated Fashion-MNIST images are, by a small classifier shipped with the package.

Two numbers, both on 28x28 grey images: the share of samples that the classifier recognises as the
class they were asked for, and the Fréchet distance between the Gaussians fitted to its 128
penultimate features on the samples and on the 60,000 real training images (as FID does with
Inception features, arXiv 1706.08500). Distances of different classifiers are not comparable.
`tools/train_classifier.py` trains the classifier and writes its file.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import zipfile
from typing import TypedDict

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from marche_jax.embedded import DIRECTORY
from marche_jax.files import atomic_write
from marche_jax.models.params import Params

IMAGE_SHAPE = (28, 28, 1)
NUM_CLASSES = 10
NUM_FEATURES = 128
CLASSIFIER_FILE = DIRECTORY / "classifier.npz"
_BATCH = 256  # images per compiled call
_WEIGHT = "weight/"  # prefix of the weights' names in the file


class Classifier(nn.Module):
  """Four convolutions, then a dense layer of 128 ReLU features.

  About 4.2 million multiply-adds an image. It halves the resolution by strides, since the gradient
  of a max-pooling is slow on CPU, and has no normalisation layers, so that the features' scale is
  the weights' alone and an image's features do not depend on its batch.
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Classifies images.

    Args:
      x: float32 [batch, 28, 28, 1] in [-1, 1].

    Returns:
      float32 logits [batch, 10] and features [batch, 128].
    """
    init = nn.initializers.he_normal()
    for channels, kernel, stride in ((32, 5, 2), (64, 3, 2), (64, 3, 1), (96, 3, 2)):  # to 4x4
      conv = nn.Conv(channels, (kernel, kernel), strides=(stride, stride), kernel_init=init)
      x = nn.relu(conv(x))
    features = nn.relu(nn.Dense(NUM_FEATURES, kernel_init=init)(x.reshape(x.shape[0], -1)))
    return nn.Dense(NUM_CLASSES)(features), features


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureStatistics:
  """The Gaussian fitted to a set of features: float64 mean [dim] and covariance [dim, dim]."""

  mean: np.ndarray
  cov: np.ndarray

  def __post_init__(self) -> None:
    for field in ("mean", "cov"):
      object.__setattr__(self, field, np.asarray(getattr(self, field), np.float64))
    if self.mean.ndim != 1 or self.cov.shape != 2 * self.mean.shape:
      raise ValueError(
        f"statistics: expected mean [dim] and cov [dim, dim], found shapes {self.mean.shape} and "
        f"{self.cov.shape}"
      )
    if not (np.isfinite(self.mean).all() and np.isfinite(self.cov).all()):
      raise ValueError("statistics: expected finite values, found NaN or infinity")


def statistics(features: np.ndarray) -> FeatureStatistics:
  """Mean and (unbiased) covariance of features [num, dim], num at least 2.

  Raises:
    ValueError: for another shape, or non-finite features.
  """
  features = np.asarray(features, np.float64)
  if features.ndim != 2 or len(features) < 2:
    raise ValueError(f"features: expected [num >= 2, dim], found shape {features.shape}")
  return FeatureStatistics(features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)))


def frechet_distance(
  features_a: np.ndarray | FeatureStatistics, features_b: np.ndarray | FeatureStatistics
) -> float:
  """Squared Fréchet distance of two Gaussians, |m1-m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

  tr (S1 S2)^(1/2) is the sum of the square roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which
  is symmetric: no square root of an unsymmetric matrix is needed. Everything is in float64.

  Args:
    features_a: features [num, dim], or their statistics.
    features_b: the same, with the same dim.

  Returns:
    the distance, in squared units of the features; 0 for equal statistics.

  Raises:
    ValueError: for other shapes, different dims, or non-finite features.
  """
  a, b = _as_statistics(features_a), _as_statistics(features_b)
  _check_dims(a, b)
  return _distance(a, _sqrt_psd(a.cov), b)


def frechet_interval(
  features: np.ndarray,
  reference: np.ndarray | FeatureStatistics,
  resamples: int = 200,
  seed: int = 0,
) -> tuple[float, float]:
  """Bootstrap 95% interval of the Fréchet distance of this many samples to a fixed reference.

  Resampling adds the finite-sample bias of the distance a second time, so the bootstrap
  distribution is shifted to have its mean at the distance of the samples themselves. The interval
  is thus for the expected distance at this number of samples: compare at equal numbers only.

  Args:
    features: [num, dim] of the samples.
    reference: features or statistics, taken as exact.
    resamples: bootstrap resamples, at least 20.
    seed: of the resampling.

  Returns:
    the lower end (at least 0) and the upper end.

  Raises:
    ValueError: as `frechet_distance`, and for too few resamples or a negative seed.
  """
  if resamples < 20:
    raise ValueError(f"resamples={resamples}: expected at least 20")
  if seed < 0:
    raise ValueError(f"seed={seed}: expected a non-negative integer")
  own, fixed = statistics(features), _as_statistics(reference)
  _check_dims(own, fixed)
  root = _sqrt_psd(fixed.cov)
  num = len(features)
  centred = np.asarray(features, np.float64) - own.mean
  rng = np.random.default_rng(seed)
  distances = np.empty(resamples)
  for i in range(resamples):
    counts = np.bincount(rng.integers(num, size=num), minlength=num).astype(np.float64)
    shift = counts @ centred / num
    cov = ((centred.T * counts) @ centred - num * np.outer(shift, shift)) / (num - 1)
    distances[i] = _distance(fixed, root, FeatureStatistics(own.mean + shift, cov))
  low, high = (
    np.quantile(distances, [0.025, 0.975]) - distances.mean() + _distance(fixed, root, own)
  )
  return max(0.0, float(low)), float(high)


def recognised(logits: np.ndarray, labels: np.ndarray) -> float:
  """Share, in [0, 1], of rows of logits [num, classes] whose largest entry is at labels [num].

  Raises:
    ValueError: for other shapes, no rows, non-integer labels or labels out of range.
  """
  logits = np.asarray(logits)
  if logits.ndim != 2 or 0 in logits.shape:
    raise ValueError(f"logits: expected [num >= 1, classes], found shape {logits.shape}")
  labels = _check_labels(labels, *logits.shape)
  return float(np.mean(logits.argmax(-1) == labels))


def load_classifier(
  path: str | os.PathLike[str] = CLASSIFIER_FILE,
) -> tuple[Params, FeatureStatistics]:
  """Reads a classifier: float32 parameters of `Classifier` (stored as float16), and the reference.

  The reference are the feature statistics of the 60,000 real training images.

  Raises:
    ValueError: where the file is not a whole classifier; names what is missing or misshaped.
    OSError: where the file cannot be read.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files}
  except (zipfile.BadZipFile, EOFError, ValueError, TypeError) as error:
    raise ValueError(f"{path}: not a classifier file: {error}") from error
  expected = {_WEIGHT + name: shape for name, shape in _weight_shapes().items()}
  expected |= {"mean": (NUM_FEATURES,), "cov": (NUM_FEATURES, NUM_FEATURES)}
  if arrays.keys() != expected.keys():
    different = min(arrays.keys() ^ expected.keys())
    found = "unknown array" if different in arrays else "missing array"
    raise ValueError(f"{path}: {found} {different}")
  for name, shape in expected.items():
    array = arrays[name]
    if array.shape != shape or array.dtype.kind != "f" or not np.isfinite(array).all():
      raise ValueError(
        f"{path}: {name}: expected finite floats {shape}, found {array.dtype} {array.shape}"
      )
  reference = FeatureStatistics(arrays.pop("mean"), arrays.pop("cov"))
  flat = {name.removeprefix(_WEIGHT): jnp.float32(value) for name, value in arrays.items()}
  return flax.traverse_util.unflatten_dict(flat, sep="/"), reference


def save_classifier(
  path: str | os.PathLike[str], params: Params, reference: FeatureStatistics
) -> None:
  """Writes what `load_classifier` reads: beside the destination first, then renamed."""
  arrays: dict[str, np.ndarray] = {
    _WEIGHT + name: np.asarray(value, np.float16)
    for name, value in flax.traverse_util.flatten_dict(params, sep="/").items()
  }
  arrays |= {name: np.asarray(getattr(reference, name), np.float32) for name in ("mean", "cov")}
  with atomic_write(path) as aside, aside.open("wb") as file:
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def classify(params: Params, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Classifies images in batches of one compiled size.

  Logits and features are the averages over each image and its mirror image (which raises the
  accuracy on the test images by 0.4%), so an image and its mirror image are judged alike.

  Args:
    params: of `Classifier`, as `load_classifier` gives them.
    images: uint8 [num, 28, 28, 1], num at least 1.

  Returns:
    float32 logits [num, 10] and features [num, 128].

  Raises:
    ValueError: for images of another shape or dtype.
  """
  images = np.asarray(images)
  if images.dtype != np.uint8 or images.shape[1:] != IMAGE_SHAPE or len(images) == 0:
    raise ValueError(
      f"images: expected uint8 [num >= 1, 28, 28, 1], found {images.dtype} {images.shape}"
    )
  outputs = []
  for start in range(0, len(images), _BATCH):
    batch = images[start : start + _BATCH]
    padding = [(0, _BATCH - len(batch))] + [(0, 0)] * 3
    logits, features = _apply(params, np.pad(batch, padding))
    outputs.append((np.asarray(logits)[: len(batch)], np.asarray(features)[: len(batch)]))
  logits_all, features_all = (np.concatenate(parts) for parts in zip(*outputs))
  return logits_all, features_all


class Report(TypedDict):
  """What `evaluate_samples` finds."""

  num_images: int
  recognised: float  # share, in [0, 1]
  recognised_per_class: list[float | None]  # [10]; None where a class was not asked for
  frechet: float  # the distance
  frechet_interval: list[float]  # its 95% interval, [low, high]


def evaluate_samples(
  images: np.ndarray, labels: np.ndarray, reference: np.ndarray | FeatureStatistics | None = None
) -> Report:
  """Judges samples with the shipped classifier.

  Args:
    images: uint8 [num, 28, 28, 1], num at least 2 (5,000 and more for a meaningful distance).
    labels: int [num], the classes that were asked for.
    reference: features or statistics to compare with; None: the real training images.

  Returns:
    what was found, as JSON values.

  Raises:
    ValueError: for images or labels of another shape, dtype or range.
  """
  labels = _check_labels(labels, len(images), NUM_CLASSES)
  params, training_images = load_classifier()
  fixed = training_images if reference is None else _as_statistics(reference)
  logits, features = classify(params, images)
  of_class = [labels == c for c in range(NUM_CLASSES)]
  return {
    "num_images": len(labels),
    "recognised": recognised(logits, labels),
    "recognised_per_class": [
      recognised(logits[m], labels[m]) if m.any() else None for m in of_class
    ],
    "frechet": frechet_distance(features, fixed),
    "frechet_interval": list(frechet_interval(features, fixed)),
  }


@jax.jit
def _apply(params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
  with jax.default_matmul_precision("highest"):  # else bf16 on TPU, TF32 on GPU
    views = jnp.concatenate([images, images[:, :, ::-1]])
    outputs: tuple[jax.Array, jax.Array] = Classifier().apply({"params": params}, normalise(views))
    logits, features = (x.reshape(2, len(images), -1).mean(0) for x in outputs)
    return logits, features


def normalise(images: jax.Array) -> jax.Array:
  """The classifier's float32 input in [-1, 1] from uint8 images."""
  return images.astype(jnp.float32) / 127.5 - 1.0


@functools.cache
def _weight_shapes() -> dict[str, tuple[int, ...]]:
  spec = jax.ShapeDtypeStruct((1, *IMAGE_SHAPE), jnp.float32)
  variables = jax.eval_shape(Classifier().init, jax.random.key(0), spec)
  flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
  return {name: leaf.shape for name, leaf in flat.items()}


def _as_statistics(features: np.ndarray | FeatureStatistics) -> FeatureStatistics:
  return features if isinstance(features, FeatureStatistics) else statistics(features)


def _check_dims(a: FeatureStatistics, b: FeatureStatistics) -> None:
  if a.mean.shape != b.mean.shape:
    raise ValueError(f"features: expected equal dims, found {len(a.mean)} and {len(b.mean)}")


def _check_labels(labels: np.ndarray, num: int, classes: int) -> np.ndarray:
  labels = np.asarray(labels)
  if labels.shape != (num,) or labels.dtype.kind not in "iu":
    raise ValueError(f"labels: expected integers [{num}], found {labels.dtype} {labels.shape}")
  if num and (labels.min() < 0 or labels.max() >= classes):
    raise ValueError(
      f"labels: expected values in [0, {classes - 1}], found {labels.min()} to {labels.max()}"
    )
  return labels


def _sqrt_psd(cov: np.ndarray) -> np.ndarray:
  values, vectors = np.linalg.eigh(cov)
  return (vectors * np.sqrt(values.clip(0.0))) @ vectors.T


def _distance(a: FeatureStatistics, root_a: np.ndarray, b: FeatureStatistics) -> float:
  cross = np.sqrt(np.linalg.eigvalsh(root_a @ b.cov @ root_a).clip(0.0)).sum()
  distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov) + np.trace(b.cov) - 2.0 * cross
  return max(0.0, float(distance))  # rounding may leave -1e-13
