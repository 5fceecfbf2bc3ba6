"""Adaptive refresh: a plan whose full refreshes stand where the cached keys and values drift.

A decision taken inside the loop would be one for the whole batch, and images would depend on their
neighbours; so the drift is measured beforehand on a few images, and the plan is fixed. `full`
decoding runs with its caches filled, and of every iteration a random projection of all keys and
values is kept (which keeps distances, Johnson and Lindenstrauss). The drift from iteration r to k
is the relative squared change of what a selective iteration k would read of a cache filled in r. Of
all schedules with a number of refreshes, the one with the least total drift is found by dynamic
programming.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import ArrayLike

from marche_jax.config import SampleConfig
from marche_jax.decoding import state as state_lib
from marche_jax.decoding.cache import KVCache
from marche_jax.decoding.given import check_labels
from marche_jax.decoding.plan_runner import PlanRunner
from marche_jax.decoding.state import Inputs
from marche_jax.planning.plan import DecodePlan
from marche_jax.planning.policies import make_plan, parse_policy
from marche_jax.planning.policies.marche import too_large
from marche_jax.weights.checkpoint import Model

SKETCH = 16
"""Random directions that keys, and as many that values, of a layer are projected on."""


def calibrate(
  model: Model,
  sample: SampleConfig,
  labels: ArrayLike,
  key: jax.Array,
  dtype: DTypeLike = jnp.float32,
) -> tuple[SampleConfig, np.ndarray]:
  """Chooses the iterations that `sample`, with a policy of marche, refreshes in full.

  Args:
    model: whose images are decoded.
    sample: how; its refresh_interval says at which cost.
    labels: int [B], of the images to measure on.
    key: of the run.
    dtype: of activations and matrix products.

  Returns:
    `sample` with its refresh_iterations, which cost at most what every refresh_interval-th did, and
    the default refresh_interval, which nobody reads beside them; and the drift float64 [R, R]:
    entry r, k >= r is that of iteration k from a refresh in r.

  Raises:
    ValueError: where the policy has no marche in it, or nothing that reads a cache; where `sample`
      makes no plan, such as one whose active_size is too small (all of these before anything is
      measured); where latents are not finite (`NonFiniteLatentsError`).
  """
  if "marche" not in parse_policy(sample.policy):
    raise ValueError(
      f"sample.policy={sample.policy!r}: expected marche in what is to be calibrated"
    )
  labels = check_labels(labels, model.config)
  sample = dataclasses.replace(sample, refresh_iterations=())
  plan = make_plan(model.config, sample)
  if not plan.cache_halves:
    raise ValueError(
      f"nothing to calibrate: with sample.num_iter={sample.num_iter}, "
      f"refresh_interval={sample.refresh_interval} and active_size={sample.active_size} no "
      "iteration reads a cache"
    )
  drift = measure_drift(model, sample, labels, key, dtype)
  budget = plan.flops(padded=False).total
  default = SampleConfig().refresh_interval
  required = {0, *too_large(sample, plan.rows)}
  at_intervals = tuple(range(0, len(drift), sample.refresh_interval))
  for count in range(len(at_intervals), len(required) - 1, -1):
    chosen = dataclasses.replace(
      sample,
      refresh_interval=default,
      refresh_iterations=choose_refreshes(drift, count, required),
    )
    if make_plan(model.config, chosen).flops(padded=False).total <= budget:
      return chosen, drift
  # Selective iterations may cost more than full ones: early, an encoder has few tokens to skip.
  return dataclasses.replace(
    sample, refresh_interval=default, refresh_iterations=at_intervals
  ), drift


def measure_drift(
  model: Model, sample: SampleConfig, labels: np.ndarray, key: jax.Array, dtype: DTypeLike
) -> np.ndarray:
  """The drift [R, R] of `calibrate`, over the iterations of `sample`."""
  selective = make_plan(model.config, sample)  # it has the caches
  full = make_plan(
    model.config, dataclasses.replace(sample, refresh_interval=1, condition_cache=False)
  )
  keys = state_lib.image_keys(key, jnp.arange(len(labels), dtype=jnp.uint32))
  state = PlanRunner(selective, dtype=dtype).start(keys)
  runner = PlanRunner(full, dtype=dtype, head_dtype=dtype, chunk=1)
  sketches = []
  for chunk in runner.run(model.params, state, Inputs(labels, keys)):
    caches = chunk.state.encoder_cache, chunk.state.decoder_cache
    sketches.append([np.asarray(_sketch(cache)) for cache in caches])
  return drift_of_sketches(sketches, full)


@jax.jit
def _sketch(cache: KVCache) -> jax.Array:
  """Random projections of keys and values, float32 [L, X, N, 2 * SKETCH]."""
  directions = jax.random.normal(state_lib.run_key(0), (cache.k.shape[-1], SKETCH))
  project = lambda x: jnp.einsum("lxnw,wd->lxnd", x.astype(jnp.float32), directions)
  return jnp.concatenate([project(cache.k), project(cache.v)], axis=-1)


def drift_of_sketches(sketches: list[list[np.ndarray]], plan: DecodePlan) -> np.ndarray:
  """Drift [R, R] from sketches [R][stack], each [L, X, N, d] by rank.

  The mean over stacks and layers of |change|^2 / |value|^2, over the tokens that were known at r or
  are still masked after k: the others are forced in between.
  """
  count, buffer = len(plan.rows), plan.config.buffer_size
  drift = np.zeros((count, count))
  for k, row in enumerate(plan.rows):
    later = buffer + row.num_known + row.num_predict
    for r in range(k):
      known = buffer + plan.rows[r].num_known
      parts = []
      for stack, end in ((0, 0), (1, None)):
        new, old = sketches[k][stack], sketches[r][stack]
        kept = [slice(0, known)] + ([slice(later, None)] if end is None else [])
        change = sum(np.square(new[:, :, s] - old[:, :, s]).sum(axis=(1, 2, 3)) for s in kept)
        size = sum(np.square(new[:, :, s]).sum(axis=(1, 2, 3)) for s in kept)
        parts.append(np.mean(change / size))
      drift[r, k] = np.mean(parts)
  return drift


def choose_refreshes(
  drift: np.ndarray, count: int, required: Collection[int] = ()
) -> tuple[int, ...]:
  """The `count` iterations, the first among them, whose refreshes leave the least total drift.

  The total is the sum over all iterations of the drift since the refresh before.

  Args:
    drift: [R, R].
    count: how many, at least as many as 0 and the required ones are.
    required: iterations that must be among them.
  """
  n = len(drift)
  cost = np.full((n, n + 1), np.inf)  # cost[r, j]: iterations r to j - 1 after a refresh in r
  for r in range(n):
    end = min((k for k in required if k > r), default=n)  # none of these is passed over
    cost[r, r + 1 : end + 1] = np.cumsum(drift[r, r:end])
  best = cost[0].copy()  # of one refresh, by the end of what it covers
  back: list[np.ndarray] = []
  for _ in range(1, count):
    options = best[:n, None] + cost
    back.append(options.argmin(axis=0))
    best = options.min(axis=0)
  chosen, end = [], n
  for last in reversed(back):
    end = int(last[end])
    chosen.append(end)
  return (0, *reversed(chosen))
