"""What callers of decoding give (labels, orders, known tokens), checked; and the state made of it.

S image tokens of C channels, as in `models/mar.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.decoding import state as state_lib
from marche_jax.decoding.state import DecodeState
from marche_jax.planning.plan import DecodePlan
from marche_jax.planning.policies import make_plan

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


def check_pair(name: str, value: object, expected: str) -> tuple[ArrayLike, ArrayLike]:
  """The value, which must be a tuple or list of two; ValueError says what was expected."""
  if isinstance(value, tuple | list) and len(value) == 2:
    return value[0], value[1]
  shape = f" of shape {list(np.shape(value))}" if hasattr(value, "shape") else ""
  raise ValueError(f"{name}: found {type(value).__name__}{shape}, expected a pair: {expected}")


def check_array(
  name: str,
  value: ArrayLike,
  shape: tuple[int, ...],
  kinds: str,
  read: np.ndarray | None = None,
) -> np.ndarray:
  """The value as an array.

  Args:
    name: of the value.
    value: to be checked.
    shape: that it must have.
    kinds: of dtypes, numpy's letters, of which it must be one.
    read: bool, of its leading axes: where it is read, and must be finite; default: everywhere.

  Raises:
    ValueError: where it is not as it must be; names it.
  """
  array = np.asarray(value)
  if array.shape != shape or array.dtype.kind not in kinds:
    wanted = "integers" if "f" not in kinds else "numbers"
    raise ValueError(
      f"{name}: found {array.dtype} {list(array.shape)}, expected {wanted} of shape {list(shape)}"
    )
  finite = np.isfinite(array if read is None else array[read]) if array.dtype.kind == "f" else True
  if not np.all(finite):
    raise ValueError(f"{name}: found NaN or infinity, expected finite numbers")
  return array


def check_known(config: ModelConfig, batch: int, known: Known) -> tuple[np.ndarray, np.ndarray]:
  """The tokens float32 [B, S, C], zero where unknown, and where they are known, bool [B, S].

  What stands at unknown positions is not read, and may be NaN. Errors as in `generation.generate`.
  """
  values, mask = check_pair("known", known, "tokens [B, S, C] and a mask [B, S]")
  unknown = check_array("known[1]", mask, (batch, config.seq_len), "iufb") != 0
  counts = (~unknown).sum(axis=1)
  if not (counts == counts[0]).all() or counts[0] == config.seq_len:
    raise ValueError(
      f"known[1]: found {sorted(set(counts.tolist()))} known tokens, expected the same number, "
      f"below {config.seq_len}, in every image"
    )
  shape = (batch, config.seq_len, config.token_dim)
  tokens = check_array("known[0]", values, shape, "f", ~unknown)
  return np.where(unknown[..., None], 0, tokens).astype(np.float32), ~unknown


def plan_around(
  config: ModelConfig, sample: SampleConfig, batch: int, known: Known | None, ordered: bool = False
) -> DecodePlan:
  """The plan for a batch of which `known` gives some tokens.

  Args:
    config: of the model.
    sample: how to decode.
    batch: images.
    known: as in `generation.generate`.
    ordered: the caller brings an order, which needs not be the plan's.

  Raises:
    ValueError: as in `generation.generate`.
  """
  if known is None:
    return make_plan(config, sample)
  _, is_known = check_known(config, batch, known)
  num_known = int(is_known[0].sum())
  plan = make_plan(config, sample, num_known)
  if plan.stages is None or ordered or not num_known:
    return plan
  odd = is_known[:, np.indices((config.grid_size,) * 2).sum(axis=0).ravel() % 2 == 1].sum(axis=1)
  if not (odd == odd[0]).all():
    raise ValueError(
      f"known[1]: found {odd.min()} to {odd.max()} known tokens where row + column is odd; "
      f"sample.policy={sample.policy!r}, which reveals a checkerboard's colours one after the "
      "other, needs the same number in every image (the same mask has it), or an order"
    )
  return make_plan(config, sample, num_known, int(odd[0]))


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
    values, is_known = check_known(config, batch, known)
    unknown = jnp.take_along_axis(jnp.asarray(~is_known), by_rank, axis=1)
    first = jnp.argsort(unknown, axis=1, stable=True)  # known tokens have the first ranks
    by_rank = jnp.take_along_axis(by_rank, first, axis=1)
    tokens = jnp.asarray(values)
  return DecodeState(tokens, by_rank if order is not None else state_lib.arrange(plan, by_rank))
