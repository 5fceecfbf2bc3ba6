"""Trains the classifier that judges Fashion-MNIST samples (see `marche_jax/evaluation/quality.py`).

python tools/train_classifier.py

reads the IDX files (of Debian's `dataset-fashion-mnist`, or in --data), trains with random flips
and shifts, prints the accuracy on the test images, and writes the weights and the feature
statistics of the training images. The distances printed calibrate the eye: what real test images,
noise and blur cost. The shipped weights are those of the default flags: 15 epochs took 6 minutes on
2 shared CPU cores.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from marche_jax import config as config_lib
from marche_jax.evaluation import quality
from marche_jax.files import user_path
from marche_jax.models.params import Params
from marche_jax.training import sources

FLAGS = flags.FLAGS


def define_flags() -> None:
  """Defines the command's flags: when it runs, not when its functions are imported."""
  flags.DEFINE_string("data", "", "directory of the IDX files; by default the Debian package's")
  flags.DEFINE_string("out", str(quality.CLASSIFIER_FILE), "file to write (.npz)")
  flags.DEFINE_integer("epochs", 15, "passes over the training images", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "of the initial weights, the order and the shifts", lower_bound=0)


BATCH = 128
PEAK_LEARNING_RATE = 2e-3
WEIGHT_DECAY = 5e-4
MAX_SHIFT = 2  # pixels, each way


def read_split(path: str, split: str) -> tuple[np.ndarray, np.ndarray]:
  """Images uint8 [num, 28, 28, 1] and labels int32 [num] of one split of the IDX files."""
  model = config_lib.ModelConfig(
    img_size=28, vae_stride=1, patch_size=4, vae_embed_dim=1, class_num=quality.NUM_CLASSES
  )
  source = sources.open_source(config_lib.DataConfig(source="idx", path=path, split=split), model)
  items = [source[i] for i in range(len(source))]
  return np.stack([i["image"] for i in items]), np.array([i["label"] for i in items], np.int32)


def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Flips each image [num, 28, 28, 1] with probability 1/2 and shifts it by up to 2 pixels."""
  num, height, width, _ = images.shape
  dy, dx = rng.integers(-MAX_SHIFT, MAX_SHIFT + 1, (2, num, 1))
  rows = np.arange(height) + dy + MAX_SHIFT
  columns = np.arange(width)[None].repeat(num, 0)
  flipped = rng.random(num) < 0.5
  columns[flipped] = columns[flipped, ::-1]
  columns += dx + MAX_SHIFT
  margin = [(0, 0), (MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT), (0, 0)]
  padded = np.pad(images, margin)
  return padded[np.arange(num)[:, None, None], rows[:, :, None], columns[:, None, :]]


def train(images: np.ndarray, labels: np.ndarray, epochs: int, seed: int) -> Params:
  """Trains with AdamW under a cosine schedule; returns float32 parameters."""
  model = quality.Classifier()
  batch = min(BATCH, len(images))
  per_epoch = len(images) // batch
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, PEAK_LEARNING_RATE, per_epoch // 2, epochs * per_epoch
  )
  optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
  params = model.init(jax.random.key(seed), jnp.zeros((1, *quality.IMAGE_SHAPE)))["params"]
  state = optimizer.init(params)

  def loss_fn(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    logits: jax.Array = model.apply({"params": params}, quality.normalise(images))[0]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  @jax.jit
  def update(
    params: Params, state: optax.OptState, images: jax.Array, labels: jax.Array
  ) -> tuple[Params, optax.OptState, jax.Array]:
    loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  rng = np.random.default_rng(seed)
  for epoch in range(epochs):
    started = time.perf_counter()
    order = rng.permutation(len(images))
    losses = []
    for i in range(per_epoch):
      chosen = order[i * batch : (i + 1) * batch]
      params, state, loss = update(params, state, augment(images[chosen], rng), labels[chosen])
      losses.append(loss)
    seconds = time.perf_counter() - started
    print(f"epoch {epoch + 1}/{epochs}: loss {np.mean(losses):.4f}, {seconds:.1f} s", flush=True)
  return params


def degraded(images: np.ndarray, seed: int) -> dict[str, np.ndarray]:
  """The images with Gaussian noise of 10% of the range, and under a 3x3 box blur."""
  noise = np.random.default_rng(seed).normal(0.0, 25.5, images.shape)
  padded = np.pad(images.astype(np.float64), [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
  height, width = images.shape[1:3]
  shifts = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
  return {
    "10% noise": (images + noise).round().clip(0, 255).astype(np.uint8),
    "3x3 blur": np.mean(shifts, axis=0).round().astype(np.uint8),
  }


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  try:
    out = user_path(FLAGS.out, "--out")
    data = str(user_path(FLAGS.data, "--data")) if FLAGS.data else ""
  except ValueError as error:
    raise app.UsageError(str(error)) from error
  if out.is_dir():
    raise app.UsageError(f"--out={out}: expected a file, found a directory")
  if not out.parent.is_dir():
    raise app.UsageError(f"--out={out}: no directory {out.parent}")
  images, labels = read_split(data, "train")
  test_images, test_labels = read_split(data, "t10k")
  params = train(images, labels, FLAGS.epochs, FLAGS.seed)
  params = jax.tree.map(lambda p: p.astype(jnp.float16).astype(jnp.float32), params)  # as stored
  reference = quality.statistics(quality.classify(params, images)[1])
  logits, features = quality.classify(params, test_images)
  accuracy = quality.recognised(logits, test_labels)
  distance = quality.frechet_distance(features, reference)
  print(f"test images: {accuracy:.2%} recognised, Fréchet distance {distance:.2f}")
  for name, changed in degraded(test_images, FLAGS.seed).items():
    logits, features = quality.classify(params, changed)
    accuracy = quality.recognised(logits, test_labels)
    distance = quality.frechet_distance(features, reference)
    print(f"test images with {name}: {accuracy:.2%} recognised, Fréchet distance {distance:.2f}")
  quality.save_classifier(out, params, reference)
  print(f"wrote {out} ({out.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
  define_flags()
  app.run(main)
