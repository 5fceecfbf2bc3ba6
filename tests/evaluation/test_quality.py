"""The quality measure: formulas against hand calculation, and the shipped classifier."""

from __future__ import annotations

import gzip
import importlib.util
import json
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest
from golden import quick_environment

from marche_jax.config import DataConfig, ModelConfig
from marche_jax.evaluation import quality
from marche_jax.training.sources import FASHION_MNIST, open_source

ROOT = pathlib.Path(__file__).parents[2]
TOOL = ROOT / "tools" / "train_classifier.py"


_spec = importlib.util.spec_from_file_location("train_classifier", TOOL)
train_classifier = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(train_classifier)


def features(num: int, dim: int, seed: int) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return rng.normal(size=(num, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim)


def test_distance_of_diagonal_gaussians_by_hand():
  a = quality.FeatureStatistics([1.0, 2.0, 3.0], np.diag([4.0, 9.0, 0.0]))
  b = quality.FeatureStatistics([1.0, 0.0, 6.0], np.diag([1.0, 16.0, 25.0]))
  # Means: 4 + 9. Commuting covariances: (2-1)^2 + (3-4)^2 + (0-5)^2.
  assert quality.frechet_distance(a, b) == pytest.approx(13 + 27, rel=1e-12)


def test_distance_of_gaussians_that_do_not_commute():
  a = quality.FeatureStatistics(np.zeros(2), [[2.0, 1.0], [1.0, 2.0]])
  b = quality.FeatureStatistics(np.zeros(2), [[3.0, 0.0], [0.0, 1.0]])
  # In 2-D tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), with M = S1 S2: tr 8, det 9.
  assert quality.frechet_distance(a, b) == pytest.approx(4 + 4 - 2 * np.sqrt(8 + 2 * 3), rel=1e-12)


def test_distance_is_zero_on_itself_symmetric_and_positive():
  a, b = features(400, 16, 0), features(300, 16, 1)
  scale = np.trace(np.cov(a.T))
  assert quality.frechet_distance(a, a) < 1e-10 * scale
  there, back = quality.frechet_distance(a, b), quality.frechet_distance(b, a)
  assert there == pytest.approx(back, rel=1e-10)
  assert there > 0.1


def test_distance_is_invariant_under_rigid_motion_and_scales_quadratically():
  a, b = features(400, 8, 0), features(300, 8, 1)
  distance = quality.frechet_distance(a, b)
  turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(8, 8)))
  moved = quality.frechet_distance(a @ turn + 5.0, b @ turn + 5.0)
  assert moved == pytest.approx(distance, rel=1e-9)
  assert quality.frechet_distance(3 * a, 3 * b) == pytest.approx(9 * distance, rel=1e-9)
  shifted = quality.frechet_distance(a, a + 0.5)
  assert shifted == pytest.approx(8 * 0.25, rel=1e-8)


def test_distance_with_fewer_samples_than_features():
  a, b = features(5, 16, 0), features(7, 16, 1)
  assert quality.frechet_distance(a, b) == pytest.approx(quality.frechet_distance(b, a), rel=1e-6)
  assert quality.frechet_distance(a, a) < 1e-5


def test_statistics_and_features_are_interchangeable():
  a, b = features(100, 4, 0), features(100, 4, 1)
  assert quality.frechet_distance(quality.statistics(a), b) == quality.frechet_distance(a, b)
  np.testing.assert_allclose(quality.statistics(a).cov, np.cov(a.T), rtol=1e-12)
  one = quality.statistics(np.array([[1.0], [3.0]]))
  assert one.mean == [2.0] and one.cov == [[2.0]]


def test_interval_covers_the_expected_distance():
  rng = np.random.default_rng(0)
  reference = quality.FeatureStatistics(np.zeros(3), np.eye(3))
  draws = 0.3 + 1.2 * rng.normal(size=(200, 150, 3))
  expected = np.mean([quality.frechet_distance(d, reference) for d in draws])
  intervals = [quality.frechet_interval(d, reference, resamples=60) for d in draws[:100]]
  covered = np.mean([low <= expected <= high for low, high in intervals])
  assert 0.85 <= covered <= 1.0  # 95% but for the small numbers
  # And it is no wider than the spread of the distances warrants.
  spread = np.std([quality.frechet_distance(d, reference) for d in draws])
  width = np.mean([high - low for low, high in intervals])
  assert 0.7 * 3.92 * spread < width < 1.4 * 3.92 * spread


def test_interval_holds_the_distance_and_depends_on_the_seed_alone():
  a, b = features(200, 6, 0), features(200, 6, 1)
  low, high = quality.frechet_interval(a, b, resamples=100, seed=3)
  assert 0 <= low < quality.frechet_distance(a, b) < high
  assert (low, high) == quality.frechet_interval(a, b, resamples=100, seed=3)
  assert (low, high) != quality.frechet_interval(a, b, resamples=100, seed=4)


