"""What callers of decoding give (labels, orders, known tokens), checked; and the state made of it.

S image tokens of C channels, as in `models/mar.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from marche_jax.config import ModelConfig
from marche_jax.decoding import state as state_lib
from marche_jax.decoding.state import DecodeState
from marche_jax.planning.plan import DecodePlan

Known = tuple[ArrayLike, ArrayLike]
"""Tokens [B, S, C] and a mask [B, S], 1 where unknown."""


def check_labels(labels: ArrayLike, config: ModelConfig) -> np.ndarray:
  """Labels as int32 [B]; ValueError where one is out of range."""
  found = np.asarray(labels)
  if found.ndim != 1 or found.size == 0 or found.dtype.kind not in "iu":
    raise ValueError(f"labels={found!r}: expected a non-empty list of integers")
  wrong = found[(found < 0) | (found >= config.class_num)]
  if wrong.size:
    raise ValueError(f"labels: found {wrong[0]}, expected 0 to {config.class_num - 1}")
  return found.astype(np.int32)


def check_array(name: str, value: ArrayLike, shape: tuple[int, ...], kinds: str) -> np.ndarray:
  """The value as an array; ValueError where its shape or kind of dtype (numpy's) is another."""
  array = np.asarray(value)
  if array.shape != shape or array.dtype.kind not in kinds:
    wanted = "integers" if "f" not in kinds else "numbers"
    raise ValueError(
      f"{name}: found {array.dtype} {list(array.shape)}, expected {wanted} of shape {list(shape)}"
    )
  if array.dtype.kind == "f" and not np.isfinite(array).all():
    raise ValueError(f"{name}: found NaN or infinity, expected finite numbers")
  return array


def count_known(config: ModelConfig, batch: int, known: Known | None) -> int:
  """How many tokens of every image are given by `known`; errors as in `generation.generate`."""
  if known is None:
    return 0
  mask = check_array("known[1]", known[1], (batch, config.seq_len), "iufb") != 0
  counts = (~mask).sum(axis=1)
  if not (counts == counts[0]).all() or counts[0] == config.seq_len:
    raise ValueError(
      f"known[1]: found {sorted(set(counts.tolist()))} known tokens, expected the same number, "
      f"below {config.seq_len}, in every image"
    )
  return int(counts[0])


def initial_state(
  plan: DecodePlan, keys: jax.Array, order: ArrayLike | None = None, known: Known | None = None
) -> DecodeState:
  """Tokens and positions by rank before the first iteration, without caches.

  Arguments and errors as in `generation.generate`; keys [B] of `state.image_keys`. An order that
  was given is taken as it is, but for known tokens; others follow the plan's rule.
  """
  config = plan.config
  batch, s, c = keys.shape[0], config.seq_len, config.token_dim
  tokens = jnp.zeros((batch, s, c))
  if order is None:
    from_last = state_lib.random_order(keys, s)
  else:
    found = check_array("order", order, (batch, s), "iu")
    if not (np.sort(found, axis=1) == np.arange(s)).all():
      raise ValueError(f"order: expected a permutation of 0 to {s - 1} in every row")
    from_last = jnp.asarray(found, jnp.int32)
  by_rank = from_last[:, ::-1]
  if known is not None:
    count_known(config, batch, known)
    values = check_array("known[0]", known[0], (batch, s, c), "f")
    mask = check_array("known[1]", known[1], (batch, s), "iufb") != 0
    unknown = jnp.take_along_axis(jnp.asarray(mask), by_rank, axis=1)
    first = jnp.argsort(unknown, axis=1, stable=True)  # known tokens have the first ranks
    by_rank = jnp.take_along_axis(by_rank, first, axis=1)
    tokens = jnp.where(jnp.asarray(mask)[..., None], 0.0, jnp.asarray(values, jnp.float32))
  return DecodeState(tokens, by_rank if order is not None else state_lib.arrange(plan, by_rank))
