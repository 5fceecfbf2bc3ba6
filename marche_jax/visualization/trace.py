"""`sample --trace`: pictures of what decoding did, iteration by iteration.

An image depends on (seed, number, label) alone, so the chosen ones are decoded once more, in
batches of their own, by a program that also returns a `recording.Trace`; the program that draws a
run's images does not know of it. Every iteration has a picture: the image as it fills in and, for
decoder and encoder, two maps of the token grid, with the buffer tokens in columns at its left:
  - what happened to each token: generated now, just generated, refreshed, cached, still masked;
  - the scores that chose the refresh (of the conditional half), the chosen tokens framed.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from marche_jax.config import SampleConfig
from marche_jax.decoding import state as state_lib
from marche_jax.decoding.activity import REFRESHED, UNSEEN, Activity
from marche_jax.decoding.generation import RunSettings
from marche_jax.decoding.pixels import to_images
from marche_jax.decoding.plan_runner import PlanRunner
from marche_jax.decoding.recording import Trace
from marche_jax.decoding.state import Inputs
from marche_jax.files import atomic_write
from marche_jax.models.mar import Params, inference_params, unpatchify
from marche_jax.planning.plan import DecodePlan
from marche_jax.planning.policies import make_plan
from marche_jax.planning.shapes import StackShape
from marche_jax.progress import image_bar
from marche_jax.visualization import frames
from marche_jax.weights.checkpoint import Model

PICTURES = 12
"""PNG files per image, at most, unless `--trace_every` asks for others."""

CHUNK = 8
"""Iterations per call of the compiled program."""

SIDE = 448
"""About as many pixels of the picture as the image is wide."""

FRAME_MS, LAST_FRAME_MS = 170, 3000

STACKS = ("encoder", "decoder")


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
  """What decoding one image did, in R iterations; N tokens by rank, buffer first."""

  image_id: int
  label: int
  position: np.ndarray  # int [S] by rank: where in the grid, in raster order, a token is
  tokens: np.ndarray  # float32 [R, S, C] after each iteration, zero where unknown
  activity: np.ndarray  # int32 [R, 2, N]: codes of `recording.Trace`, of encoder and decoder
  scores: np.ndarray  # float32 [R, 2, N]


def parse_images(values: Sequence[str] | None, num_images: int) -> list[int]:
  """The image numbers of `--trace_images`; default: the first three.

  Raises:
    ValueError: for one that is not the number of an image of the run; names it.
  """
  if values is None:
    return list(range(min(3, num_images)))
  if not values:
    raise ValueError("trace_images: found an empty list, expected numbers such as 0,1,2")
  for value in values:
    if not (value.strip().isdecimal() and int(value) < num_images):
      raise ValueError(
        f"trace_images: found {value!r}, expected numbers of images, 0 to {num_images - 1}"
      )
  return list(dict.fromkeys(map(int, values)))


def pictured(iterations: int, every: int | None = None) -> list[int]:
  """Iterations that get a PNG file, the first and the last included.

  Without `every` up to `PICTURES`, spread evenly, and not at one interval: a policy's own full
  iterations may have the same one, and nothing else would be seen.

  Raises:
    ValueError: for an interval below 1.
  """
  if every is None:
    return np.unique(np.linspace(0, iterations - 1, PICTURES).round().astype(int)).tolist()
  if every < 1:
    raise ValueError(f"trace_every={every}: expected at least 1")
  return sorted({*range(0, iterations, every), iterations - 1})


def record(
  params: Params,
  plan: DecodePlan,
  image_ids: Sequence[int],
  labels: np.ndarray,
  settings: RunSettings,
  progress: Callable[[float], object] = lambda share: None,
) -> list[Recording]:
  """Decodes a batch of images and records it.

  Args:
    params: of the model.
    plan: of the run.
    image_ids: numbers of the images [B].
    labels: their classes, int [B].
    settings: of the run, but for the size of the batch.
    progress: is told the share of the iterations that was just done.

  Raises:
    NonFiniteLatentsError: names the iteration.
  """
  ids = jnp.asarray(image_ids, jnp.uint32)
  keys = state_lib.image_keys(state_lib.run_key(settings.seed), ids)
  dtype = settings.dtype
  runner = PlanRunner(plan, dtype=dtype, head_dtype=dtype, chunk=CHUNK, trace=True)
  state = runner.start(keys)
  position = np.asarray(state.by_rank)
  parts: list[Trace] = []
  for chunk in runner.run(params, state, Inputs(labels, keys)):
    assert chunk.trace is not None
    shown = dataclasses.replace(chunk.trace, z=None)  # z is large, and not shown
    parts.append(jax.tree.map(np.asarray, shown))
    progress((chunk.end - chunk.start) / len(plan.rows))
  trace = jax.tree.map(lambda *x: np.concatenate(x), *parts)
  tokens = trace.sampled.cumsum(axis=0)  # every token is sampled once, and zero otherwise
  return [
    Recording(
      number,
      int(labels[b]),
      position[b],
      tokens[:, b],
      trace.activity[:, :, b],
      trace.scores[:, :, b],
    )
    for b, number in enumerate(image_ids)
  ]


def by_code(activity: np.ndarray) -> dict[str, int]:
  """How many tokens have which activity, by its name in small letters."""
  return {code.name.lower(): int((activity == code).sum()) for code in reversed(Activity)}


def counts(plan: DecodePlan, recording: Recording, k: int) -> dict[str, object]:
  """What `trace.json` says of an iteration: how many tokens were what, to either stack."""
  row = plan.rows[k]
  return {
    "iteration": k,
    "cfg": row.cfg,
    "diffusion_steps": plan.diffusion_steps(row),
    "masked": plan.config.seq_len - row.num_known - row.num_predict,
    **{stack: by_code(activity) for stack, activity in zip(STACKS, recording.activity[k])},
  }


def chosen_by(shape: StackShape) -> str:
  """How a stack of a step shape chooses what to recompute, in a few words."""
  if shape.active is None:
    return "all recomputed, nothing to choose"
  if shape.source == "none":
    return "forced tokens only, nothing to choose"
  what = "attention" if shape.score == "attention" else "change of values"
  how = {"scout": "scout pass", "carried": "iteration before", "lower": "all tokens"}
  return f"{what} at layer {shape.layer} ({how[shape.source]})"


def scale_of(shape: StackShape, scores: np.ndarray) -> str:
  """The ends of the colour scale in words."""
  low, high, what = scores.min(), scores.max(), ""
  if shape.score == "value":  # minus a cosine
    low, high, what = low + 1, high + 1, "1 - cosine: "
  return f"{what}{low:.2g} (light) to {high:.2g} (dark)"


def maps(
  plan: DecodePlan, recording: Recording, k: int, stack: int, cell: int
) -> list[frames.Panel]:
  """What iteration k did in a stack (of `STACKS`), and the scores by which it chose."""
  row, name, buffer = plan.rows[k], STACKS[stack], plan.config.buffer_size
  shape: StackShape = getattr(plan.step_shapes[row.shape_id], name)
  activity, scores = recording.activity[k, stack], recording.scores[k, stack]
  cells = frames.cell_ranks(recording.position, buffer)
  masked = np.arange(len(activity)) >= buffer + row.num_known + row.num_predict
  number = by_code(activity)
  seen = len(activity) - number["unseen"]
  now = f"{number['now']} now, " if name == "decoder" else ""
  status = frames.Panel(
    f"{name}: recomputes {seen - number['cached']} of {seen} tokens",
    f"{now}{number['previous']} just generated, {number['refreshed']} refreshed, "
    f"{number['cached']} cached",
    frames.token_map(
      frames.status_colours(activity, masked), cells, masked & (activity != UNSEEN),
      np.zeros_like(masked), cell,
    ),
  )  # fmt: skip
  compared = scores[frames.candidates(activity)]
  chooses = shape.active is not None and shape.source != "none" and compared.size > 0
  choice = frames.Panel(
    f"{name}: {chosen_by(shape)}",
    scale_of(shape, compared) if chooses else "",
    frames.token_map(
      frames.score_colours(scores, activity), cells, np.zeros_like(masked),
      chooses & (activity == REFRESHED), cell,
    ),
  )  # fmt: skip
  return [status, choice]


def frame(
  plan: DecodePlan, recording: Recording, k: int, image: np.ndarray, policy: str
) -> Image.Image:
  """The picture of an iteration.

  Args:
    plan: what was run.
    recording: of the image.
    k: iteration.
    image: after it, uint8 [H, W, 1 or 3].
    policy: its name.
  """
  row, side = plan.rows[k], plan.config.grid_size
  rank = np.argsort(recording.position).reshape(side, side)
  known = rank < row.num_known + row.num_predict
  now = known & (rank >= row.num_known)
  picture = frames.filling_in(image, known, now, max(1, round(SIDE / len(image))))
  cell = max(2, (len(picture) - frames.HEADING - frames.MARGIN) // (2 * side))
  return frames.compose(
    f"Image {recording.image_id}, class {recording.label}: iteration {k} (last: "
    f"{len(plan.rows) - 1}), policy {policy}",
    f"guidance {row.cfg:.2f}; {plan.diffusion_steps(row)} diffusion steps; {(~known).sum()} of "
    f"{known.size} tokens still masked; columns at the left of a map: buffer tokens",
    frames.Panel("the image so far", "framed: generated now", picture),
    [maps(plan, recording, k, stack, cell) for stack in (1, 0)],  # the decoder above
  )


def write(
  out: pathlib.Path, pictures: Sequence[Image.Image], shown: Sequence[int], image: np.ndarray
) -> None:
  """Writes pictures of iterations: some in `out` as iteration_000.png etc., all in `out`.gif.

  Args:
    out: directory, without an ending.
    pictures: of all iterations.
    shown: those in files of their own.
    image: the finished one, for the colours of the GIF.
  """
  out.mkdir(parents=True, exist_ok=True)
  for old in out.glob("iteration_[0-9][0-9][0-9]*.png"):  # of another run, it may have had others
    old.unlink()
  for k in shown:
    with atomic_write(out / f"iteration_{k:03d}.png") as aside:
      pictures[k].save(aside)
  colours = frames.palette(image)
  coded = [picture.quantize(palette=colours, dither=Image.Dither.NONE) for picture in pictures]
  duration = [FRAME_MS] * (len(coded) - 1) + [LAST_FRAME_MS]
  with atomic_write(out.with_suffix(".gif")) as aside:
    coded[0].save(aside, save_all=True, append_images=coded[1:], duration=duration, loop=0)


def run(
  model: Model,
  sample_config: SampleConfig,
  labels: np.ndarray,
  image_ids: Sequence[int],
  settings: RunSettings,
  out: pathlib.Path,
  every: int | None = None,
) -> None:
  """Decodes some images of a run once more and writes pictures of it, and `trace.json`.

  Args:
    model, sample_config: of the run.
    labels: of all of its images, int [num_images].
    image_ids: which ones, as `parse_images` gives them.
    settings: of the run; its batch size is the most images at a time.
    out: directory; exists.
    every: see `pictured`.
  """
  plan = make_plan(model.config, sample_config)
  shown = pictured(len(plan.rows), every)
  params = inference_params(model.params, settings.dtype)
  size = min(settings.batch_size, len(image_ids))
  images: list[dict[str, object]] = []
  with image_bar(len(image_ids), "tracing") as bar:
    for start in range(0, len(image_ids), size):
      ids = list(image_ids[start : start + size])
      padded = ids + ids[-1:] * (size - len(ids))  # one program for all batches

      def progress(share: float, count: int = len(ids)) -> None:
        bar.update(share * count)

      recordings = record(params, plan, padded, labels[padded], settings, progress)
      for recording in recordings[: len(ids)]:
        latents = unpatchify(jnp.asarray(recording.tokens), model.config)
        decoded = to_images(model, latents)
        pictures = [
          frame(plan, recording, k, decoded[k], sample_config.policy) for k in range(len(plan.rows))
        ]
        write(out / f"image_{recording.image_id:05d}", pictures, shown, decoded[-1])
        iterations = [counts(plan, recording, k) for k in range(len(plan.rows))]
        images.append(
          {"image": recording.image_id, "label": recording.label, "iterations": iterations}
        )
  with atomic_write(out / "trace.json") as aside:
    summary = {"policy": sample_config.policy, "seed": settings.seed, "images": images}
    aside.write_text(json.dumps(summary, indent=2) + "\n")
