"""The library call, labels in, latents out; and the batches of a run of many images."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import ArrayLike

from marche_jax.config import SampleConfig
from marche_jax.decoding import state as state_lib
from marche_jax.decoding.given import (
  Known,
  check_array,
  check_labels,
  check_pair,
  plan_around,
)
from marche_jax.decoding.pixels import to_images
from marche_jax.decoding.plan_runner import PlanRunner
from marche_jax.decoding.state import Inputs, Noise
from marche_jax.models.mar import unpatchify
from marche_jax.planning.policies import check_sample
from marche_jax.weights.checkpoint import Model


def generate(
  model: Model,
  labels: ArrayLike,
  key: jax.Array,
  sample_config: SampleConfig | None = None,
  *,
  image_ids: ArrayLike | None = None,
  order: ArrayLike | None = None,
  noise: tuple[ArrayLike, ArrayLike] | None = None,
  known: Known | None = None,
) -> jax.Array:
  """Samples one image per label.

  Image i depends on (key, image_ids[i], labels[i]) alone, not on the batch it is in. This plans on
  the host and compiles what it runs: it cannot be jitted itself, `sampler.decode` can.

  Args:
    model: of `marche_jax.load_model`.
    labels: int [B], in [0, class_num).
    key: of the run, `jax.random.key(seed)` of jax's default generator, threefry2x32.
    sample_config: default: the model's own, else `SampleConfig()`. As on the command line, none of
      its fields may go unread by its policy: none, that is, whose value is neither the default of
      `SampleConfig` nor the model's own.
    image_ids: int [B], the images' numbers; default 0 to B - 1.
    order: int [B, S], a permutation of the tokens per image, revealed from its end; default random.
    noise: replaces drawn noise: (initial [num_iter, B, S, C], of the diffusion steps
      [num_iter, T, B, S, C]), index 0 of T being the first executed diffusion step; num_iter as in
      the plan (GtR takes fewer), T the largest number of diffusion steps in it.
    known: (tokens [B, S, C], mask [B, S], 1 where unknown): tokens to keep, for inpainting; the
      same number of them in every image, and with GtR's order, where none is given, of each colour
      of the checkerboard. They come last in the order. What stands at unknown positions is not
      read. num_iter is at most the number of unknown tokens then.

  Returns:
    Scaled latents, float32 [B, channels, h, w]; `to_images` turns them into pixels.

  Raises:
    ValueError: for an argument of the wrong shape or range; names it. Where there is too little
      memory; says how many images fit.
    NonFiniteLatentsError: (a ValueError) names the iteration.
  """
  config = model.config
  if sample_config is None:
    sample_config = model.sample_config or SampleConfig()
  elif not isinstance(sample_config, SampleConfig):
    raise ValueError(
      f"sample_config: found {type(sample_config).__name__}, expected marche_jax.SampleConfig"
    )
  else:
    check_sample(sample_config, model.sample_config)
  labels = check_labels(labels, config)
  batch = len(labels)
  state_lib.check_key(key)
  ids = np.arange(batch)
  if image_ids is not None:
    ids = check_array("image_ids", image_ids, (batch,), "iu")
  if ((ids < 0) | (ids >= 2**32)).any():
    raise ValueError(f"image_ids: found {ids.min()} to {ids.max()}, expected 0 to 2**32 - 1")
  keys = state_lib.image_keys(key, jnp.asarray(ids, jnp.uint32))
  plan = plan_around(config, sample_config, batch, known, ordered=order is not None)
  given = None
  if noise is not None:
    initial, drawn = check_pair("noise", noise, "initial and of the diffusion steps")
    longest = max(len(process.timesteps) for process in plan.processes)
    shape = (len(plan.rows), batch, config.seq_len, config.token_dim)
    given = Noise(
      check_array("noise[0]", initial, shape, "f"),
      check_array("noise[1]", drawn, (shape[0], longest, *shape[1:]), "f"),
    )
  runner = PlanRunner(plan)
  runner.check_memory(model.params, batch, given)
  state = runner.start(keys, order, known)
  return unpatchify(runner(model.params, state, Inputs(labels, keys, given)), config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
  """What the images of a run share, beside the model and how it is sampled.

  Raises:
    ValueError: for a value out of range; names it.
  """

  batch_size: int  # images decoded together
  seed: int  # image i depends on (seed, i, label) alone
  dtype: DTypeLike = jnp.float32  # of activations and matrix products

  def __post_init__(self) -> None:
    if self.batch_size < 1:
      raise ValueError(f"batch_size={self.batch_size}: expected at least 1")
    if not 0 <= self.seed < 2**32:
      raise ValueError(f"seed={self.seed}: expected an integer in [0, 2**32)")


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
  """Images drawn together."""

  images: np.ndarray  # uint8 [B, H, W, channels]
  latents: np.ndarray  # float32 [B, channels, h, w]
  seconds: float  # that decoding the latents took


def draw_batch(
  model: Model,
  runner: PlanRunner,
  labels: np.ndarray,
  start: int,
  settings: RunSettings,
  progress: Callable[[float], object] = lambda images: None,
) -> Batch:
  """Draws images start, start + 1, ... of a run, one per label.

  Args:
    model: with the parameters where the runner reads them, of its dtype.
    runner: of the plan.
    labels: int32 [B]; fewer than a batch has are padded by repeating the last.
    start: number of the first image.
    settings: of the run.
    progress: is told after every call of the program how many images' worth was just done.

  Raises:
    NonFiniteLatentsError: names the iteration and the images.
  """
  size = settings.batch_size
  padded = np.pad(labels, (0, size - len(labels)), mode="edge")
  ids = jnp.arange(start, start + size, dtype=jnp.uint32)
  keys = state_lib.image_keys(state_lib.run_key(settings.seed), ids)
  state = jax.block_until_ready(runner.start(keys))
  clock = time.perf_counter()
  for chunk in runner.run(model.params, state, Inputs(padded, keys)):
    state = chunk.state
    progress(len(labels) * (chunk.end - chunk.start) / len(runner.plan.rows))
  tokens = jax.block_until_ready(state.tokens)
  seconds = time.perf_counter() - clock
  latents = unpatchify(tokens, model.config)
  images = to_images(model, latents, runner.mesh)
  return Batch(images[: len(labels)], np.asarray(latents)[: len(labels)], seconds)
