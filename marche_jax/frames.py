"""Drawing what decoding did: maps of tokens, images half done, and a picture of both.

Pure functions of arrays, in numpy and Pillow; `trace.py` says what is drawn. N positions by rank
(buffer first, see `cache.py`), S image tokens; a map has [rows, columns] cells of `cell` pixels
each way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from marche_jax.sampler import CACHED, NOW, PREVIOUS, REFRESHED, UNSEEN

# Of each activity code: Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = np.zeros((5, 3), np.uint8)
COLOURS[NOW] = 213, 94, 0
COLOURS[PREVIOUS] = 240, 228, 66
COLOURS[REFRESHED] = 86, 180, 233
COLOURS[CACHED] = 40, 66, 110
COLOURS[UNSEEN] = 240, 240, 240
MASKED = np.asarray((200, 200, 200), np.uint8)
STRIPE = 140, 140, 140
HEAT = np.asarray([(250, 246, 252), (212, 185, 218), (206, 70, 150), (73, 0, 106)])  # light to dark
INK, FAINT, PAPER = (25, 25, 25), (100, 100, 100), (255, 255, 255)

LEGEND = (
  ("generated now", COLOURS[NOW], False),
  ("just generated", COLOURS[PREVIOUS], False),
  ("refreshed", COLOURS[REFRESHED], False),
  ("cached", COLOURS[CACHED], False),
  ("still masked, cached", MASKED, True),
  ("still masked, refreshed", COLOURS[REFRESHED], True),
  ("not seen", COLOURS[UNSEEN], False),
)

MARGIN, GAP, SWATCH = 16, 32, 18
TITLE, TEXT = 18, 13
HEADING = 2 * TEXT + 16  # of a panel: two lines


class Panel(NamedTuple):
  """A map and what stands above it."""

  heading: str
  detail: str
  pixels: np.ndarray  # uint8 [height, width, 3]


def cell_positions(place: np.ndarray, buffer: int) -> np.ndarray:
  """Position by rank (buffer first) of every cell of a map, int [rows, columns]; -1: no token.

  The buffer tokens fill columns of their own from the left, then come an empty one and the grid.

  Args:
    place: int [S], where in the grid, in raster order, the token of a rank is.
    buffer: number of buffer tokens.
  """
  side = math.isqrt(len(place))
  strip = np.full(-(-buffer // side) * side, -1)
  strip[:buffer] = np.arange(buffer)
  grid = np.empty(side * side, int)
  grid[place] = buffer + np.arange(len(place))
  empty = np.full((side, 1), -1)
  return np.concatenate([strip.reshape(-1, side).T, empty, grid.reshape(side, side)], axis=1)


def status_colours(activity: np.ndarray, masked: np.ndarray) -> np.ndarray:
  """Colours uint8 [N, 3] by activity codes [N]; tokens that are masked and cached are grey."""
  colours = COLOURS[activity]
  colours[masked & (activity == CACHED)] = MASKED
  return colours


def candidates(activity: np.ndarray) -> np.ndarray:
  """Bool [N]: tokens that scores are compared of. Forced ones are recomputed in any case."""
  return (activity == CACHED) | (activity == REFRESHED)


def score_colours(scores: np.ndarray, activity: np.ndarray) -> np.ndarray:
  """Colours uint8 [N, 3] of the candidates' scores, lowest to highest; others as their activity."""
  compared = scores[candidates(activity)]
  low, high = (compared.min(), compared.max()) if compared.size else (0.0, 0.0)
  level = np.clip((scores - low) / max(high - low, 1e-30), 0, 1) * (len(HEAT) - 1)
  ramp = np.stack([np.interp(level, range(len(HEAT)), channel) for channel in HEAT.T], axis=-1)
  return np.where(candidates(activity)[:, None], ramp, COLOURS[activity]).astype(np.uint8)


def enlarge(pixels: np.ndarray, scale: int) -> np.ndarray:
  """Every entry of the first two axes becomes scale x scale entries."""
  return pixels.repeat(scale, 0).repeat(scale, 1)


