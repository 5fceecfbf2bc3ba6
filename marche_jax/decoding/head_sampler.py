"""Sampling tokens from the diffusion head: the loop that dominates decoding at small batches.

What does not depend on the token is computed once (timestep embeddings), what does not depend on
the diffusion step is computed once per token (the projection of z). The modulations, two thirds of
the head's weights, depend on timestep and z but not on x_t: those of all blocks are one matrix
product, taken for several diffusion steps at a time, since with few tokens reading the weights is
what costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from marche_jax.config import ModelConfig
from marche_jax.decoding.state import Array
from marche_jax.models import diffusion
from marche_jax.models.head import Head, modulate, normalize
from marche_jax.models.params import Params
from marche_jax.planning.head_schedule import CachedSteps

MODULATION_ROWS = 256
"""Rows (diffusion steps times tokens) up to which modulations are taken as one product.

More rows make no product cheaper per row and need more memory, 4 (3d + 2) w bytes each.
"""

Layer = dict[str, jax.Array]
"""Parameters of a layer: kernel and bias, or scale and bias."""

LoopState = tuple[jax.Array, jax.Array]
"""x_t, and x_0 as predicted in the diffusion step before, each float32 [n, C]."""


@flax.struct.dataclass
class HeadWeights:
  """The head's weights as the sampling loop reads them; d blocks, width w."""

  time: jax.Array  # [processes, T, w] float32: embedding of each one's timesteps
  modulation: Layer  # kernel [w, (3d + 2) w], bias: all blocks', then the final's
  blocks: tuple[dict[str, Layer], ...]  # norm, fc1, fc2 of each block
  cond_embed: Layer
  input_proj: Layer
  final_linear: Layer  # float32


@dataclasses.dataclass(frozen=True, eq=False)
class DiffusionRun:
  """Which diffusion process is run, and how."""

  process: Array  # int []: its number in the plan
  coefficients: diffusion.Coefficients  # of that process, each [T]
  num_steps: int | jax.Array  # diffusion steps that count; static or traced
  fewest: int = 1  # diffusion steps: a traced number is not below it, and no more share a product
  solver: str = "ddpm"  # ancestral sampling, or 'dpm++', see `diffusion.dpm_step`
  cached: bool = False  # most steps reuse what the head computed before; their number is static


@dataclasses.dataclass(frozen=True, eq=False)
class TokenNoise:
  """The noise of the tokens that are drawn."""

  initial: jax.Array  # x_T, float32 [n, C]
  # Of a diffusion step: (index of the executed one from 0, its timestep) -> float32 [n, C].
  of_step: Callable[[jax.Array, jax.Array], jax.Array]
  temperature: jax.Array  # factor on what a diffusion step adds, float32 []


@dataclasses.dataclass(frozen=True, eq=False)
class Guidance:
  """How the conditional and the unconditional half make one."""

  halves: int  # 2 with guidance, 1 without
  scale: jax.Array  # float32 []

  def combine(self, out: jax.Array) -> jax.Array:
    """Head output [halves * n, 2C], the conditional half first -> guided [n, 2C]."""
    if self.halves == 1:
      return out
    rows = out.shape[0] // 2
    return diffusion.guide(out[:rows], out[rows:], self.scale)


def prepare(params: Params, config: ModelConfig, timesteps: Array, dtype: DTypeLike) -> HeadWeights:
  """Lays the head's parameters out for sampling.

  Args:
    params: of `Head`.
    config: sizes.
    timesteps: of the plan's diffusion processes, int [processes, T].
    dtype: of the matrix products' operands, but for the last layer's.
  """
  blocks = params["blocks"]
  depth, width = config.diffloss_d, config.diffloss_w
  kernel = blocks["modulation"]["kernel"].transpose(1, 0, 2).reshape(width, depth * 3 * width)
  final = params["final_modulation"]
  cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
  time = Head(config).apply({"params": params}, timesteps.reshape(-1), method="time_embedding")
  return HeadWeights(
    time=time.reshape(*timesteps.shape, width),
    modulation=cast(
      {
        "kernel": jnp.concatenate([kernel, final["kernel"]], axis=1),
        "bias": jnp.concatenate([blocks["modulation"]["bias"].reshape(-1), final["bias"]]),
      }
    ),
    blocks=tuple(
      {
        "norm": jax.tree.map(lambda x, i=i: x[i], blocks["norm"]),
        "fc1": cast(jax.tree.map(lambda x, i=i: x[i], blocks["fc1"])),
        "fc2": cast(jax.tree.map(lambda x, i=i: x[i], blocks["fc2"])),
      }
      for i in range(depth)
    ),
    cond_embed=cast(params["cond_embed"]),
    input_proj=cast(params["input_proj"]),
    final_linear=jax.tree.map(lambda x: x.astype(jnp.float32), params["final_linear"]),
  )


def _dense(weights: Layer, x: jax.Array) -> jax.Array:
  """x W + b with operands in the weights' dtype, accumulated in float32, float32 [..., out]."""
  kernel = weights["kernel"]
  out = jnp.dot(x.astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)
  return out + weights["bias"].astype(jnp.float32)


