"""`python -m marche_jax.evaluate`: what it prints and refuses."""

from __future__ import annotations

import json
import math
import pathlib
import re
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest

from marche_jax import evaluate
from marche_jax.evaluation import quality


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, "-m", "marche_jax.evaluate", *arguments],
    capture_output=True, text=True, timeout=120,
  )  # fmt: skip


def test_report_is_printed_and_saved(tmp_path: pathlib.Path) -> None:
  images = np.random.default_rng(0).integers(0, 256, (40, 28, 28, 1), np.uint8)
  labels = np.arange(40, dtype=np.int32) % 9
  np.savez(tmp_path / "samples.npz", images, labels)
  done = command(f"--samples={tmp_path / 'samples.npz'}", f"--out={tmp_path / 'report.json'}")
  assert done.returncode == 0, done.stderr
  report = json.loads((tmp_path / "report.json").read_text())
  assert report["num_images"] == 40 and report["recognised_per_class"][9] is None
  assert report["recognised"] == quality.evaluate_samples(images, labels)["recognised"]
  assert done.stdout == evaluate.table(report) + "\n"
  assert "40 samples span no Gaussian of 128 features" in done.stderr


def test_what_is_no_sample_file(tmp_path: pathlib.Path) -> None:
  (tmp_path / "text.npz").write_text("not an archive")
  np.savez(tmp_path / "other.npz", images=np.zeros(3))
  with pytest.raises(ValueError, match=r"text\.npz: expected a samples\.npz"):
    evaluate.read_samples(tmp_path / "text.npz")
  np.save(tmp_path / "array.npy", np.zeros(3))
  with pytest.raises(ValueError, match=r"array\.npy: expected a samples\.npz"):
    evaluate.read_samples(tmp_path / "array.npy")
  with pytest.raises(ValueError, match="no array arr_0"):
    evaluate.read_samples(tmp_path / "other.npz")
  with pytest.raises(ValueError, match=rf"--samples={tmp_path}: expected a samples.* directory"):
    evaluate.read_samples(tmp_path)
  done = command(f"--samples={tmp_path / 'absent.npz'}")
  assert done.returncode == 1 and "absent.npz" in done.stderr and "Traceback" not in done.stderr


def write_array(path: pathlib.Path, header: dict[str, object], size: int) -> None:
  """An archive whose arr_0 says what `header` does and holds that many zeros, deflated."""
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    with archive.open("arr_0.npy", "w", force_zip64=True) as file:
      np.lib.format.write_array_header_1_0(file, header)
      for start in range(0, size, 1 << 20):
        file.write(bytes(min(1 << 20, size - start)))
    with archive.open("arr_1.npy", "w") as file:
      np.lib.format.write_array(file, np.zeros(header["shape"][0], np.int32))


@pytest.mark.parametrize(
  ("shape", "descr", "size", "message"),
  [
    ((3, 32, 32, 1), "|u1", None, r"arr_0: expected uint8 .*, found uint8 \[3, 32, 32, 1\]"),
    ((3, 28, 28), "|u1", None, "arr_0: expected uint8"),
    ((3, 28, 28, 1), "<f4", None, r"arr_0: expected uint8 .*, found float32"),
    ((3, 28, 28, 1), "|u1", 3 * 784 - 1, r"arr_0: uint8 \[3, 28, 28, 1\] in 2351 bytes"),
    ((3, 28, 28, 1), "|u1", 1 << 22, "in 4194304 bytes"),
    ((2, 1 << 20, 1 << 20, 1), "|u1", 100, "in 100 bytes"),
    ((1 << 12, 1 << 7, 1 << 6, 1), "|u1", None, "found uint8"),  # 32 MB of 33 kB
    ((3, 28, 28, 1), "|O", None, "arr_0: object"),
  ],
)
def test_what_is_wrong_is_told_before_an_array_is_expanded(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
  shape: tuple[int, ...], descr: str, size: int | None, message: str,
) -> None:  # fmt: skip
  path = tmp_path / "samples.npz"
  size = math.prod(shape) * np.dtype(descr).itemsize if size is None else size
  write_array(path, {"descr": descr, "fortran_order": False, "shape": shape}, size)
  monkeypatch.setattr(np, "load", None)
  with pytest.raises(ValueError, match=rf"--samples={path}: expected a samples\.npz .*{message}"):
    evaluate.read_samples(path)


