"""Drawing what decoding did: maps of tokens, images half done, and a picture of both.

Pure functions of arrays, in numpy and Pillow; `trace.py` says what is drawn. N tokens by rank
(buffer first, see `cache.py`), S of them of the image; a map has [rows, columns] cells of `cell`
pixels each way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

from marche_jax.decoding.activity import CACHED, NOW, PREVIOUS, REFRESHED, UNSEEN

# Of each activity code: Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = np.zeros((5, 3), np.uint8)
COLOURS[NOW] = 213, 94, 0
COLOURS[PREVIOUS] = 240, 228, 66
COLOURS[REFRESHED] = 86, 180, 233
COLOURS[CACHED] = 40, 66, 110
COLOURS[UNSEEN] = 240, 240, 240
MASKED = np.asarray((200, 200, 200), np.uint8)
STRIPE = 140, 140, 140
HEAT = np.asarray([(230, 220, 238), (201, 160, 208), (190, 60, 140), (60, 0, 95)])  # light to dark
INK, FAINT, PAPER = (25, 25, 25), (100, 100, 100), (255, 255, 255)

LEGEND = (  # words, colour, hatched, framed
  ("generated now", COLOURS[NOW], False, False),
  ("just generated", COLOURS[PREVIOUS], False, False),
  ("refreshed", COLOURS[REFRESHED], False, False),
  ("cached", COLOURS[CACHED], False, False),
  ("still masked, cached", MASKED, True, False),
  ("still masked, refreshed", COLOURS[REFRESHED], True, False),
  ("chosen by score", HEAT[2], False, True),
  ("not seen, or no score", COLOURS[UNSEEN], False, False),
)

MARGIN, GAP, SWATCH = 16, 28, 18
TITLE, TEXT = 18, 13
HEADING = 2 * TEXT + 14  # of a panel: two lines
COLUMN = 310  # least width for a map, enough for its lines: all frames have one size


class Panel(NamedTuple):
  """A map and what stands above it."""

  heading: str
  detail: str
  pixels: np.ndarray  # uint8 [height, width, 3]


def cell_ranks(position: np.ndarray, buffer: int) -> np.ndarray:
  """Rank (buffer first) of the token of every cell of a map, int [rows, columns]; -1: no token.

  The buffer tokens fill columns of their own from the left, then come an empty one and the grid.

  Args:
    position: int [S] by rank, where in the grid, in raster order, a token is.
    buffer: number of buffer tokens.
  """
  side = math.isqrt(len(position))
  columns = -(-buffer // side)
  strip = np.full((columns, side), -1)
  for column, part in zip(strip, np.array_split(np.arange(buffer), columns)):
    column[: len(part)] = part
  grid = np.empty(side * side, int)
  grid[position] = buffer + np.arange(len(position))
  empty = np.full((side, 1), -1)
  return np.concatenate([strip.T, empty, grid.reshape(side, side)], axis=1)


def status_colours(activity: np.ndarray, masked: np.ndarray) -> np.ndarray:
  """Colours uint8 [N, 3] by activity codes [N]; tokens that are masked and cached are grey."""
  colours = COLOURS[activity]
  colours[masked & (activity == CACHED)] = MASKED
  return colours


def candidates(activity: np.ndarray) -> np.ndarray:
  """Bool [N]: tokens that scores are compared of. Forced ones are recomputed in any case."""
  return (activity == CACHED) | (activity == REFRESHED)


def score_colours(scores: np.ndarray, activity: np.ndarray) -> np.ndarray:
  """Colours uint8 [N, 3] of the candidates' scores, others by their activity.

  Between the lowest and the highest score by the square root, as few scores are high; where all are
  the same, as if there were none.
  """
  compared = candidates(activity)
  colours = np.where(compared[:, None], COLOURS[UNSEEN], COLOURS[activity])
  found = scores[compared]
  if found.size and found.max() > found.min():
    level = np.sqrt((found - found.min()) / (found.max() - found.min()))
    stops = np.linspace(0, 1, len(HEAT))
    colours[compared] = np.stack([np.interp(level, stops, channel) for channel in HEAT.T], axis=-1)
  return colours


def enlarge(pixels: np.ndarray, scale: int) -> np.ndarray:
  """Every entry of the first two axes becomes scale x scale entries."""
  return pixels.repeat(scale, 0).repeat(scale, 1)


def mark(
  canvas: np.ndarray,
  cell: int,
  hatched: np.ndarray,
  framed: np.ndarray,
  colour: ArrayLike,
  gap: int = 0,
) -> np.ndarray:
  """Hatches and frames cells of a picture.

  Args:
    canvas: uint8 [rows * cell, columns * cell, 3]; stays as it is.
    cell: pixels of a cell, each way.
    hatched, framed: bool [rows, columns].
    colour: of the frames; inside there is a white one, to be seen on dark cells.
    gap: pixels of white between cells.
  """
  canvas = canvas.copy()
  y, x = np.indices(canvas.shape[:2])
  nearest, farthest = np.minimum(y % cell, x % cell), np.maximum(y % cell, x % cell)
  width = max(1, cell // 14)
  canvas[enlarge(hatched, cell) & ((x + y) % 7 < 2)] = STRIPE
  for inset, ink in ((2 * width, PAPER), (width, colour)):
    border = (nearest < inset) | (farthest >= cell - gap - inset)
    canvas[enlarge(framed, cell) & border] = ink
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
    cells: of `cell_ranks`.
    hatched, framed: bool [N].
    cell: pixels of a cell, each way.
  """
  there = cells >= 0
  pixels = enlarge(np.where(there[..., None], colours[cells], np.uint8(255)), cell)
  return mark(pixels, cell, there & hatched[cells], there & framed[cells], INK, gap=cell > 5)


