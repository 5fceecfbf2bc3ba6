"""What a comparison compares: the entries of `--policies`.

An entry is a policy, with fields of `SampleConfig` changed where it says so:
`marche`, `marche+disa`, `marche:refresh_interval=9:select_layer=1`, `full:num_iter=32`.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence

from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.plan import DecodePlan
from marche_jax.policies import make_plan, unread_fields

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


def parse_entries(values: Sequence[str], config: ModelConfig, sample: SampleConfig) -> list[Entry]:
  """Reads the entries of `--policies`, and makes their plans.

  Args:
    values: the entries, `POLICY` or `POLICY:FIELD=VALUE:...`.
    config: of the model.
    sample: what entries change.

  Raises:
    ValueError: for no entry, one that stands twice, an unknown policy or field, a field that the
      policy does not read, a value that is not of the field's type or out of range; starts with the
      entry.
  """
  names = [value.strip() for value in values]
  if not any(names):
    raise ValueError("--policies: found no policy, expected a list such as full,marche")
  entries = []
  for name in names:
    if names.count(name) > 1:
      raise ValueError(f"--policies: {name!r} stands there twice")
    policy, *changes = name.split(":")
    fields: dict[str, object] = {"policy": policy}
    try:
      for change in changes:
        field, value = _parse_change(change)
        if field in fields:
          raise ValueError(f"{field} stands there twice")
        fields[field] = value
      changed = dataclasses.replace(sample, **fields)  # type: ignore[arg-type]
      plan = make_plan(config, changed)
      for field, owner in unread_fields(policy, fields).items():
        raise ValueError(f"{field} is a field of {owner}, which {policy} does not read")
    except ValueError as error:
      raise ValueError(f"--policies, {name!r}: {error}") from error
    entries.append(Entry(name, changed, plan))
  return entries


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