def test_a_small_file_of_many_images_and_labels_of_other_images(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  path = tmp_path / "samples.npz"
  images = np.zeros((4, 28, 28, 1), np.uint8)
  for labels, found in ((np.zeros(3, int), "int64 [3]"), (np.zeros(4), "float64 [4]")):
    np.savez(path, images, labels)
    with pytest.raises(ValueError, match=re.escape(f"integers [4], found {found}")):
      evaluate.read_samples(path)
  np.savez_compressed(path, images, np.zeros(4, np.int64), latents=np.zeros(1000))
  assert [a.shape for a in evaluate.read_samples(path)] == [images.shape, (4,)]
  monkeypatch.setattr(evaluate, "MAX_IMAGES", 3)
  with pytest.raises(ValueError, match="expected at most 3 images, found 4"):
    evaluate.read_samples(path)


def test_a_damaged_archive(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "samples.npz"
  np.savez(path, np.zeros((4, 28, 28, 1), np.uint8), np.zeros(4, np.int32))
  content = bytearray(path.read_bytes())
  content[1000] ^= 1
  path.write_bytes(content)
  with pytest.raises(ValueError, match=r"expected a samples\.npz .*CRC"):
    evaluate.read_samples(path)


@pytest.mark.parametrize("text", ["{'descr': '|u1', 'shape': (1, 28, 28, 1 ", "{'descr': |u1}"])
def test_a_header_that_is_not_python(tmp_path: pathlib.Path, text: str) -> None:
  path = tmp_path / "samples.npz"
  header = text.encode().ljust(117) + b"\n"
  with zipfile.ZipFile(path, "w") as archive:
    for name in ("arr_0", "arr_1"):
      magic = np.lib.format.magic(1, 0) + len(header).to_bytes(2, "little")
      archive.writestr(f"{name}.npy", magic + header)
  with pytest.raises(ValueError, match=r"expected a samples\.npz of"):
    evaluate.read_samples(path)


def test_out_is_looked_at_before_anything_is_measured(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  path = tmp_path / "samples.npz"
  np.savez(path, np.zeros((4, 28, 28, 1), np.uint8), np.zeros(4, np.int32))
  monkeypatch.setattr(quality, "evaluate_samples", None)

  def main(**values: str | None) -> None:
    monkeypatch.setattr(evaluate.flags, "FLAGS", types.SimpleNamespace(**values))
    evaluate.main()

  with pytest.raises(ValueError, match=rf"--out={tmp_path}: expected a file, found a directory"):
    main(samples=str(path), out=str(tmp_path))
  with pytest.raises(ValueError, match=rf"--out={path}/x\.json: .*directory"):
    main(samples=str(path), out=f"{path}/x.json")
  with pytest.raises(ValueError, match="--out: expected a path"):
    main(samples=str(path), out="")
  with pytest.raises(ValueError, match=r"expected a samples\.npz"):  # and leaves no directory
    main(samples=str(tmp_path / "absent"), out=str(tmp_path / "new" / "report.json"))
  assert [p.name for p in tmp_path.iterdir()] == ["samples.npz"]


def test_few_samples_are_warned_of() -> None:
  assert evaluate.too_few(5000) is None
  assert "says nothing" in str(evaluate.too_few(128))
  assert "129 samples is biased upwards" in str(evaluate.too_few(129))
  assert "4,999 samples is biased upwards" in str(evaluate.too_few(4999))
