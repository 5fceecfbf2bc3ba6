"""Entries of `--policies`: what they change, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest
import tiny

from marche_jax.benchmarking.entries import (
  ALL,
  FIELDS,
  all_entries,
  baseline,
  parse_entries,
  parse_value,
)
from marche_jax.config import SampleConfig
from marche_jax.planning.policies import POLICIES, check_fields, make_plan


def test_an_entry_changes_what_it_names_and_nothing_else() -> None:
  names = [
    "full",
    " marche+disa ",
    "marche:refresh_interval=2:condition_cache=true",
    "full:cfg=1.5",
  ]
  entries = parse_entries(names, tiny.MODEL, tiny.SAMPLE)
  assert [e.name for e in entries] == [name.strip() for name in names]
  changes = [
    {"policy": "full"},
    {"policy": "marche+disa"},
    {"policy": "marche", "refresh_interval": 2, "condition_cache": True},
    {"policy": "full", "cfg": 1.5},
  ]
  for entry, change in zip(entries, changes, strict=True):
    assert entry.sample == dataclasses.replace(tiny.SAMPLE, **change)
    assert entry.plan is make_plan(tiny.MODEL, entry.sample)


def test_values_are_of_the_fields_types() -> None:
  texts = {int: "3", float: "2.5", bool: "False", str: "text"}
  for field, kind in FIELDS.items():
    value = parse_value(field, texts.get(kind, "4+0"))
    assert isinstance(value, kind if isinstance(kind, type) else tuple)
  assert parse_value("refresh_iterations", "4+0+9") == (4, 0, 9)
  assert parse_value("detail_tokens", "TRUE") is True
  assert FIELDS.keys() == {f.name for f in dataclasses.fields(SampleConfig)} - {"policy"}


@pytest.mark.parametrize(
  ("names", "message"),
  [
    ([], "--policies: found no policy"),
    ([""], "--policies: found no policy"),
    (["full", ""], "--policies, '': .*unknown policy ''"),
    (["full", "full"], "--policies: 'full' stands there twice"),
    (["fast"], "--policies, 'fast': .*unknown policy 'fast'; expected one of full, "),
    (["marche+lazymar"], "marche.*contradict"),
    (["full:policy=gtr"], "unknown field 'policy'; expected one of num_iter, cfg, "),
    (["full:iterations=3"], "--policies, 'full:iterations=3': unknown field 'iterations'"),
    (["full:num_iter"], "found 'num_iter', expected FIELD=VALUE"),
    (["full:num_iter=2:num_iter=3"], "num_iter stands there twice"),
    (["full:num_iter=2.5"], "num_iter='2.5': expected an integer"),
    (["full:cfg=high"], "cfg='high': expected a number"),
    (["marche:condition_cache=1"], "condition_cache='1': expected true or false"),
    (["marche:refresh_iterations=0,2"], "refresh_iterations='0,2': expected integers joined by +"),
    (["marche:selection=best"], "sample.selection='best': expected one of"),
    (["lazymar+disa:active_size=9"], "active_size is a field of marche, which lazymar+disa does"),
    (["marche:head_cache=true"], "head_cache is a field of lazymar, which marche does not read"),
    (
      ["gtr+disa:detail_tokens=false"],
      "detail_tokens is not read by gtr+disa: disa brings its own",
    ),
    (
      ["marche:cfg=1:condition_cache=true"],
      "condition_cache is not read: sample.cfg=1 switches guidance off",
    ),
    (["full:cfg_schedule=constant:cfg=1.0"], "cfg_schedule is not read: sample.cfg=1 switches"),
    (
      ["marche:refresh_interval=2:refresh_iterations=0"],
      "refresh_interval and sample.refresh_iterations contradict each other",
    ),
    (["full:num_iter=17"], "--policies, 'full:num_iter=17': sample.num_iter=17: expected 1 to 16"),
  ],
)
def test_mistakes(names: list[str], message: str) -> None:
  with pytest.raises(ValueError, match=message.replace("+", r"\+")) as error:
    parse_entries(names, tiny.MODEL, tiny.SAMPLE)
  assert "\n" not in str(error.value)


def test_the_baseline_is_full_wherever_it_stands() -> None:
  entries = parse_entries(["full:num_iter=2", "marche", "full"], tiny.MODEL, tiny.SAMPLE)
  assert baseline(entries).name == "full"
  assert baseline(entries[:2]).name == "full:num_iter=2"


def test_all_names_every_policy_and_fewer_iterations() -> None:
  assert set(ALL) == POLICIES.keys()
  sample = dataclasses.replace(tiny.SAMPLE, num_iter=7)
  assert all_entries(sample) == ["full", "full:num_iter=3", *ALL[1:]]
  assert all_entries(dataclasses.replace(sample, num_iter=1))[1] == "full:num_iter=1"


def test_every_field_of_a_policy_can_be_changed_with_it() -> None:
  owned = {field: name for name, policy in POLICIES.items() for field in policy.fields}
  assert owned.keys() <= FIELDS.keys()
  for field, owner in owned.items():
    check_fields(owner, [field, "cfg"])
    with pytest.raises(ValueError, match=f"sample.{field} is a field of {owner}, which full does"):
      check_fields("full", ["cfg", field])


@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_policy_overrides_it_does_not_read(policy: str) -> None:
  """And only that: every other field of decoding that is not some policy's changes its plan."""
  changed = {
    "num_iter": 16, "cfg": 1.5, "cfg_schedule": "constant", "temperature": 0.5,
    "num_sampling_steps": 7, "max_timestep": 400, "solver": "dpm++",
  }  # fmt: skip
  given = dataclasses.replace(tiny.SAMPLE, policy=policy, num_iter=4, cfg=3.0, num_sampling_steps=9)

  def content(sample: SampleConfig) -> tuple:
    plan = make_plan(tiny.MODEL, sample)
    timesteps = [process.timesteps.tolist() for process in plan.processes]
    return plan.step_shapes, plan.rows, plan.temperature, timesteps

  for field, value in changed.items():
    same = content(dataclasses.replace(given, **{field: value})) == content(given)
    assert same == (field in POLICIES[policy].overrides), field
    if same:
      with pytest.raises(ValueError, match=f"{field} is not read by {policy}: {policy} brings"):
        check_fields(policy, [field])
    else:
      check_fields(policy, [field])
