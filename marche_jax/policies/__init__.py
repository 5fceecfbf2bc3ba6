"""Policies: functions that fill a DecodePlan from the sampling configuration."""

from __future__ import annotations

import functools
from collections.abc import Callable

from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.plan import DecodePlan
from marche_jax.policies.full import full

POLICIES: dict[str, Callable[[ModelConfig, SampleConfig, int], DecodePlan]] = {"full": full}


@functools.lru_cache(maxsize=32)
def make_plan(config: ModelConfig, sample: SampleConfig, num_known: int = 0) -> DecodePlan:
  """The plan of `sample.policy` for images of which `num_known` tokens are given.

  Raises:
    ValueError: for an unknown policy, or more iterations than tokens to predict.
  """
  if sample.policy not in POLICIES:
    raise ValueError(
      f"sample.policy={sample.policy!r}: expected one of {', '.join(sorted(POLICIES))}"
    )
  return POLICIES[sample.policy](config, sample, num_known)