def mark(
  canvas: np.ndarray, cell: int, hatched: np.ndarray, framed: np.ndarray, colour: Any, gap: int = 0
) -> np.ndarray:
  """Hatches and frames cells of a picture.

  Args:
    canvas: uint8 [rows * cell, columns * cell, 3]; stays as it is.
    cell: pixels of a cell, each way.
    hatched, framed: bool [rows, columns].
    colour: of the frames.
    gap: pixels of white between cells.
  """
  canvas = canvas.copy()
  y, x = np.indices(canvas.shape[:2])
  nearest, farthest = np.minimum(y % cell, x % cell), np.maximum(y % cell, x % cell)
  width = max(1, cell // 10)
  border = (nearest < width) | (farthest >= cell - gap - width)
  canvas[enlarge(hatched, cell) & ((x + y) % 7 < 2)] = STRIPE
  canvas[enlarge(framed, cell) & border] = colour
  canvas[farthest >= cell - gap] = PAPER
  return canvas


def filling_in(image: np.ndarray, known: np.ndarray, now: np.ndarray, scale: int) -> np.ndarray:
  """The image so far: unknown tokens hatched grey, those generated now framed.

  Args:
    image: uint8 [H, W, 1 or 3].
    known: bool [side, side], whether the token there is known after the iteration.
    now: bool [side, side], whether it was generated in it.
    scale: pixels of the picture per pixel of the image.

  Returns:
    uint8 [H * scale, W * scale, 3].
  """
  token = len(image) // len(known)
  colour = np.broadcast_to(image, (*image.shape[:2], 3))
  colour = np.where(enlarge(known, token)[..., None], colour, MASKED)
  return mark(enlarge(colour, scale), token * scale, ~known, now, COLOURS[NOW])


def token_map(
  colours: np.ndarray, cells: np.ndarray, hatched: np.ndarray, framed: np.ndarray, cell: int
) -> np.ndarray:
  """A map of tokens, uint8 [rows * cell, columns * cell, 3].

  Args:
    colours: uint8 [N, 3].
    cells: of `cell_positions`.
    hatched, framed: bool [N].
    cell: pixels of a cell, each way.
  """
  there = cells >= 0
  pixels = enlarge(np.where(there[..., None], colours[cells], np.uint8(255)), cell)
  return mark(pixels, cell, there & hatched[cells], there & framed[cells], INK, gap=cell > 5)


def compose(title: str, detail: str, image: np.ndarray, panels: Sequence[Sequence[Panel]]) -> Any:
  """A picture: two lines of title, the image, rows of panels beside it, and the legend below.

  Args:
    title, detail: the two lines.
    image: uint8 [height, width, 3].
    panels: as many in every row.

  Returns:
    `PIL.Image.Image`, RGB.
  """
  large, small = ImageFont.load_default(TITLE), ImageFont.load_default(TEXT)
  texts = [text for row in panels for panel in row for text in panel[:2]]
  column = max(*(p.pixels.shape[1] for row in panels for p in row), *map(small.getlength, texts))
  column = math.ceil(column)
  line = max(HEADING + row[0].pixels.shape[0] for row in panels)
  top = 2 * MARGIN + TITLE + TEXT
  left = MARGIN + image.shape[1] + GAP
  legend = top + max(HEADING + image.shape[0], len(panels) * (line + MARGIN)) + MARGIN
  widths = [round(SWATCH + 6 + small.getlength(name) + 22) for name, _, _ in LEGEND]
  right = left + len(panels[0]) * (column + GAP) - GAP
  right = max(right, MARGIN + sum(widths), math.ceil(MARGIN + small.getlength(detail))) + MARGIN
  canvas = Image.new("RGB", (right, legend + SWATCH + MARGIN), PAPER)
  draw = ImageDraw.Draw(canvas)

  draw.text((MARGIN, MARGIN // 2), title, INK, large)
  draw.text((MARGIN, MARGIN // 2 + TITLE + 8), detail, INK, small)
  canvas.paste(Image.fromarray(image), (MARGIN, top + HEADING))
  for i, row in enumerate(panels):
    for j, panel in enumerate(row):
      x, y = left + j * (column + GAP), top + i * (line + MARGIN)
      draw.text((x, y + 6), panel.heading, INK, small)
      draw.text((x, y + TEXT + 10), panel.detail, FAINT, small)
      canvas.paste(Image.fromarray(panel.pixels), (x, y + HEADING))
  x = MARGIN
  for (name, colour, hatched), width in zip(LEGEND, widths):
    swatch = np.broadcast_to(np.asarray(colour, np.uint8), (SWATCH, SWATCH, 3))
    one = np.ones((1, 1), bool)
    swatch = mark(swatch, SWATCH, one & hatched, one, FAINT)
    canvas.paste(Image.fromarray(swatch), (x, legend))
    draw.text((x + SWATCH + 6, legend + 1), name, INK, small)
    x += width
  return canvas
