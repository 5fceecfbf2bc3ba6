"""Charts of `marche_jax.benchmark`, as PNG files, and pictures that compare images.

matplotlib is imported where a chart is drawn, and not before: it is an optional extra.
"""

from __future__ import annotations

import pathlib
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from marche_jax.benchmarking.reports import QualityReport, SpeedReport
from marche_jax.files import atomic_write
from marche_jax.images import GAP, grid

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

DPI = 150
INK, MUTED, FAINT = "#222222", "#6b6b6b", "#d9d9d9"


def require_matplotlib() -> types.ModuleType:
  """matplotlib, without a display.

  Raises:
    ImportError: where it is not installed; says how to install it.
  """
  try:
    import matplotlib
    import matplotlib.figure
  except ImportError as error:
    raise ImportError(
      'plots need matplotlib, an optional extra: pip install -e ".[plot]"'
    ) from error
  return matplotlib


MOST_NAMES = 14
"""Points of a plane that are all named; texts of more would cover each other."""


def plot_plane(path: pathlib.Path, report: QualityReport) -> None:
  """The plane of speed and quality: speed-up against Fréchet distance, one point per policy.

  Bars are 95% intervals, colours the share that the classifier recognises; the line is the Pareto
  front. Of more than `MOST_NAMES` policies, only baseline and front are named.

  Args:
    path: PNG file to write.
    report: with quality and `on_front`.

  Raises:
    ImportError: where matplotlib is missing.
    ValueError: where no quality was judged.
  """
  matplotlib = require_matplotlib()
  found = report["policies"]
  judged = [policy["quality"] for policy in found.values() if policy["quality"] is not None]
  if len(judged) < len(found):
    raise ValueError("the plane of speed and quality: expected images that can be judged")
  x = np.array([policy["speedup"] for policy in found.values()])
  y = np.array([quality["frechet"] for quality in judged])
  bounds = np.array([quality["frechet_interval"] for quality in judged])
  share = np.array([quality["recognised"] for quality in judged])
  front = np.array([policy["on_front"] for policy in found.values()])

  figure = matplotlib.figure.Figure(figsize=(8, 5.2), layout="constrained")
  axes = figure.subplots()
  _plain(axes)
  order = np.flatnonzero(front)[np.argsort(x[front], kind="stable")]
  axes.plot(x[order], y[order], color=FAINT, linewidth=5, zorder=1, solid_capstyle="round")
  axes.errorbar(
    x, y, yerr=[y - bounds[:, 0], bounds[:, 1] - y], fmt="none", ecolor=MUTED, elinewidth=1,
    capsize=2.5, zorder=2,
  )  # fmt: skip
  low, high = 100 * share.min(), 100 * share.max()
  if high - low < 1:
    low, high = low - 0.5, high + 0.5
  points = axes.scatter(
    x, y, c=100 * share, cmap="viridis", vmin=low, vmax=high, s=70,
    edgecolors=[INK if f else "white" for f in front], linewidths=1.4, zorder=3,
  )  # fmt: skip
  bar = figure.colorbar(points, ax=axes, pad=0.02, aspect=30)
  bar.set_label("recognised by the classifier, %", color=MUTED)
  bar.outline.set_visible(False)
  bar.ax.tick_params(colors=MUTED, length=0)
  axes.set_xlabel(f"speed-up over {report['baseline']} (to the right: faster)", color=MUTED)
  axes.set_ylabel("Fréchet distance to the training images (lower: better)", color=MUTED)
  axes.set_title(
    f"Speed and quality, {report['num_images']} images; thick line: Pareto front, bars: 95%",
    loc="left", fontsize=11, color=INK,
  )  # fmt: skip
  axes.margins(0.12)
  _label(figure, axes, x, y, bounds, named(report))
  _save(figure, path)


def named(report: QualityReport) -> dict[int, str]:
  """Numbers and names of the policies that `plot_plane` names: of many, baseline and front only."""
  found = report["policies"]
  return {
    number: name for number, (name, policy) in enumerate(found.items())
    if len(found) <= MOST_NAMES or name == report["baseline"] or policy["on_front"]
  }  # fmt: skip


PARTS = {"encoder": "#3b6fb6", "decoder": "#88b3dd", "head": "#e8a33d", "other": "#bdbdbd"}


def plot_speed(path: pathlib.Path, report: SpeedReport) -> None:
  """A bar per policy: seconds per image of encoder, decoder, head and other, and the speed-up.

  Args:
    path: PNG file to write.
    report: of the speeds.

  Raises:
    ImportError: where matplotlib is missing.
  """
  matplotlib = require_matplotlib()
  policies = report["policies"]
  figure = matplotlib.figure.Figure(figsize=(8, 1.5 + 0.42 * len(policies)), layout="constrained")
  axes = figure.subplots()
  _plain(axes)
  axes.grid(axis="y", visible=False)
  bars = range(len(policies))
  ends = np.zeros(len(policies))
  splits = [p["split_seconds"] for p in policies.values() if p["split_seconds"] is not None]
  if len(splits) == len(policies):
    for part, colour in PARTS.items():
      # What is left of the whole may be slightly negative: nothing to be seen.
      width = np.array([max(0.0, split[part]) for split in splits])
      axes.barh(bars, width, 0.66, left=ends, color=colour, edgecolor="white", label=part)
      ends += width
    figure.legend(loc="outside upper left", ncols=len(PARTS), frameon=False, labelcolor=INK,
                  fontsize=9)  # fmt: skip
  else:
    ends = np.array([p["seconds_per_image"]["typical"] for p in policies.values()])
    axes.barh(bars, ends, 0.66, color=PARTS["encoder"])
  for bar, end, p in zip(bars, ends, policies.values()):
    text = f"{p['seconds_per_image']['typical']:.3g} s, {p['speedup']:.2f}x"
    axes.annotate(text, (end, bar), (6, 0), textcoords="offset points", va="center", fontsize=9,
                  color=INK)  # fmt: skip
  axes.set_yticks(bars, list(policies), color=INK)
  axes.invert_yaxis()
  axes.set_xlim(0, 1.2 * ends.max())
  axes.set_xlabel("seconds per image" + (", estimated" if report["estimated"] else ""), color=MUTED)
  axes.set_title(
    f"{report['name']}, batch {report['batch_size']}, {report['dtype']}; speed-up over "
    f"{report['baseline']}",
    loc="left", fontsize=11, color=INK,
  )  # fmt: skip
  _save(figure, path)