def modulations(layer: Layer, time: jax.Array, cond: jax.Array) -> jax.Array:
  """Shifts, scales and gates of every block, then the final shift and scale.

  Args:
    layer: `HeadWeights.modulation`, or some of its columns.
    time: embeddings of some timesteps, float32 [k, w].
    cond: projected z, float32 [m, w].

  Returns:
    float32 [k, m, (3d + 2) w].
  """
  inner = jax.nn.silu(time[:, None] + cond)
  out = _dense(layer, inner.reshape(-1, cond.shape[-1]))
  return out.reshape(*inner.shape[:2], -1)


def denoise(weights: HeadWeights, x: jax.Array, modulation: jax.Array) -> jax.Array:
  """The head at one timestep.

  Args:
    weights: of `prepare`.
    x: x_t, float32 [n, C].
    modulation: of that timestep, float32 [halves * n, (3d + 2) w].

  Returns:
    float32 [halves * n, 2C].
  """
  return _denoise_and_store(weights, x, modulation)[0]


def steps_together(num_steps: int, rows: int) -> int:
  """Diffusion steps that share a modulation product of at most `MODULATION_ROWS` rows."""
  most = max(1, min(num_steps, MODULATION_ROWS // rows))
  return -(-num_steps // -(-num_steps // most))  # as many each time, but for the last


def detail_scores(z: jax.Array) -> jax.Array:
  """How much high frequency conditions have: z float32 [..., D] -> [...].

  The magnitudes of the discrete Fourier transform of z along its channels, the n-th of D/2 weighted
  by 1 + n / (D/2) (frequency-weighted token selection, GtR, arXiv 2510.17171, section 3.4).
  """
  magnitude = jnp.abs(jnp.fft.rfft(z.astype(jnp.float32), axis=-1))[..., 1:]
  half = z.shape[-1] // 2
  return (magnitude[..., :half] * (1 + jnp.arange(1, half + 1) / half)).sum(axis=-1)


def sample(
  weights: HeadWeights, z: jax.Array, run: DiffusionRun, noise: TokenNoise, guidance: Guidance
) -> jax.Array:
  """Draws tokens given z, with guidance.

  Args:
    weights: of `prepare`.
    z: float32 [halves * n, D]; the conditional half first.
    run, noise, guidance: of the n tokens.

  Returns:
    float32 [n, C].
  """
  cond = _dense(weights.cond_embed, z)
  time = weights.time[run.process]

  def advance(index: jax.Array, state: LoopState, out: jax.Array) -> LoopState:
    """One diffusion step of the solver from its index and the guided output."""
    x, before = state
    c = run.coefficients.at(index)
    drawn = noise.of_step(run.num_steps - 1 - index, c.timestep)
    if run.solver == "dpm++":
      return diffusion.dpm_step(c, x, out, before, drawn, noise.temperature)
    return diffusion.ancestral_step(c, x, out, drawn, noise.temperature), before

  start = (noise.initial, jnp.zeros_like(noise.initial))
  if run.cached:
    assert isinstance(run.num_steps, int)
    return _sample_cached(weights, cond, time, run.num_steps, guidance, start, advance)
  return _sample_plain(weights, cond, time, run, guidance, start, advance)


def _sample_plain(
  weights: HeadWeights,
  cond: jax.Array,
  time: jax.Array,
  run: DiffusionRun,
  guidance: Guidance,
  start: LoopState,
  advance: Callable[[jax.Array, LoopState, jax.Array], LoopState],
) -> jax.Array:
  """The loop of `sample`: chunks of diffusion steps that share a product of modulations."""
  num_steps = run.num_steps
  static = num_steps if isinstance(num_steps, int) else None
  together = steps_together(static or run.fewest, cond.shape[0])

  def chunk(number: jax.Array, state: LoopState) -> LoopState:
    last = num_steps - 1 - number * together  # index of the chunk's first executed diffusion step
    indices = jnp.maximum(last - jnp.arange(together), 0)
    modulation = modulations(weights.modulation, time[indices], cond)

    def diffusion_step(i: jax.Array, state: LoopState) -> LoopState:
      out = guidance.combine(denoise(weights, state[0], modulation[i]))
      return advance(last - i, state, out)

    # A static trip count where there is one: others cost a GPU a round trip to the host per trip.
    exact = static is not None and static % together == 0
    trips = together if exact else jnp.minimum(together, last + 1)
    return jax.lax.fori_loop(0, trips, diffusion_step, state)

  return jax.lax.fori_loop(0, -(-num_steps // together), chunk, start)[0]


def _sample_cached(
  weights: HeadWeights,
  cond: jax.Array,
  time: jax.Array,
  num_steps: int,
  guidance: Guidance,
  start: LoopState,
  advance: Callable[[jax.Array, LoopState, jax.Array], LoopState],
) -> jax.Array:
  """The loop of `sample` with LazyMAR's head cache; its schedule is `CachedSteps`."""
  schedule = CachedSteps.of(num_steps, len(weights.blocks))
  width, rows = cond.shape[1], start[0].shape[0]
  longest = max(schedule.lengths)
  recomputed = jnp.asarray(schedule.recomputed)
  columns = [
    slice(3 * b * width, 3 * (b + 1) * width) for b in (*schedule.kept, len(weights.blocks))
  ]
  kernel, bias = weights.modulation["kernel"], weights.modulation["bias"]
  few = {
    "kernel": jnp.concatenate([kernel[:, c] for c in columns], axis=1),
    "bias": jnp.concatenate([bias[c] for c in columns]),
  }

  def group(number: jax.Array, state: LoopState) -> LoopState:
    """A full diffusion step and the cached ones that follow."""
    index = jnp.asarray(schedule.starts)[number]
    x = state[0]
    out, inner, outputs = _denoise_and_store(
      weights, x, modulations(weights.modulation, time[index][None], cond)[0]
    )
    difference = jnp.zeros_like(out[:rows, : x.shape[1]])
    if guidance.halves == 2:
      difference = out[rows:, : x.shape[1]] - out[:rows, : x.shape[1]]
    state = advance(index, state, guidance.combine(out))
    if not longest:
      return state
    following = jnp.maximum(index - 1 - jnp.arange(longest), 0)
    modulation = modulations(few, time[following], cond[:rows])

    def cached_step(
      i: jax.Array, carry: tuple[LoopState, tuple[jax.Array, ...]]
    ) -> tuple[LoopState, tuple[jax.Array, ...]]:
      state, outputs = carry
      at = index - 1 - i
      out, outputs = _denoise_cached(
        weights, schedule.kept, state[0], modulation[i], inner, outputs, recomputed[at]
      )
      if guidance.halves == 2:
        uncond = out.at[:, : x.shape[1]].add(difference)
        out = diffusion.guide(out, uncond, guidance.scale)
      return advance(at, state, out), outputs

    trips = jnp.asarray(schedule.lengths)[number]
    return jax.lax.fori_loop(0, trips, cached_step, (state, outputs))[0]

  return jax.lax.fori_loop(0, schedule.num_full, group, start)[0]


def _mlp(block: dict[str, Layer], h: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  norm = normalize(h) * block["norm"]["scale"] + block["norm"]["bias"]
  return _dense(block["fc2"], jax.nn.silu(_dense(block["fc1"], modulate(norm, shift, scale))))


def _denoise_and_store(
  weights: HeadWeights, x: jax.Array, modulation: jax.Array
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
  """`denoise`, and what cached diffusion steps need of the conditional half.

  Returns:
    The output [halves * n, 2C]; the residual of the inner blocks together [n, w]; the output of the
    MLPs of the first and the last block, each [n, w].
  """
  parts, rows = jnp.split(modulation, 3 * len(weights.blocks) + 2, axis=-1), x.shape[0]
  h = jnp.tile(_dense(weights.input_proj, x), (modulation.shape[0] // rows, 1))
  trail, outputs = [h], []
  for i, block in enumerate(weights.blocks):
    outputs.append(_mlp(block, h, parts[3 * i], parts[3 * i + 1]))
    h = h + parts[3 * i + 2] * outputs[-1]
    trail.append(h)
  kept = tuple(outputs[i][:rows] for i in sorted({0, len(weights.blocks) - 1}))
  inner = (trail[-2] - trail[1])[:rows] if len(weights.blocks) > 1 else jnp.zeros_like(h[:rows])
  out = _dense(weights.final_linear, modulate(normalize(h), parts[-2], parts[-1]))
  return out, inner, kept


def _denoise_cached(
  weights: HeadWeights,
  kept: tuple[int, ...],
  x: jax.Array,
  modulation: jax.Array,
  inner: jax.Array,
  outputs: tuple[jax.Array, ...],
  recompute: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """The conditional half of a cached diffusion step: output [n, 2C], and the kept MLPs' outputs.

  Args:
    weights: of `prepare`.
    kept: numbers of the first and the last block.
    x: x_t, [n, C].
    modulation: shift, scale and gate of the kept blocks, final shift and scale [n, (3k + 2) w].
    inner: stored residual of the inner blocks [n, w].
    outputs: stored outputs of the kept blocks' MLPs, each [n, w].
    recompute: run those MLPs, bool [].
  """
  parts = jnp.split(modulation, 3 * len(kept) + 2, axis=-1)

  def body(
    h: jax.Array, outputs: tuple[jax.Array, ...], run: bool
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    new: list[jax.Array] = []
    for i, number in enumerate(kept):
      if i == 1:
        h = h + inner
      shift, scale, gate = parts[3 * i : 3 * i + 3]
      new.append(_mlp(weights.blocks[number], h, shift, scale) if run else outputs[i])
      h = h + gate * new[-1]
    return h, tuple(new)

  h = _dense(weights.input_proj, x)
  h, outputs = jax.lax.cond(
    recompute, lambda o: body(h, o, True), lambda o: body(h, o, False), outputs
  )
  return _dense(weights.final_linear, modulate(normalize(h), parts[-2], parts[-1])), outputs
