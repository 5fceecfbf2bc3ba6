"""Timing the sampler's own program: whole runs, or single rows that stand for all.

A whole run of a large model takes long, and its iterations resemble each other. An **estimate**
times one row of every step shape in the sampler's own program, compiled for one row, and weights it
by the plan. Where rows of a shape differ in their diffusion steps, the one with the fewest and the
one with the most are timed, and the others interpolated: time is linear in them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from marche_jax.decoding import state as state_lib
from marche_jax.decoding.memory import program_bytes
from marche_jax.decoding.plan_runner import PlanRunner
from marche_jax.decoding.state import IDLE, DecodeState, Inputs, Rows
from marche_jax.models.mar import Params
from marche_jax.planning.plan import DecodePlan


@dataclasses.dataclass(frozen=True)
class Options:
  """How to measure."""

  batch_size: int = 1  # images decoded together
  repeats: int = 3  # timed runs of every policy, or timings of every row of an estimate
  dtype: DTypeLike = jnp.float32  # as in `sampler.decode`
  head_dtype: DTypeLike = jnp.float32
  estimate: bool = False  # time single rows, not whole runs
  check: bool = False  # with an estimate: also time one whole run of every policy
  split: bool = True  # also time encoder, decoder and head apart

  def __post_init__(self) -> None:
    for field in ("batch_size", "repeats"):
      if getattr(self, field) < 1:
        raise ValueError(f"{field}={getattr(self, field)}: expected at least 1")
    if self.check and not self.estimate:
      raise ValueError("check=True: expected an estimate to check")


class Program:
  """The sampler's program of one policy, compiled."""

  def __init__(
    self, plan: DecodePlan, params: Params, options: Options, one_row: bool = False
  ) -> None:
    """Compiles for all rows of the plan in one call, or for one row per call."""
    self.plan, self.params, self.options = plan, params, options
    self._runner = PlanRunner(
      plan, dtype=options.dtype, head_dtype=options.head_dtype, chunk=1 if one_row else None
    )
    self.rows = [rows for _, rows in self._runner.row_chunks()]
    size = options.batch_size
    self._keys = state_lib.image_keys(state_lib.run_key(0), jnp.arange(size, dtype=jnp.uint32))
    labels = jnp.arange(size, dtype=jnp.int32) % plan.config.class_num
    self._inputs = Inputs(labels, self._keys)

    self._runner.check_state(size)
    clock = time.perf_counter()
    lowered = self._runner.lower(params, size)
    self.lower_seconds = time.perf_counter() - clock
    clock = time.perf_counter()
    with _cache_hits() as hits:
      self._runner.compile_lowered(lowered, params, size)
    self.compile_seconds = time.perf_counter() - clock
    self.from_cache = bool(hits)

  def memory(self) -> dict[str, int]:
    """Bytes of a batch: see `memory.program_bytes`; the state is argument and output."""
    assert self._runner.compiled is not None
    found = program_bytes(self._runner.compiled)
    assert found is not None
    return found

  def start(self) -> DecodeState:
    """The state before the first iteration."""
    return jax.block_until_ready(self._runner.start(self._keys))

  def call(self, state: DecodeState, rows: Rows) -> tuple[float, DecodeState, np.ndarray]:
    """Runs rows; (seconds, the state afterwards, whether images are finite after each)."""
    clock = time.perf_counter()
    done = self._runner.call(self.params, state, rows, self._inputs)
    state, finite, _ = jax.block_until_ready(done)
    return time.perf_counter() - clock, state, np.asarray(finite)

  def whole_run(self) -> float:
    """Seconds of decoding a batch, from a fresh state.

    Raises:
      NonFiniteLatentsError: where an iteration gives NaN or infinity.
    """
    state = self.start()
    clock = time.perf_counter()
    jax.block_until_ready(self._runner(self.params, state, self._inputs))
    return time.perf_counter() - clock

  def warm_up(self) -> None:
    """Runs one row of every step shape: the first use of memory takes longer than later ones."""
    first_rows = [few for few, _ in rows_to_time(self.plan).values()]
    state, start = self.start(), 0
    for rows in self.rows:
      chosen = np.isin(np.arange(start, start + len(rows.shape_id)), first_rows)
      if chosen.any():
        _, state, _ = self.call(state, _only(rows, chosen))
      start += len(rows.shape_id)

  def time_rows(self, numbers: Sequence[int]) -> dict[int, float]:
    """Seconds of an idle call, under `IDLE`, and of rows, each in a call of its own, beyond it.

    Unlike `PlanRunner.run` this does not follow the plan, nor look at the tokens: the state is
    handed from one to the next, and what is in it does not matter for the time.
    """
    idle = _only(self.rows[0], np.zeros(1, bool))
    _, state, _ = self.call(self.start(), idle)  # takes the fresh state's memory
    found = {}
    found[IDLE], state, _ = self.call(state, idle)
    for number in numbers:
      seconds, state, _ = self.call(state, self.rows[number])
      found[number] = seconds - found[IDLE]
    return found


def _only(rows: Rows, chosen: np.ndarray) -> Rows:
  """Rows of which those not chosen run nothing."""
  return dataclasses.replace(rows, shape_id=np.where(chosen, rows.shape_id, IDLE).astype(np.int32))


def rows_to_time(plan: DecodePlan) -> dict[int, tuple[int, int]]:
  """For every step shape, the numbers of its rows with the fewest and the most diffusion steps."""
  found = {}
  for shape in range(len(plan.step_shapes)):
    numbers = [k for k, row in enumerate(plan.rows) if row.shape_id == shape]
    count = {k: plan.diffusion_steps(plan.rows[k]) for k in numbers}
    found[shape] = min(numbers, key=count.__getitem__), max(numbers, key=count.__getitem__)
  return found


def sum_over_rows(plan: DecodePlan, measured: dict[int, float]) -> float:
  """Adds up what all rows take, given those of `rows_to_time`: linear in the diffusion steps."""
  timed, total = rows_to_time(plan), 0.0
  for row in plan.rows:
    few, many = timed[row.shape_id]
    fewest, most = plan.diffusion_steps(plan.rows[few]), plan.diffusion_steps(plan.rows[many])
    share = (plan.diffusion_steps(row) - fewest) / (most - fewest) if most > fewest else 0.0
    total += measured[few] + share * (measured[many] - measured[few])
  return total


def estimate_seconds(plan: DecodePlan, measured: dict[int, float]) -> float:
  """Seconds of a whole run.

  Args:
    plan: of the run.
    measured: of `Program.time_rows`, at least for the rows that `rows_to_time` names: what every
      call costs is counted once.
  """
  return measured[IDLE] + sum_over_rows(plan, measured)


T = TypeVar("T")


def interleave(
  runs: dict[str, Callable[[], T]], repeats: int, progress: Callable[[str], None] = lambda _: None
) -> dict[str, list[T]]:
  """What every run returned in each round; the runs take turns: A B C A B C."""
  found: dict[str, list[T]] = {name: [] for name in runs}
  for number in range(repeats):
    for name, run in runs.items():
      progress(f"round {number + 1} of {repeats}: {name}")
      found[name].append(run())
  return found


@contextlib.contextmanager
def _cache_hits() -> Iterator[list[str]]:
  """Collects an entry for every program that jax takes from its persistent compilation cache."""
  hits: list[str] = []

  def listen(event: str, **_: str | int) -> None:
    if event == "/jax/compilation_cache/cache_hits":
      hits.append(event)

  jax.monitoring.register_event_listener(listen)
  try:
    yield hits
  finally:
    jax.monitoring.unregister_event_listener(listen)