def _plain(axes: Axes) -> None:
  """No frame; a faint grid behind."""
  for side in ("top", "right", "left", "bottom"):
    axes.spines[side].set_visible(False)
  axes.grid(color=FAINT, linewidth=0.6)
  axes.set_axisbelow(True)
  axes.tick_params(colors=MUTED, length=0)


def _label(
  figure: Figure,
  axes: Axes,
  x: np.ndarray,
  y: np.ndarray,
  bounds: np.ndarray,
  names: dict[int, str],
) -> None:
  """Names some points, each at the nearest place where its text covers no point, bar or text."""
  figure.draw_without_rendering()  # lays the axes out
  points, low, high = (
    axes.transData.transform(np.column_stack([x, of])) for of in (y, bounds[:, 0], bounds[:, 1])
  )
  frame = axes.get_window_extent()
  pixels = figure.dpi / 72
  taken = [(px - 6, py - 6, px + 6, py + 6) for px, py in points / pixels]
  taken += [(px - 1, bottom - 1, px + 1, top + 1)
            for (px, bottom), (_, top) in zip(low / pixels, high / pixels)]  # fmt: skip
  inside = tuple(v / pixels for v in (frame.x0, frame.y0, frame.x1, frame.y1))
  for number, name in names.items():
    px, py = points[number] / pixels
    text = figure.text(0.5, 0.5, name, fontsize=9)  # to measure it
    size = text.get_window_extent()
    width, height = size.width / pixels, size.height / pixels
    text.remove()
    left, bottom = place_label(px, py, width, height, taken, inside)
    taken.append((left, bottom, left + width, bottom + height))
    away = max(left - px, px - left - width, bottom - py, py - bottom - height) > 12
    axes.annotate(
      name, tuple(axes.transData.inverted().transform((px * pixels, py * pixels))),
      xytext=(left - px, bottom - py), textcoords="offset points", va="bottom", fontsize=9,
      arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6} if away else None,
      color=INK, zorder=4,
    )  # fmt: skip


Box = tuple[float, float, float, float]


def place_label(
  x: float, y: float, width: float, height: float, taken: Sequence[Box], frame: Box
) -> tuple[float, float]:
  """Lower left corner of a label near a point, within the frame and off the boxes taken.

  Places are tried around the point, at growing distances; where all cover something, the one that
  covers least is taken. All in one unit; boxes are (left, bottom, right, top).
  """
  best, least = (x, y), np.inf
  for gap in (8.0, 16.0, 26.0, 38.0, 52.0, 70.0):
    for across, up in ((1, 0), (1, 1), (-1, 0), (1, -1), (0, 1), (0, -1), (-1, 1), (-1, -1)):
      left = x + across * gap - (width if across < 0 else width / 2 if across == 0 else 0)
      bottom = y + up * gap - (height if up < 0 else height / 2 if up == 0 else 0)
      box = (left, bottom, left + width, bottom + height)
      outside = width * height - _overlap(box, frame)
      covered = outside + sum(_overlap(box, other) for other in taken)
      if covered < least - 1e-6:
        best, least = (left, bottom), covered
    if least <= 1e-6:
      break
  return best


def _overlap(a: Box, b: Box) -> float:
  width = min(a[2], b[2]) - max(a[0], b[0])
  height = min(a[3], b[3]) - max(a[1], b[1])
  return max(width, 0.0) * max(height, 0.0)


def _save(figure: Figure, path: pathlib.Path) -> None:
  with atomic_write(path) as aside:
    figure.savefig(aside, format="png", dpi=DPI, facecolor="white")


def compare_images(images: dict[str, np.ndarray], scale: int = 1) -> np.ndarray:
  """The same images under several policies: a row per policy, its name in front.

  Args:
    images: by policy, uint8 [num, H, W, channels], equal shapes, channels 1 or 3.
    scale: every pixel becomes scale x scale.

  Returns:
    uint8 [height, width, 3].
  """
  shape = next(iter(images.values())).shape
  rows = grid(np.concatenate(list(images.values())), columns=shape[0])
  rows = np.repeat(rows, 3, axis=2) if rows.shape[2] == 1 else rows
  rows = rows.repeat(scale, 0).repeat(scale, 1)
  font = ImageFont.load_default(size=max(10, min(18, shape[1] * scale // 4)))
  margin = 16 + round(max(font.getlength(name) for name in images))
  picture = Image.new("RGB", (margin + rows.shape[1], rows.shape[0]), "white")
  picture.paste(Image.fromarray(np.ascontiguousarray(rows)), (margin, 0))
  pen = ImageDraw.Draw(picture)
  pitch = (rows.shape[0] + GAP * scale) / len(images)
  for number, name in enumerate(images):
    middle = number * pitch + shape[1] * scale / 2
    pen.text((margin - 8, middle), name, fill="black", font=font, anchor="rm")
  return np.asarray(picture)