def test_bootstrap_moments_are_those_of_the_resampled_rows():
  a, b = features(30, 3, 0), features(40, 3, 1)
  rng = np.random.default_rng(7)
  plain = [quality.frechet_distance(a[rng.integers(30, size=30)], b) for _ in range(20)]
  low, high = np.quantile(plain, [0.025, 0.975]) - np.mean(plain) + quality.frechet_distance(a, b)
  interval = quality.frechet_interval(a, b, resamples=20, seed=7)
  np.testing.assert_allclose(interval, (max(0.0, low), high), rtol=1e-9)


def test_recognised_by_hand():
  logits = np.array([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0], [5.0, 6.0, 0.0]])
  assert quality.recognised(logits, np.array([1, 0, 2, 0])) == 0.75
  assert quality.recognised(logits, np.array([0, 1, 0, 0])) == 0.0


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: quality.statistics(np.zeros(5)), r"features: .*\(5,\)"),
    (lambda: quality.statistics(np.zeros((1, 5))), r"num >= 2.*\(1, 5\)"),
    (lambda: quality.statistics(np.full((3, 2), np.nan)), "finite"),
    (lambda: quality.FeatureStatistics(np.zeros(3), np.eye(2)), r"\(3,\) and \(2, 2\)"),
    (lambda: quality.frechet_distance(np.zeros((3, 2)), np.zeros((3, 4))), "found 2 and 4"),
    (lambda: quality.frechet_interval(np.eye(3), np.eye(3), resamples=1), "resamples=1"),
    (lambda: quality.frechet_interval(np.eye(3), np.eye(3), seed=-1), "seed=-1"),
    (lambda: quality.recognised(np.zeros((2, 3)), np.array([0, 3])), "0 to 3"),
    (lambda: quality.recognised(np.zeros((2, 3)), np.array([-1, 0])), "-1 to 0"),
    (lambda: quality.recognised(np.zeros((2, 3)), np.array([0.0, 1.0])), "float64"),
    (lambda: quality.recognised(np.zeros((2, 3)), np.array([0])), r"\[2\]"),
    (lambda: quality.recognised(np.zeros((0, 3)), np.zeros(0, int)), r"logits: .*\(0, 3\)"),
    (lambda: quality.classify({}, np.zeros((2, 28, 28), np.uint8)), "images: expected uint8"),
    (lambda: quality.classify({}, np.zeros((2, 28, 28, 1))), "float64"),
    (lambda: quality.classify({}, np.zeros((0, 28, 28, 1), np.uint8)), "num >= 1"),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_bad_samples_are_named():
  images = np.zeros((2, 28, 28, 1), np.uint8)
  with pytest.raises(ValueError, match=r"labels: expected values in \[0, 9\], found 3 to 10"):
    quality.evaluate_samples(images, np.array([3, 10]))
  with pytest.raises(ValueError, match="labels: expected integers"):
    quality.evaluate_samples(images, np.array([3]))


def test_classifier_file_is_small_and_plain():
  assert quality.CLASSIFIER_FILE.stat().st_size <= 700_000
  with np.load(quality.CLASSIFIER_FILE, allow_pickle=False) as file:
    dtypes = {name: file[name].dtype for name in file.files}
  assert dtypes.pop("mean") == dtypes.pop("cov") == np.float32
  assert set(dtypes.values()) == {np.dtype(np.float16)}


