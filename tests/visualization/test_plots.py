"""Charts and pictures of comparisons."""

from __future__ import annotations

import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

from marche_jax.images import GAP
from marche_jax.visualization import plots


def quality_report(**changes: object) -> dict:
  policies = {
    name: {
      "speedup": gain,
      "quality": {"frechet": distance, "frechet_interval": [distance - 1, distance + 2],
                  "recognised": 0.9 + gain / 100},
      "on_front": front,
    }
    for name, gain, distance, front in (
      ("full", 1.0, 10.0, True), ("same", 1.0, 10.0, True), ("a+long+name:cfg=2", 1.01, 10.0, True)
    )
  }  # fmt: skip
  return {"policies": policies, "baseline": "full", "num_images": 10, **changes}


def test_plane(tmp_path: pathlib.Path) -> None:
  plots.plot_plane(tmp_path / "plane.png", quality_report())
  with Image.open(tmp_path / "plane.png") as image:
    assert image.format == "PNG" and min(image.size) > 500
  assert [p.name for p in tmp_path.iterdir()] == ["plane.png"]  # written aside, and renamed


def test_of_many_policies_front_and_baseline_are_named(tmp_path: pathlib.Path) -> None:
  report = quality_report()
  assert list(plots.named(report).values()) == ["full", "same", "a+long+name:cfg=2"]
  some = report["policies"]["same"]
  for number in range(plots.MOST_NAMES):
    report["policies"][f"p{number}"] = some | {"speedup": 0.5, "on_front": False}
  report["policies"]["last"] = some | {"speedup": 2.0}
  report["policies"]["full"]["on_front"] = False
  names = plots.named(report)
  assert names == {0: "full", 1: "same", 2: "a+long+name:cfg=2", plots.MOST_NAMES + 3: "last"}
  plots.plot_plane(tmp_path / "plane.png", report)


def test_a_plane_needs_judged_images(tmp_path: pathlib.Path) -> None:
  report = quality_report()
  report["policies"]["full"]["quality"] = None
  with pytest.raises(ValueError, match="expected images that can be judged"):
    plots.plot_plane(tmp_path / "plane.png", report)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  with pytest.raises(ImportError, match=r'pip install -e "\.\[plot\]"'):
    plots.require_matplotlib()


def test_labels_cover_nothing() -> None:
  """Five labels of points that lie nearly on each other."""
  frame = (0.0, 0.0, 300.0, 200.0)
  points = [(150.0 + i, 100.0 - i) for i in range(5)]
  taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
  for x, y in points:
    left, bottom = plots.place_label(x, y, 40.0, 12.0, taken, frame)
    box = (left, bottom, left + 40, bottom + 12)
    assert all(box[2] <= o[0] or o[2] <= box[0] or box[3] <= o[1] or o[3] <= box[1] for o in taken)
    assert frame[0] <= box[0] and box[2] <= frame[2] and frame[1] <= box[1] and box[3] <= frame[3]
    taken.append(box)


def test_a_label_stays_within_the_frame() -> None:
  frame = (0.0, 0.0, 100.0, 100.0)
  left, _ = plots.place_label(95.0, 50.0, 40.0, 12.0, [], frame)
  assert left + 40 <= 95


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_a_policy_are_a_row_behind_its_name(channels: int) -> None:
  rng = np.random.default_rng(0)
  images = {
    name: rng.integers(0, 256, (4, 8, 8, channels), dtype=np.uint8) for name in ("full", "marche")
  }
  picture = plots.compare_images(images, scale=3)
  width = 3 * (4 * 8 + 3 * GAP)
  assert picture.shape[0] == 3 * (2 * 8 + GAP) and picture.shape[2] == 3
  margin = picture.shape[1] - width
  for row, rows in enumerate(images.values()):
    for column, image in enumerate(rows):
      y, x = (3 * n * (8 + GAP) for n in (row, column))
      shown = picture[y : y + 24 : 3, margin + x : margin + x + 24 : 3]
      np.testing.assert_array_equal(shown, np.broadcast_to(image, (8, 8, 3)))
    name = picture[row * 30 : row * 30 + 24, :margin]
    assert name.min() < 100 and name[:, 0].min() == 255  # something is written, and not cut off
