"""Whether a batch fits: what is left, what is needed, and the one line where it is too much."""

from __future__ import annotations

import dataclasses
import pathlib
import types

import golden
import jax
import numpy as np
import pytest
import tiny
from golden import quick_programs as quick_programs

from marche_jax.benchmarking.timing import Options, Program
from marche_jax.decoding import memory
from marche_jax.decoding.generation import generate
from marche_jax.decoding.plan_runner import PlanRunner
from marche_jax.planning.policies import make_plan
from marche_jax.weights.checkpoint import Model

MEMINFO = "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 4000 kB\nSwapFree: 96 kB\n"


def files(root: pathlib.Path, contents: dict[str, str]) -> pathlib.Path:
  for name, text in contents.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
  return root


@pytest.mark.parametrize(
  ("contents", "expected"),
  [
    ({}, 4096 * 1024),
    (  # version 2: a limit above the process's group, and pages of files that can go
      {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/b/memory.current": "5\n",
        "sys/fs/cgroup/a/memory.max": "1000\n", "sys/fs/cgroup/a/memory.current": "700\n",
        "sys/fs/cgroup/a/memory.stat": "anon 600\ninactive_file 50\n",
      },
      350,
    ),
    (  # a container with a name space of its own
      {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "900\n", "sys/fs/cgroup/memory.current": "1000\n",
      },
      -100,
    ),
    (  # version 1, in a container that does not show the path
      {
        "proc/self/cgroup": "3:cpu,cpuacct:/x\n2:memory:/x/y\n1:name=systemd:/z\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1500\n",
        "sys/fs/cgroup/memory/memory.stat": "inactive_file 7\ntotal_inactive_file 100\n",
      },
      600,
    ),
  ],
)  # fmt: skip
def test_what_is_left_of_the_machine(
  contents: dict[str, str], expected: int, tmp_path: pathlib.Path
) -> None:
  root = files(tmp_path, {"proc/meminfo": MEMINFO, **contents})
  assert memory.host_bytes(root) == expected


def test_without_linux_all_memory_counts(tmp_path: pathlib.Path) -> None:
  there, real = memory.host_bytes(tmp_path), memory.host_bytes()
  assert real is not None and 0 < real and (there is None or there > 2**20)


def device(platform: str, **stats: int) -> jax.Device:
  return types.SimpleNamespace(platform=platform, memory_stats=lambda: stats or None)  # type: ignore[return-value]


def test_what_is_left_of_an_accelerator() -> None:
  assert memory.available_bytes(device("gpu", bytes_limit=100, bytes_in_use=30)) == 70
  assert memory.available_bytes(device("tpu")) is None
  memory.check_fits(2**60, 1, [device("tpu")])  # nobody says


@pytest.mark.parametrize(
  ("left", "batch", "devices", "message"),
  [
    (2**30, 50, 1, "a batch of 50 images needs 3.0 GiB of memory, 1.0 GiB are there: the largest "
     "batch that fits has about 16$"),
    (2**30, 50, 4, "the largest batch that fits has about 16$"),
    (2**30, 8, 4, "not even fewer fit$"),
    (2**19, 1, 1, "needs 3.0 GiB of memory, 524288 bytes are there: not even fewer fit$"),
    (-5, 50, 1, "-5 bytes are there: not even fewer fit$"),
  ],
)  # fmt: skip
def test_the_largest_batch_by_proportion(left: int, batch: int, devices: int, message: str) -> None:
  several = [device("gpu", bytes_limit=left)] * devices
  with pytest.raises(ValueError, match=message):
    memory.check_fits(3 * 2**30, batch, several)
  memory.check_fits(left, batch, several)


def test_devices_of_a_cpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(memory, "host_bytes", lambda: 100)
  memory.check_fits(50, 4, [device("cpu")] * 2)
  with pytest.raises(ValueError, match="needs 102 bytes of memory, 100 bytes are there"):
    memory.check_fits(51, 4, [device("cpu")] * 2)


@pytest.fixture(scope="module")
def model() -> Model:
  marche = dataclasses.replace(tiny.SAMPLE, policy="marche")
  return Model(tiny.MODEL, golden.random_params(tiny.MODEL), sample_config=marche)


def test_programs_that_do_not_fit(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
  """Under all that compiles them; what fits exactly is drawn, and compiled once for that."""
  assert model.sample_config is not None
  plan = make_plan(tiny.MODEL, model.sample_config)
  runner = PlanRunner(plan)
  runner.compile(model.params, 2)
  assert runner.compiled is not None
  sizes = memory.program_bytes(runner.compiled)
  assert sizes is not None
  needed = sizes["peak"] - memory.tree_bytes(model.params)
  state = memory.tree_bytes(jax.eval_shape(lambda: runner.start(jax.random.split(KEY, 2))))
  assert plan.cache_bytes_per_image < state / 2 < needed / 2

  monkeypatch.setattr(memory, "host_bytes", lambda: needed)
  compiled: list[str] = []

  def listen(event: str, _: float, **about: str) -> None:
    if event.endswith("backend_compile_duration") and "decode" in about.get("fun_name", ""):
      compiled.append(event)

  jax.clear_caches()
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    drawn = generate(model, [0, 1], KEY)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert len(compiled) == 1 and np.isfinite(drawn).all()

  monkeypatch.setattr(memory, "host_bytes", lambda: needed - 1)
  message = "a batch of 2 images needs .* are there: the largest batch that fits has about 1$"
  with pytest.raises(ValueError, match=message):
    generate(model, [0, 1], KEY)
  with pytest.raises(ValueError, match=message):
    PlanRunner(plan).compile(model.params, 2)
  with pytest.raises(ValueError, match=message):
    Program(plan, model.params, Options(batch_size=2))

  monkeypatch.setattr(memory, "host_bytes", lambda: state - 1)
  monkeypatch.setattr(PlanRunner, "lower", lambda *_: pytest.fail("traced"))
  with pytest.raises(ValueError, match=message):
    PlanRunner(plan).compile(model.params, 2)


KEY = jax.random.key(0)