def test_saved_classifier_reads_back_and_damage_is_refused(tmp_path):
  params, reference = quality.load_classifier()
  path = tmp_path / "c.npz"
  quality.save_classifier(path, params, reference)
  assert [p.name for p in tmp_path.iterdir()] == ["c.npz"]
  again, statistics = quality.load_classifier(path)
  images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), np.uint8)
  for one, other in zip(quality.classify(params, images), quality.classify(again, images)):
    np.testing.assert_array_equal(one, other)
  np.testing.assert_array_equal(reference.cov, statistics.cov)

  whole = path.read_bytes()
  for damaged in (b"", whole[: len(whole) // 2], b"no archive at all"):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"c\.npz: not a classifier file"):
      quality.load_classifier(path)
  arrays = dict(np.load(quality.CLASSIFIER_FILE, allow_pickle=False))
  for changes, message in (
    ({"mean": None}, "missing array mean"),
    ({"extra": np.zeros(1)}, "unknown array extra"),
    ({"mean": np.zeros(7)}, r"mean: expected finite floats \(128,\), found float64 \(7,\)"),
    ({"mean": np.full(128, np.inf)}, "mean: expected finite"),
    ({"mean": np.array([{}] * 128)}, "not a classifier file"),  # would need unpickling
  ):
    changed = {k: v for k, v in (arrays | changes).items() if v is not None}
    np.savez(path, **changed)
    with pytest.raises(ValueError, match=message):
      quality.load_classifier(path)


def test_an_image_is_judged_alike_in_any_batch_and_mirrored():
  params, _ = quality.load_classifier()
  images = np.random.default_rng(0).integers(0, 256, (300, 28, 28, 1), np.uint8)
  logits, found = quality.classify(params, images)
  assert logits.shape == (300, 10) and found.shape == (300, 128)
  assert logits.dtype == found.dtype == np.float32
  alone = quality.classify(params, images[290:291])
  mirrored = quality.classify(params, images[290:291, :, ::-1])
  for other in (alone, mirrored):
    np.testing.assert_allclose(other[0], logits[290:291], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(other[1], found[290:291], rtol=1e-4, atol=1e-4)


def test_evaluation_adds_up():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (40, 28, 28, 1), np.uint8)
  labels = rng.integers(0, 9, 40)  # none of class 9
  report = json.loads(json.dumps(quality.evaluate_samples(images, labels)))
  params, reference = quality.load_classifier()
  logits, found = quality.classify(params, images)
  assert report["num_images"] == 40
  assert report["recognised"] == np.mean(logits.argmax(1) == labels)
  per_class = report["recognised_per_class"]
  assert len(per_class) == 10 and per_class[9] is None
  shares = [share * np.mean(labels == c) for c, share in enumerate(per_class[:9])]
  assert sum(shares) == pytest.approx(report["recognised"])
  assert report["frechet"] == quality.frechet_distance(found, reference)
  low, high = report["frechet_interval"]
  assert low < report["frechet"] < high
  assert quality.evaluate_samples(images, labels, found)["frechet"] < 1e-3 * report["frechet"]


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_shipped_classifier_recognises_real_images():
  model = ModelConfig(img_size=28, vae_stride=1, patch_size=4, vae_embed_dim=1, class_num=10)
  source = open_source(DataConfig(source="idx", split="t10k"), model)
  items = [source[i] for i in range(1000)]
  images = np.stack([item["image"] for item in items])
  report = quality.evaluate_samples(images, np.array([item["label"] for item in items]))
  assert report["recognised"] > 0.92
  noisy = np.random.default_rng(0).normal(images, 25.5).clip(0, 255).astype(np.uint8)
  params, reference = quality.load_classifier()
  damaged = quality.frechet_distance(quality.classify(params, noisy)[1], reference)
  assert damaged > report["frechet_interval"][1]


def write_idx(directory: pathlib.Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
  for name, array in (("images-idx3", images), ("labels-idx1", labels)):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    with gzip.open(directory / f"{split}-{name}-ubyte.gz", "wb") as file:
      file.write(header + array.astype(np.uint8).tobytes())


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, str(TOOL), *arguments]
  environment = quick_environment(ROOT)  # installed or not
  return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_tool_trains_and_writes_a_classifier(tmp_path):
  rng = np.random.default_rng(0)
  for split, num in (("train", 128), ("t10k", 32)):
    labels = rng.integers(0, 10, num)
    images = np.zeros((num, 28, 28))
    images[:, 8:20] = 25 * labels[:, None, None]  # class = brightness of a band
    write_idx(tmp_path, split, images, labels)
  out = tmp_path / "out.npz"
  done = run_tool(f"--data={tmp_path}", f"--out={out}", "--epochs=1")
  assert done.returncode == 0, done.stderr
  assert "epoch 1/1" in done.stdout and "3x3 blur" in done.stdout
  params, reference = quality.load_classifier(out)
  source = open_source(DataConfig(source="idx", path=str(tmp_path)), ModelConfig(
    img_size=28, vae_stride=1, patch_size=4, vae_embed_dim=1, class_num=10))  # fmt: skip
  trained_on = np.stack([source[i]["image"] for i in range(128)])
  statistics = quality.statistics(quality.classify(params, trained_on)[1])
  np.testing.assert_allclose(reference.mean, statistics.mean, rtol=1e-3, atol=1e-5)


def test_tool_names_a_bad_destination(tmp_path):
  done = run_tool(f"--out={tmp_path / 'missing' / 'out.npz'}")
  assert done.returncode != 0
  assert "--out=" in done.stderr + done.stdout and "no directory" in done.stderr + done.stdout


def test_augmentation_flips_and_shifts():
  images = np.zeros((400, 28, 28, 1), np.uint8)
  images[:, 10, 5] = 255
  moved = train_classifier.augment(images, np.random.default_rng(0))
  assert moved.shape == images.shape and moved.dtype == np.uint8
  _, rows, columns, _ = np.nonzero(moved)
  assert len(rows) == 400  # every pixel is still there
  assert set(rows) == {8, 9, 10, 11, 12}
  assert set(columns) == {3, 4, 5, 6, 7} | {20, 21, 22, 23, 24}