def compose(
  title: str, detail: str, image: Panel, panels: Sequence[Sequence[Panel]]
) -> Image.Image:
  """A picture: two lines of title, the image, rows of panels beside it, and the legend below.

  Its size depends on those of the image and the maps alone.

  Args:
    title, detail: the two lines.
    image: at the left.
    panels: maps, as many in every row.

  Returns:
    RGB.
  """
  large, small = ImageFont.load_default(TITLE), ImageFont.load_default(TEXT)
  tall = [max(panel.pixels.shape[0] for panel in row) for row in panels]
  column = max(COLUMN, *(panel.pixels.shape[1] for row in panels for panel in row))
  top = MARGIN + TITLE + TEXT + 16
  left = MARGIN + max(COLUMN, image.pixels.shape[1]) + GAP
  legend = top + max(HEADING + image.pixels.shape[0], sum(tall) + len(tall) * (HEADING + MARGIN))
  legend += MARGIN
  widths = [round(SWATCH + 6 + small.getlength(name) + 18) for name, *_ in LEGEND]
  right = max(left + len(panels[0]) * (column + GAP) - GAP, MARGIN + sum(widths)) + MARGIN
  canvas = Image.new("RGB", (right, legend + SWATCH + MARGIN), PAPER)
  draw = ImageDraw.Draw(canvas)

  def paste(panel: Panel, x: int, y: int) -> None:
    draw.text((x, y), panel.heading, INK, small)
    draw.text((x, y + TEXT + 4), panel.detail, FAINT, small)
    canvas.paste(Image.fromarray(panel.pixels), (x, y + HEADING))

  draw.text((MARGIN, MARGIN // 2), title, INK, large)
  draw.text((MARGIN, MARGIN // 2 + TITLE + 8), detail, INK, small)
  paste(image, MARGIN, top)
  y = top
  for row, height in zip(panels, tall):
    for number, panel in enumerate(row):
      paste(panel, left + number * (column + GAP), y)
    y += HEADING + height + MARGIN
  x, one = MARGIN, np.ones((1, 1), bool)
  for (name, colour, hatched, framed), width in zip(LEGEND, widths):
    swatch = np.broadcast_to(np.asarray(colour, np.uint8), (SWATCH, SWATCH, 3))
    swatch = mark(swatch, SWATCH, one & hatched, one & framed, INK)
    canvas.paste(Image.fromarray(swatch), (x, legend))
    draw.text((x + SWATCH + 6, legend + 1), name, INK, small)
    x += width
  return canvas


def palette(image: np.ndarray) -> Image.Image:
  """Colours for a GIF of pictures: those of maps and text as they are, the rest for the image.

  Args:
    image: the finished one, uint8 [H, W, 1 or 3].

  Returns:
    An image for `PIL.Image.Image.quantize(palette=...)`.
  """
  grey = np.linspace(0, 255, 16)[:, None].repeat(3, 1)
  levels = np.linspace(0, len(HEAT) - 1, 32)
  heat = np.stack([np.interp(levels, range(len(HEAT)), channel) for channel in HEAT.T], axis=-1)
  fixed = np.concatenate([COLOURS, [MASKED, STRIPE, INK, FAINT], grey, heat]).astype(np.uint8)
  colour = np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))
  free = 256 - len(fixed)
  own = Image.fromarray(colour).quantize(free, Image.Quantize.MEDIANCUT).getpalette() or []
  result = Image.new("P", (1, 1))
  result.putpalette([*fixed.ravel().tolist(), *own[: 3 * free]])
  return result
