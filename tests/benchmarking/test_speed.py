"""Policies measured side by side: the arithmetic of the report, its table and chart."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest
import tiny
from PIL import Image

from marche_jax.benchmark import random_params
from marche_jax.benchmarking import profiling, speed, tables
from marche_jax.benchmarking.entries import Entry, parse_entries
from marche_jax.benchmarking.reports import SpeedReport
from marche_jax.benchmarking.timing import Options
from marche_jax.decoding.state import IDLE
from marche_jax.models.mar import Params
from marche_jax.planning.plan import DecodePlan
from marche_jax.visualization import plots

NAMES = ["marche", "full", "gtr:num_iter=2"]
SECONDS = {"full": [8.0, 9.0, 10.0], "marche": [4.0, 3.0, 5.0], "gtr:num_iter=2": [2.0, 2.0, 2.0]}
"""Of a batch of two images."""

IDLE_SECONDS = [1.0, 0.5]
"""Of the second round of an estimate, and of its first."""

PARTS = {"encoder": 1.0, "decoder": 2.0, "head": 0.5}
PEAK = 1e9


@pytest.fixture
def entries() -> list[Entry]:
  return parse_entries(NAMES, tiny.MODEL, tiny.SAMPLE)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, entries: list[Entry]) -> list[str]:
  """Programs that are not compiled and whose seconds are `SECONDS`; what was run, in order."""
  called: list[str] = []
  name_of = {id(entry.plan): entry.name for entry in entries}

  class FakeProgram:
    lower_seconds, compile_seconds, from_cache = 0.25, 0.5, False

    def __init__(
      self, plan: DecodePlan, params: Params, options: Options, one_row: bool = False
    ) -> None:
      self.plan, self.params, self.options = plan, params, options
      self.name, self.one_row, self.idle = name_of[id(plan)], one_row, list(IDLE_SECONDS)
      called.append(f"compile {self.name}" + (", one row" if one_row else ""))
      self.seconds = [99.0, *SECONDS[self.name]]  # the first warms up

    def whole_run(self) -> float:
      called.append(self.name)
      return self.seconds.pop(0)

    def time_rows(self, numbers: list[int]) -> dict[int, float]:
      called.append(self.name)
      return dict.fromkeys(numbers, self.seconds.pop()) | {IDLE: self.idle.pop()}

    def warm_up(self) -> None:
      called.append(f"warm up {self.name}")
      if not self.one_row:  # of a check
        self.seconds = [20.0]

    def memory(self) -> dict[str, int]:
      return dict.fromkeys(("arguments", "outputs", "aliased", "temporary", "peak"), 2**20)

  monkeypatch.setattr(speed, "Program", FakeProgram)
  monkeypatch.setattr(profiling, "matmul_peak", lambda dtype: PEAK)

  def split(plan: DecodePlan, params: Params, batch_size: int, *_: object) -> dict[str, float]:
    scale = SECONDS[name_of[id(plan)]][0] / 8
    return {part: scale * value for part, value in PARTS.items()}

  monkeypatch.setattr(profiling, "split", split)
  return called


def compare(entries: list[Entry], **options: object) -> SpeedReport:
  params = random_params(tiny.MODEL)
  found = speed.compare(tiny.MODEL, params, entries, Options(batch_size=2, **options))
  report: SpeedReport = {"name": "tiny", "weights": "random", **found}
  assert json.loads(json.dumps(report)) == json.loads(json.dumps(report, allow_nan=False))
  return report


def test_report(calls: list[str], entries: list[Entry], tmp_path: pathlib.Path) -> None:
  report = compare(entries)
  assert calls == [*(f"compile {name}" for name in NAMES), *(4 * NAMES)]  # in turns
  assert report["baseline"] == "full" and not report["estimated"]
  found = report["policies"]
  assert list(found) == NAMES
  full, marche = found["full"], found["marche"]
  assert full["seconds_per_image"] == {"typical": 4.5, "min": 4.0, "max": 5.0}
  assert marche["runs"] == [2.0, 1.5, 2.5]
  assert full["speedup"] == full["predicted_speedup"] == full["transformer_speedup"] == 1
  assert marche["speedup"] == pytest.approx(4.5 / 2)
  assert marche["transformer_speedup"] == pytest.approx(2)  # the split of `SECONDS[name][0]`
  assert full["split_seconds"] == PARTS | {"other": 1.0}
  for entry in entries:
    policy = found[entry.name]
    predicted = entries[1].plan.flops().total / entry.plan.flops().total
    assert policy["predicted_speedup"] == pytest.approx(predicted)
    assert policy["measured_over_predicted"] == pytest.approx(policy["speedup"] / predicted)
    flops = entry.plan.flops()
    fraction = flops.total / policy["seconds_per_image"]["typical"] / PEAK
    assert policy["fraction_of_peak"]["total"] == pytest.approx(fraction)
    head = flops.head / policy["split_seconds"]["head"] / PEAK
    assert policy["fraction_of_peak"]["head"] == pytest.approx(head)
    assert policy["gflops_per_image"]["total"] == pytest.approx(flops.total / 1e9)
    exact = entry.plan.flops(padded=False).total
    assert policy["gflops_per_image"]["without_padding"] == pytest.approx(exact / 1e9)
    assert policy["cache_bytes_per_image"] == entry.plan.cache_bytes_per_image
    assert len(policy["shapes"]) == policy["step_shapes"] == len(entry.plan.step_shapes)
  text = tables.speed_table(report)
  rows = [line.split() for line in text.splitlines()]
  assert any(row[:6] == ["marche", "2.00", "1.50", "to", "2.50", "2.25"] for row in rows)
  assert "whole run" not in text
  plots.plot_speed(tmp_path / "speed.png", report)
  assert Image.open(tmp_path / "speed.png").format == "PNG"


def test_estimate(calls: list[str], entries: list[Entry], tmp_path: pathlib.Path) -> None:
  """Every row takes as long as the fake says, so a run takes rows times that, and an idle call."""
  report = compare(entries, estimate=True, check=True, repeats=2, split=False)
  compiled = [f"compile {name}" for name in NAMES]
  warm = [f"warm up {name}" for name in NAMES]
  assert calls[:12] == [*(f"{line}, one row" for line in compiled), *warm, *(2 * NAMES)]
  assert calls[12:] == [
    line for name in NAMES for line in (f"compile {name}", f"warm up {name}", name)
  ]
  for entry in entries:
    policy, rows = report["policies"][entry.name], len(entry.plan.rows)
    of_rows = [rows * seconds / 2 for seconds in SECONDS[entry.name][:0:-1]]
    timed = [(idle / 2 + seconds) for idle, seconds in zip(IDLE_SECONDS[::-1], of_rows)]
    assert policy["runs"] == pytest.approx(timed)
    least = min(IDLE_SECONDS) / 2 + min(of_rows)
    most = max(IDLE_SECONDS) / 2 + max(of_rows)
    assert policy["seconds_per_image"] == pytest.approx(
      {"typical": least, "min": least, "max": most}
    )
    assert policy["whole_run_seconds"] == 10
    assert policy["estimate_over_whole_run"] == pytest.approx(least / 10)
    assert policy["split_seconds"] is None and policy["transformer_speedup"] is None
  assert "estimated from single rows" in tables.speed_table(report)
  assert "estimate / whole" in tables.speed_table(report)
  plots.plot_speed(tmp_path / "speed.png", report)


def test_one_policy_has_a_report_of_one_level(calls: list[str], entries: list[Entry]) -> None:
  report = speed.single(compare(entries[:1]))
  assert report["policy"] == "marche" and report["runs"] == [2.0, 1.5, 2.5]
  assert report["sample"]["num_iter"] == tiny.SAMPLE.num_iter
  assert not report.keys() & {"policies", "baseline", "speedup", "predicted_speedup"}
  text = tables.single_table(report)
  assert "policy marche, 4 iterations" in text and "(median of 3; 1.500 to 2.500)" in text
  rows = [line.split() for line in text.splitlines()]
  assert any(row[:3] == ["head", "0.250", "12%"] for row in rows)


def test_one_estimate_says_so(calls: list[str], entries: list[Entry]) -> None:
  report = speed.single(compare(entries[1:2], estimate=True, check=True, repeats=2))
  text = tables.single_table(report)
  assert f"estimated from {report['timed_rows']} of 4 rows" in text and "whole run" in text


def test_dtypes(calls: list[str], entries: list[Entry]) -> None:
  report = compare(entries[:1], dtype="bfloat16", head_dtype="float32")
  assert (report["dtype"], report["head_dtype"]) == ("bfloat16", "float32")
  assert dataclasses.asdict(tiny.MODEL) == report["model"]
