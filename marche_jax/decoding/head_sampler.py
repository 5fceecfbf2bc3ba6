"""Sampling tokens from the diffusion head: the loop that dominates decoding at small batches.

What does not depend on the token is computed once (timestep embeddings), what does not depend on
the step is computed once per token (the projection of z). The modulations, two thirds of the head's
weights, depend on timestep and z but not on x_t: those of all blocks are one matrix product, taken
for several diffusion steps at a time, since with few tokens reading the weights is what costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from marche_jax.config import ModelConfig
from marche_jax.models import diffusion
from marche_jax.models.head import Head, modulate, normalize
from marche_jax.planning.head_schedule import CachedSteps

MODULATION_ROWS = 256
"""Rows (diffusion steps times tokens) of a modulation product up to which steps are taken together.

More rows make no product cheaper per row and need more memory, 4 (3d + 2) w bytes each.
"""


@flax.struct.dataclass
class HeadWeights:
  """The head's weights as the sampling loop reads them; d blocks, width w."""

  time: jax.Array  # [processes, T, w] float32: embedding of each one's timesteps
  modulation: dict[str, jax.Array]  # kernel [w, (3d + 2) w], bias: all blocks', then the final's
  blocks: tuple[dict[str, Any], ...]  # norm, fc1, fc2 of each block
  cond_embed: dict[str, jax.Array]
  input_proj: dict[str, jax.Array]
  final_linear: dict[str, jax.Array]  # float32


def prepare(params: Any, config: ModelConfig, timesteps: jax.Array, dtype: Any) -> HeadWeights:
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


