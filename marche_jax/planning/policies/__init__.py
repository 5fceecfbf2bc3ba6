"""Policies: functions that edit the draft of a plan, one after the other.

`full` makes the draft: MAR as published. Every other policy changes one **aspect** of it: the order
and the counts ('order'), which tokens the transformer recomputes ('cache'), or the diffusion steps
('diffusion'). Policies of different aspects combine freely, `marche+disa+gtr`; two of the same
aspect contradict each other. `turbo` is a combination itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.planning.draft import Draft, build, full_iterations
from marche_jax.planning.plan import DecodePlan
from marche_jax.planning.policies.disa import disa
from marche_jax.planning.policies.gtr import gtr
from marche_jax.planning.policies.lazymar import lazymar
from marche_jax.planning.policies.marche import marche
from marche_jax.planning.policies.recap import recap
from marche_jax.planning.policies.turbo import turbo


@dataclasses.dataclass(frozen=True)
class Policy:
  """A function that edits a draft, and what it has to do with fields of `SampleConfig`."""

  apply: Callable[[Draft], None]
  aspects: frozenset[str]  # that it decides on
  fields: frozenset[str] = frozenset()  # that it alone reads
  overrides: frozenset[str] = frozenset()  # that it does not read, because it brings its own


def full(draft: Draft) -> None:
  """MAR exactly as published: the draft as it is (arXiv 2406.11838, section 3.4)."""


# In the order in which they are applied: first what changes the iterations themselves.
POLICIES: dict[str, Policy] = {
  "full": Policy(full, frozenset()),
  "gtr": Policy(
    gtr, frozenset({"order"}), frozenset({"detail_tokens"}), frozenset({"num_sampling_steps"})
  ),
  "turbo": Policy(
    turbo, frozenset({"order", "diffusion"}), overrides=frozenset({"num_sampling_steps", "solver"})
  ),
  "disa": Policy(
    disa, frozenset({"diffusion"}), overrides=frozenset({"num_sampling_steps", "detail_tokens"})
  ),
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


GUIDANCE_FIELDS = frozenset({"cfg_schedule", "condition_cache"})
"""Fields of `SampleConfig` that nobody reads where guidance is off."""


def check_fields(policy: str, fields: Iterable[str], guided: bool = True) -> None:
  """Checks fields of `SampleConfig` that somebody asked for: none may go unread.

  Args:
    policy: that was asked for.
    fields: that were.
    guided: whether guidance is on.

  Raises:
    ValueError: for a field that only other policies read, one that a policy overrides, one of
      guidance where that is off, or two that contradict each other; or for a wrong policy, as
      `parse_policy`.
  """
  names, fields = parse_policy(policy), list(fields)
  for field in fields:
    owners = [name for name, p in POLICIES.items() if field in p.fields]
    if owners and not set(owners) & set(names):
      raise ValueError(f"sample.{field} is a field of {owners[0]}, which {policy} does not read")
    for name in names:
      if field in POLICIES[name].overrides:
        raise ValueError(f"sample.{field} is not read by {policy}: {name} brings its own")
    if field in GUIDANCE_FIELDS and not guided:
      raise ValueError(f"sample.{field} is not read: sample.cfg=1 switches guidance off")
  if {"refresh_interval", "refresh_iterations"} <= set(fields):
    raise ValueError("sample.refresh_interval and sample.refresh_iterations contradict each other")


def check_sample(sample: SampleConfig, own: SampleConfig | None) -> None:
  """`check_fields` of a configuration made in Python, which does not tell what was asked for.

  Taken for that are the fields whose value is neither `SampleConfig`'s default nor the model's own.

  Args:
    sample: how to decode.
    own: the model's own settings, where it has some.

  Raises:
    ValueError: as `check_fields`.
  """
  known = [SampleConfig()] if own is None else [SampleConfig(), own]
  names = [field.name for field in dataclasses.fields(sample) if field.name != "policy"]
  asked = [n for n in names if all(getattr(sample, n) != getattr(other, n) for other in known)]
  check_fields(sample.policy, asked, sample.cfg != 1.0)


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
  "diffusion": "diffusion steps",
}


@functools.lru_cache(maxsize=64)
def make_plan(
  config: ModelConfig, sample: SampleConfig, num_known: int = 0, num_known_odd: int | None = None
) -> DecodePlan:
  """The plan of `sample.policy`: arguments and errors as `make_draft`."""
  return build(make_draft(config, sample, num_known, num_known_odd))


def make_draft(
  config: ModelConfig, sample: SampleConfig, num_known: int = 0, num_known_odd: int | None = None
) -> Draft:
  """The draft of `sample.policy`.

  Args:
    config: of the model.
    sample: how to decode. Where tokens are known, num_iter is at most the number of the others.
    num_known: image tokens that are given, in every image.
    num_known_odd: of them, those whose row + column is odd, for policies whose order is that of a
      checkerboard; default: the share of these that falls to them.

  Raises:
    ValueError: for an unknown policy or a contradicting combination, more iterations than tokens to
      predict, or a field of a policy out of range; names the field.
  """
  names = parse_policy(sample.policy)
  if num_known:
    most = max(1, config.seq_len - num_known)
    sample = dataclasses.replace(sample, num_iter=min(sample.num_iter, most))
  draft = Draft(config, sample, num_known, [], num_known_odd, sample.solver)
  timesteps = draft.timesteps(sample.num_sampling_steps)
  draft.iterations = full_iterations(config, sample, num_known, timesteps)
  for name in names:
    POLICIES[name].apply(draft)
  return draft
