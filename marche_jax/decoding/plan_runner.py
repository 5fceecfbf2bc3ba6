"""Running a plan: the compiled program called chunk by chunk of iterations, and looked after."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from numpy.typing import ArrayLike

from marche_jax.decoding import memory, sampler
from marche_jax.decoding import state as state_lib
from marche_jax.decoding.given import Known, initial_state
from marche_jax.decoding.recording import Trace
from marche_jax.decoding.state import DecodeState, Inputs, Noise, Rows
from marche_jax.models.mar import Params
from marche_jax.planning.plan import DecodePlan

Tree = TypeVar("Tree")


class NonFiniteLatentsError(ValueError):
  """An iteration sampled NaN or infinite tokens."""


class Chunk(NamedTuple):
  """Some consecutive iterations, just done."""

  start: int  # the first of them
  end: int  # the one after the last: so many iterations are done now
  state: DecodeState  # afterwards; the next chunk takes its memory
  trace: Trace | None  # of these iterations, where it was asked for


class PlanRunner:
  """A plan made ready to run, in chunks of a few iterations that can be looked at in between.

  Attributes:
    plan: what it runs.
    mesh: of the devices that share the images; None: one device.
    rows: of the plan, each [R].
    chunk: iterations per call of the compiled program.
    compiled: that program for one batch size, where it was compiled ahead of the first call.
  """

  def __init__(
    self,
    plan: DecodePlan,
    *,
    dtype: DTypeLike = jnp.float32,
    head_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    chunk: int | None = None,
    trace: bool = False,
  ) -> None:
    """Makes ready; compiles nothing.

    Args:
      plan: what to run.
      dtype, head_dtype, trace: as in `sampler.decode`; a trace is of one device alone.
      mesh: shard images over its `data` axis.
      chunk: iterations per call; default: all.
    """
    assert mesh is None or not trace
    self.plan, self.mesh = plan, mesh
    self.chunk = len(plan.rows) if chunk is None else min(chunk, len(plan.rows))
    self.compiled: jax.stages.Compiled | None = None
    self.rows, self._tables = state_lib.plan_rows(plan)
    create: Callable[..., DecodeState] = functools.partial(state_lib.empty_state, plan, dtype=dtype)
    if mesh is not None and plan.cache_halves:  # caches are made where they are used
      specs = state_lib.state_specs(plan, "data")
      shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
      create = jax.jit(create, out_shardings=shardings)
    self._create = create
    self._decode: jax.stages.Wrapped
    self._static: dict[str, object]
    if mesh is not None:
      self._decode = sampler.sharded_decode(mesh, plan, dtype=dtype, head_dtype=head_dtype)
      self._static = {}
      return
    # Without a mesh the jitted function is shared, and its programs with it.
    self._decode = sampler.jitted_decode
    self._static = {
      "config": plan.config, "step_shapes": plan.step_shapes, "dtype": dtype,
      "head_dtype": head_dtype, "trace": trace,
    }  # fmt: skip

  def place(self, params: Tree) -> Tree:
    """Parameters where the program reads them: on every device of the mesh."""
    if self.mesh is None:
      return params
    return jax.device_put(params, NamedSharding(self.mesh, PartitionSpec()))

  def start(
    self, keys: jax.Array, order: ArrayLike | None = None, known: Known | None = None
  ) -> DecodeState:
    """The state before the first iteration; see `initial_state`. Caches lie where they are used."""
    state = initial_state(self.plan, keys, order, known)
    return self._create(state.tokens, state.by_rank)

  def row_chunks(self) -> Iterator[tuple[int, Rows]]:
    """(iterations done after it, rows of a chunk), the last chunk padded: `state.chunks`."""
    return state_lib.chunks(self.rows, self.chunk)

  def _batch(self, batch_size: int) -> tuple[DecodeState, Inputs]:
    """Shapes of a batch's state and inputs."""

    def start_of_batch() -> tuple[DecodeState, Inputs]:
      keys = state_lib.image_keys(state_lib.run_key(0), jnp.arange(batch_size))
      return self.start(keys), Inputs(jnp.zeros(batch_size, jnp.int32), keys)

    return jax.eval_shape(start_of_batch)

  def lower(
    self, params: Params, batch_size: int, noise: Noise | None = None
  ) -> jax.stages.Lowered:
    """Traces the program of a chunk for a batch size; `noise` as in `Inputs`."""
    state, inputs = self._batch(batch_size)
    if noise is not None:
      inputs = dataclasses.replace(inputs, noise=jax.tree.map(self._cut(0, self.chunk), noise))
    _, rows = next(self.row_chunks())
    return self._decode.lower(params, state, rows, self._tables, inputs, **self._static)

  def compile(self, params: Params, batch_size: int) -> float:
    """Compiles for a batch size ahead of the first call; returns the seconds it took.

    Raises:
      ValueError: where there is too little memory; says how many images fit. Where the state of a
        batch, caches above all, is too large by itself, nothing is compiled.
    """
    start = time.perf_counter()
    self.check_state(batch_size)
    self.compile_lowered(self.lower(params, batch_size), params, batch_size)
    return time.perf_counter() - start

  def compile_lowered(self, lowered: jax.stages.Lowered, params: Params, batch_size: int) -> None:
    """Compiles what `lower` gave for these arguments; errors as `compile`."""
    compiled = lowered.compile()
    self._check_program(compiled, params, batch_size)
    self.compiled = compiled

  def check_memory(self, params: Params, batch_size: int, noise: Noise | None = None) -> None:
    """Raises ValueError as `compile`; arguments as `lower`.

    Unlike after `compile`, arguments may lie on any device: the first call compiles for them, but
    where that was done here jax takes the program from its cache.
    """
    self.check_state(batch_size)
    self._check_program(self.lower(params, batch_size, noise).compile(), params, batch_size)

  def check_state(self, batch_size: int) -> None:
    """Raises ValueError where the state of a batch, caches above all, does not fit the devices."""
    state, _ = self._batch(batch_size)
    needed = memory.tree_bytes(state) // (1 if self.mesh is None else self.mesh.size)
    memory.check_fits(needed, batch_size, self._devices())

  def _check_program(self, program: jax.stages.Compiled, params: Params, batch_size: int) -> None:
    if sizes := memory.program_bytes(program):
      needed = sizes["peak"] - memory.tree_bytes(params)  # which are there already
      memory.check_fits(needed, batch_size, self._devices())

  def _devices(self) -> list[jax.Device]:
    return jax.local_devices()[:1] if self.mesh is None else list(self.mesh.local_devices)

  def call(
    self, params: Params, state: DecodeState, rows: Rows, inputs: Inputs
  ) -> tuple[DecodeState, jax.Array, Trace | None]:
    """`sampler.decode` of as many rows as a chunk has; takes the state's memory."""
    if self.compiled is not None:
      return self.compiled(params, state, rows, self._tables, inputs)
    return self._decode(params, state, rows, self._tables, inputs, **self._static)

  def run(self, params: Params, state: DecodeState, inputs: Inputs) -> Iterator[Chunk]:
    """Runs the plan from a state, whose memory it takes, a chunk at a time.

    Args:
      params: of `MAR`.
      state: of `start`, of this plan or of one with the caches that a caller wants filled.
      inputs: of the batch; given noise is that of all iterations.

    Raises:
      NonFiniteLatentsError: names the iteration and the images (by their number in the batch).
    """
    noise, start = inputs.noise, 0
    for end, rows in self.row_chunks():
      if noise is not None:
        part = jax.tree.map(self._cut(start, end), noise)
        inputs = dataclasses.replace(inputs, noise=part)
      state, finite, trace = self.call(params, state, rows, inputs)
      self._check(np.asarray(finite)[: end - start], start)
      if trace is not None and end - start < self.chunk:
        trace = jax.tree.map(lambda x, n=end - start: x[:n], trace)
      yield Chunk(start, end, state, trace)
      start = end

  def __call__(self, params: Params, state: DecodeState, inputs: Inputs) -> jax.Array:
    """Runs the plan as `run` does; the tokens in the end, float32 [B, S, C]."""
    for chunk in self.run(params, state, inputs):
      state = chunk.state
    return state.tokens

  def _check(self, finite: np.ndarray, start: int) -> None:
    """Raises where, by bool [iterations, B] from iteration `start` on, not all is finite."""
    if finite.all():
      return
    k = int((~finite).any(axis=1).argmax())
    images = ", ".join(map(str, np.flatnonzero(~finite[k])))
    raise NonFiniteLatentsError(
      f"non-finite latents at iteration {start + k} of {len(self.plan.rows)}, in images "
      f"{images} of the batch (from 0). At timestep 999 the cosine schedule multiplies errors "
      "of the head by 2e4, which an undertrained head does not survive: try "
      "sample.max_timestep=950, float32, or a lower sample.cfg."
    )

  def _cut(self, start: int, end: int) -> Callable[[np.ndarray], np.ndarray]:
    """Cuts [R, ...] to the iterations of a chunk, padded as `state.chunks` pads rows."""

    def cut(x: np.ndarray) -> np.ndarray:
      pad = self.chunk - (end - start)
      return np.pad(x[start:end], ((0, pad),) + ((0, 0),) * (x.ndim - 1))

    return cut