def _dense(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
  """x W + b with operands in the weights' dtype, accumulated in float32, float32 [..., out]."""
  kernel = weights["kernel"]
  out = jnp.dot(x.astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)
  return out + weights["bias"].astype(jnp.float32)


def modulations(layer: dict[str, jax.Array], time: jax.Array, cond: jax.Array) -> jax.Array:
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


def steps_together(steps: int, rows: int) -> int:
  """Diffusion steps that share a modulation product of at most `MODULATION_ROWS` rows."""
  most = max(1, min(steps, MODULATION_ROWS // rows))
  return -(-steps // -(-steps // most))  # as many each time, but for the last


def detail_scores(z: jax.Array) -> jax.Array:
  """How much high frequency conditions have: z float32 [..., D] -> [...].

  The magnitudes of the discrete Fourier transform of z along its channels, the n-th of D/2 weighted
  by 1 + n / (D/2) (frequency-weighted token selection, GtR, arXiv 2510.17171, section 3.4).
  """
  magnitude = jnp.abs(jnp.fft.rfft(z.astype(jnp.float32), axis=-1))[..., 1:]
  half = z.shape[-1] // 2
  return (magnitude[..., :half] * (1 + jnp.arange(1, half + 1) / half)).sum(axis=-1)


def sample(
  weights: HeadWeights,
  z: jax.Array,
  halves: int,
  *,
  process: jax.Array,
  coefficients: diffusion.Coefficients,
  steps: int | jax.Array,
  cfg: jax.Array,
  temperature: jax.Array,
  initial_noise: jax.Array,
  step_noise: Callable[[jax.Array, jax.Array], jax.Array],
  solver: str = "ddpm",
  cached: bool = False,
  fewest: int = 1,
) -> jax.Array:
  """Draws tokens given z, with guidance.

  Args:
    weights: of `prepare`.
    z: float32 [halves * n, D]; the conditional half first.
    halves: 2 with guidance, 1 without.
    process: index of the diffusion process, int [].
    coefficients: of that process, each [T].
    steps: how many of them count; static or traced.
    cfg: guidance scale, float32 [].
    temperature: factor on the noise, float32 [].
    initial_noise: x_T, float32 [n, C].
    step_noise: (index of the executed step from 0, its timestep) -> float32 [n, C].
    solver: 'ddpm', ancestral sampling, or 'dpm++', see `diffusion.dpm_step`.
    cached: most steps reuse what the head computed before; `steps` is static then.
    fewest: traced `steps` are never below it; more of them than that never share a product.

  Returns:
    float32 [n, C].
  """
  cond = _dense(weights.cond_embed, z)
  time = weights.time[process]

  def advance(index: jax.Array, state: tuple, out: jax.Array) -> tuple:
    """One step of the solver from its index and the guided output; state: (x_t, x_0 before)."""
    x, before = state
    c = coefficients.at(index)
    noise = step_noise(steps - 1 - index, c.timestep)
    if solver == "dpm++":
      return diffusion.dpm_step(c, x, out, before, noise, temperature)
    return diffusion.ancestral_step(c, x, out, noise, temperature), before

  start = (initial_noise, jnp.zeros_like(initial_noise))
  if cached:
    assert isinstance(steps, int)
    return _sample_cached(weights, cond, time, halves, steps, cfg, start, advance)

  static = steps if isinstance(steps, int) else None
  together = steps_together(static or fewest, cond.shape[0])

  def run(chunk: jax.Array, state: tuple) -> tuple:
    last = steps - 1 - chunk * together  # index of the chunk's first executed step
    indices = jnp.maximum(last - jnp.arange(together), 0)
    modulation = modulations(weights.modulation, time[indices], cond)

    def step(i: jax.Array, state: tuple) -> tuple:
      x = state[0]
      out = denoise(weights, x, modulation[i])
      if halves == 2:
        out = diffusion.guide(out[: len(x)], out[len(x) :], cfg)
      return advance(last - i, state, out)

    # A static trip count where there is one: others cost a GPU a round trip to the host per trip.
    exact = static is not None and static % together == 0
    trips = together if exact else jnp.minimum(together, last + 1)
    return jax.lax.fori_loop(0, trips, step, state)

  return jax.lax.fori_loop(0, -(-steps // together), run, start)[0]


def _sample_cached(
  weights: HeadWeights,
  cond: jax.Array,
  time: jax.Array,
  halves: int,
  steps: int,
  cfg: jax.Array,
  start: tuple,
  advance: Callable[[jax.Array, tuple, jax.Array], tuple],
) -> jax.Array:
  """The loop of `sample` with LazyMAR's head cache; its schedule is `CachedSteps`."""
  schedule = CachedSteps.of(steps, len(weights.blocks))
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

  def group(number: jax.Array, state: tuple) -> tuple:
    """A full step and the cached ones that follow."""
    index = jnp.asarray(schedule.starts)[number]
    x = state[0]
    out, inner, outputs = _denoise_and_store(
      weights, x, modulations(weights.modulation, time[index][None], cond)[0]
    )
    difference = jnp.zeros_like(out[:rows, : x.shape[1]])
    if halves == 2:
      difference = out[rows:, : x.shape[1]] - out[:rows, : x.shape[1]]
      out = diffusion.guide(out[:rows], out[rows:], cfg)
    state = advance(index, state, out)
    if not longest:
      return state
    following = jnp.maximum(index - 1 - jnp.arange(longest), 0)
    modulation = modulations(few, time[following], cond[:rows])

    def step(i: jax.Array, carry: tuple) -> tuple:
      state, outputs = carry
      at = index - 1 - i
      out, outputs = _denoise_cached(
        weights, schedule.kept, state[0], modulation[i], inner, outputs, recomputed[at]
      )
      if halves == 2:
        uncond = out.at[:, : x.shape[1]].add(difference)
        out = diffusion.guide(out, uncond, cfg)
      return advance(at, state, out), outputs

    trips = jnp.asarray(schedule.lengths)[number]
    return jax.lax.fori_loop(0, trips, step, (state, outputs))[0]

  return jax.lax.fori_loop(0, schedule.num_full, group, start)[0]


def _mlp(block: dict[str, Any], h: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  norm = normalize(h) * block["norm"]["scale"] + block["norm"]["bias"]
  return _dense(block["fc2"], jax.nn.silu(_dense(block["fc1"], modulate(norm, shift, scale))))


def _denoise_and_store(
  weights: HeadWeights, x: jax.Array, modulation: jax.Array
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
  """`denoise`, and what cached steps need of the conditional half.

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
  """The conditional half of a cached step: output [n, 2C], and the kept MLPs' outputs.

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

  def body(h: jax.Array, outputs: tuple, run: bool) -> tuple[jax.Array, tuple]:
    new = []
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
