"""Policies: functions that edit the draft of a plan, one after the other.

`full` makes the draft: MAR as published. Every other policy changes one **aspect** of it: the order
and the counts ('order'), which tokens the transformer recomputes ('cache'), or the diffusion steps
('steps'). Policies of different aspects combine freely, `marche+disa+gtr`; two of the same aspect
contradict each other. `turbo` is a combination itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.draft import Draft, build, full_steps
from marche_jax.plan import DecodePlan
from marche_jax.policies.disa import disa
from marche_jax.policies.gtr import gtr
from marche_jax.policies.lazymar import lazymar
from marche_jax.policies.marche import marche
from marche_jax.policies.recap import recap
from marche_jax.policies.turbo import turbo


@dataclasses.dataclass(frozen=True)
class Policy:
  """A function that edits a draft, the aspects that it decides on, the fields it alone reads."""

  apply: Callable[[Draft], None]
  aspects: frozenset[str]
  fields: frozenset[str] = frozenset()


def full(draft: Draft) -> None:
  """MAR exactly as published: the draft as it is (arXiv 2406.11838, section 3.4)."""


# In the order in which they are applied: first what changes the iterations themselves.
POLICIES: dict[str, Policy] = {
  "full": Policy(full, frozenset()),
  "gtr": Policy(gtr, frozenset({"order"}), frozenset({"detail_tokens"})),
  "turbo": Policy(turbo, frozenset({"order", "steps"})),
  "disa": Policy(disa, frozenset({"steps"})),
  "recap": Policy(recap, frozenset({"cache"}), frozenset({"recap_raster"})),
  "lazymar": Policy(lazymar, frozenset({"cache"}), frozenset({"head_cache"})),
  "marche": Policy(
    marche,
    frozenset({"cache"}),
    frozenset(
      {
        "active_size", "encoder_active_size", "refresh_interval", "refresh_iterations",
        "select_layer", "selection", "condition_cache",
      }
    ),
  ),
}  # fmt: skip


def unread_fields(policy: str, fields: Iterable[str]) -> dict[str, str]:
  """Owners of those fields of `SampleConfig` that only policies which are not in `policy` read."""
  names = policy.split("+")
  owners = {field: name for name, p in POLICIES.items() for field in p.fields}
  return {f: owners[f] for f in fields if f in owners and owners[f] not in names}


def parse_policy(policy: str) -> list[str]:
  """The names in `sample.policy`, in the order in which they are applied.

  Raises:
    ValueError: for an unknown name, one that stands twice, or two that contradict each other.
  """
  names = policy.split("+")
  for name in names:
    if name not in POLICIES:
      raise ValueError(
        f"sample.policy={policy!r}: unknown policy {name!r}; expected one of "
        f"{', '.join(POLICIES)}, or several joined by +"
      )
  decided: dict[str, str] = {}
  for name in names:
    if names.count(name) > 1:
      raise ValueError(f"sample.policy={policy!r}: {name} stands there twice")
    for aspect in sorted(POLICIES[name].aspects):
      if aspect in decided:
        raise ValueError(
          f"sample.policy={policy!r}: {decided[aspect]} and {name} contradict each other, both "
          f"decide on the {ASPECTS[aspect]}"
        )
      decided[aspect] = name
  return sorted(names, key=list(POLICIES).index)


ASPECTS = {
  "order": "order and number of tokens per iteration",
  "cache": "tokens that are recomputed",
  "steps": "diffusion steps",
}


@functools.lru_cache(maxsize=64)
def make_plan(config: ModelConfig, sample: SampleConfig, num_known: int = 0) -> DecodePlan:
  """The plan of `sample.policy` for images of which `num_known` tokens are given.

  Raises:
    ValueError: for an unknown policy or a contradicting combination, more iterations than tokens to
      predict, or a field of a policy out of range; names the field.
  """
  names = parse_policy(sample.policy)
  draft = Draft(config, sample, num_known, [], solver=sample.solver)
  timesteps = draft.timesteps(sample.num_sampling_steps)
  draft.steps = full_steps(config, sample, num_known, timesteps)
  for name in names:
    POLICIES[name].apply(draft)
  return build(draft)
