"""What a comparison compares: the entries of `--policies`.

An entry is a policy, with fields of `SampleConfig` changed where it says so:
`marche`, `marche+disa`, `marche:refresh_interval=9:select_layer=1`, `full:num_iter=32`. A plan file
of `sample --calibrate` may stand for the policy.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable, Sequence

from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.files import user_path
from marche_jax.planning.plan import DecodePlan
from marche_jax.planning.plan_file import FIELDS as FILE_FIELDS
from marche_jax.planning.plan_file import load_plan
from marche_jax.planning.policies import check_fields, make_plan

BASELINE = "full"

ALL = ("full", "marche", "recap", "lazymar", "disa", "gtr", "turbo")
"""The policies that a comparison takes where nothing else is asked for; see `all_entries`."""

FIELDS = {
  name: kind for name, kind in typing.get_type_hints(SampleConfig).items() if name != "policy"
}
"""Type of every field that an entry may change."""


@dataclasses.dataclass(frozen=True)
class Entry:
  """One way to decode, of those compared."""

  name: str  # as it was given, and as reports show it
  sample: SampleConfig
  plan: DecodePlan


def all_entries(sample: SampleConfig) -> list[str]:
  """Every policy, and `full` in half the iterations: what an acceleration has to beat."""
  return [BASELINE, f"{BASELINE}:num_iter={max(1, sample.num_iter // 2)}", *ALL[1:]]


def parse_entries(
  values: Sequence[str],
  config: ModelConfig,
  sample: SampleConfig,
  weights: Callable[[], str] | None = None,
) -> list[Entry]:
  """Reads the entries of `--policies`, and makes their plans.

  Args:
    values: the entries, `POLICY` or `POLICY:FIELD=VALUE:...`, or FILE.json for the policy.
    config: of the model.
    sample: what entries change.
    weights: gives the digest of the model's, for plan files (see `load_plan`).

  Raises:
    ValueError: for no entry, one that stands twice, an unknown policy or field, a field that the
      policy does not read, a value that is not of the field's type or out of range, a wrong plan
      file; starts with the entry.
  """
  names = [value.strip() for value in values]
  if not any(names):
    raise ValueError("--policies: found no policy, expected a list such as full,marche")
  entries = []
  for name in names:
    if names.count(name) > 1:
      raise ValueError(f"--policies: {name!r} stands there twice")
    policy, *changes = name.split(":")
    fields: dict[str, object] = {}
    try:
      for change in changes:
        field, value = _parse_change(change)
        if field in fields:
          raise ValueError(f"{field} stands there twice")
        fields[field] = value
      changed = dataclasses.replace(sample, **fields)  # type: ignore[arg-type]
      changed = with_policy(policy, config, changed, fields, weights)
      plan = make_plan(config, changed)
    except ValueError as error:
      raise ValueError(f"--policies, {name!r}: {error}") from error
    entries.append(Entry(name, changed, plan))
  return entries


def with_policy(
  policy: str,
  config: ModelConfig,
  sample: SampleConfig,
  asked: Iterable[str],
  weights: Callable[[], str] | None = None,
) -> SampleConfig:
  """`sample` under a policy.

  Args:
    policy: its name, or the plan file (FILE.json) of `sample --calibrate`.
    config: of the model.
    sample: how to decode otherwise.
    asked: fields of it that somebody asked for, which must not go unread.
    weights: gives the digest of the model's, for a plan file (see `load_plan`).

  Raises:
    ValueError: for an unknown policy, a field that goes unread, a wrong plan file.
  """
  asked = list(asked)
  if not policy.endswith(".json"):
    check_fields(policy, asked, sample.cfg != 1.0)
    return dataclasses.replace(sample, policy=policy)
  for field in asked:
    if field in (*FILE_FIELDS, "refresh_interval"):
      raise ValueError(f"sample.{field} is not read: {policy} decides on it")
  loaded = load_plan(user_path(policy, "policy"), config, sample, weights)
  check_fields(loaded.policy, asked, loaded.cfg != 1.0)
  return loaded


def baseline(entries: Sequence[Entry]) -> Entry:
  """The entry that others are compared with: the one named `full`, else the first."""
  return next((entry for entry in entries if entry.name == BASELINE), entries[0])


def _parse_change(change: str) -> tuple[str, object]:
  """`field=value` as the field and the value, of the field's type."""
  field, equals, text = change.partition("=")
  if not equals:
    raise ValueError(f"found {change!r}, expected FIELD=VALUE")
  if field not in FIELDS:
    raise ValueError(f"unknown field {field!r}; expected one of {', '.join(FIELDS)}")
  return field, parse_value(field, text)


def parse_value(field: str, text: str) -> object:
  """A value of a field of `SampleConfig`, of the field's type; lists are joined by +.

  Raises:
    ValueError: where the text is none; names the field.
  """
  kind = FIELDS[field]
  if kind is bool:
    if text.lower() not in ("true", "false"):
      raise ValueError(f"{field}={text!r}: expected true or false")
    return text.lower() == "true"
  if kind is str:
    return text
  try:
    if kind in (int, float):
      return kind(text)
    return tuple(int(number) for number in text.split("+"))
  except ValueError:
    wanted = {int: "an integer", float: "a number"}.get(kind, "integers joined by +")
    raise ValueError(f"{field}={text!r}: expected {wanted}") from None
