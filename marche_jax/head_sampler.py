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

from marche_jax import diffusion
from marche_jax.config import ModelConfig
from marche_jax.models.head import Head, modulate, normalize

MODULATION_ROWS = 256
"""Rows (diffusion steps times tokens) of a modulation product up to which steps are taken together.

More rows make no product cheaper per row and need more memory, 4 (3d + 2) w bytes each.
"""


@flax.struct.dataclass
class HeadWeights:
  """The head's weights as the sampling loop reads them; d blocks, width w."""

  time: jax.Array  # [tables, T, w] float32: embedding of each table's timesteps
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
    timesteps: of the plan's diffusion tables, int [tables, T].
    dtype: of the matrix products' operands, but for the last layer's.
  """
  blocks = params["blocks"]
  depth, width = config.diffloss_d, config.diffloss_w
  kernel = blocks["modulation"]["kernel"].transpose(1, 0, 2).reshape(width, depth * 3 * width)
  final = params["final_modulation"]
  cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)  # noqa: E731
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


def modulations(weights: HeadWeights, time: jax.Array, cond: jax.Array) -> jax.Array:
  """Shifts, scales and gates of every block, then the final shift and scale.

  Args:
    weights: of `prepare`.
    time: embeddings of some timesteps, float32 [k, w].
    cond: projected z, float32 [m, w].

  Returns:
    float32 [k, m, (3d + 2) w].
  """
  inner = jax.nn.silu(time[:, None] + cond)
  out = _dense(weights.modulation, inner.reshape(-1, cond.shape[-1]))
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
  parts = jnp.split(modulation, 3 * len(weights.blocks) + 2, axis=-1)
  h = jnp.tile(_dense(weights.input_proj, x), (modulation.shape[0] // x.shape[0], 1))
  for i, block in enumerate(weights.blocks):
    norm = normalize(h) * block["norm"]["scale"] + block["norm"]["bias"]
    inner = jax.nn.silu(_dense(block["fc1"], modulate(norm, parts[3 * i], parts[3 * i + 1])))
    h = h + parts[3 * i + 2] * _dense(block["fc2"], inner)
  h = modulate(normalize(h), parts[-2], parts[-1])
  return _dense(weights.final_linear, h)


def _steps_together(steps: int, rows: int) -> int:
  """The largest divisor of `steps` that keeps a modulation product within `MODULATION_ROWS`."""
  most = max(1, min(steps, MODULATION_ROWS // rows))
  return next(k for k in range(most, 0, -1) if steps % k == 0)


def sample(
  weights: HeadWeights,
  z: jax.Array,
  halves: int,
  *,
  table: jax.Array,
  coefficients: diffusion.Coefficients,
  steps: int | jax.Array,
  cfg: jax.Array,
  temperature: jax.Array,
  initial_noise: jax.Array,
  step_noise: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
  """Draws tokens given z by ancestral sampling with guidance.

  Args:
    weights: of `prepare`.
    z: float32 [halves * n, D]; the conditional half first.
    halves: 2 with guidance, 1 without.
    table: index of the diffusion table, int [].
    coefficients: of that table, each [T].
    steps: how many of them count; static or traced.
    cfg: guidance scale, float32 [].
    temperature: factor on the noise, float32 [].
    initial_noise: x_T, float32 [n, C].
    step_noise: (index of the executed step from 0, its timestep) -> float32 [n, C].

  Returns:
    float32 [n, C].
  """
  cond = _dense(weights.cond_embed, z)
  time = weights.time[table]
  static = steps if isinstance(steps, int) else None
  together = _steps_together(static or time.shape[0], cond.shape[0])

  def run(chunk: jax.Array, x: jax.Array) -> jax.Array:
    last = steps - 1 - chunk * together  # index of the chunk's first executed step
    indices = jnp.maximum(last - jnp.arange(together), 0)
    modulation = modulations(weights, time[indices], cond)

    def step(i: jax.Array, x: jax.Array) -> jax.Array:
      c = coefficients.at(last - i)
      out = denoise(weights, x, modulation[i])
      if halves == 2:
        out = diffusion.guide(out[: len(x)], out[len(x) :], cfg)
      noise = step_noise(chunk * together + i, c.timestep)
      return diffusion.ancestral_step(c, x, out, noise, temperature)

    # A static trip count where there is one: others cost a GPU a round trip to the host per trip.
    trips = together if static else jnp.minimum(together, last + 1)
    return jax.lax.fori_loop(0, trips, step, x)

  return jax.lax.fori_loop(0, -(-steps // together), run, initial_noise)
