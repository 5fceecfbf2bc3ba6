"""Compiles the sharded sampler for TPU chips, without a TPU, and prints what came out as JSON.

`test_tpu.py` runs this as a process of its own, with a Python that has the extra `tpu`: the
compiler in libtpu must not be seen by a process that computes on another backend. By hand:

    export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1
    python tests/decoding/tpu_compile.py configs/mar_base.py 64
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import runpy
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from marche_jax.config import SampleConfig, freeze
from marche_jax.decoding import head_sampler, sampler
from marche_jax.decoding import state as state_lib
from marche_jax.decoding.state import Inputs
from marche_jax.models.mar import abstract_params, inference_params
from marche_jax.planning import cost
from marche_jax.planning.plan import DecodePlan
from marche_jax.planning.policies import make_plan
from marche_jax.planning.shapes import StepShape

TOPOLOGY = "v5e:2x4"
COLLECTIVES = (
  "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute",
  "ragged-all-to-all", "reduce-scatter",
)  # fmt: skip


def collectives(hlo: str) -> list[str]:
  """Names of the collective instructions in the text of a compiled program."""
  names = "|".join(COLLECTIVES)
  return sorted(set(re.findall(rf" ({names})(?:-start)?\(", hlo)))


def compile_psum(mesh: Mesh) -> Any:
  """A compiled sum over the mesh: a program in which `collectives` must find one."""
  total = jax.shard_map(
    lambda x: jax.lax.psum(x, "data"),
    mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec(),
  )  # fmt: skip
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  return jax.jit(total).lower(jax.ShapeDtypeStruct((1024,), "float32", sharding=sharding)).compile()


@dataclasses.dataclass(frozen=True)
class Request:
  """What to compile: a plan on a mesh, in bfloat16."""

  mesh: Mesh
  plan: DecodePlan
  batch_per_chip: int

  def compile(self, shapes: tuple[StepShape, ...], num_rows: int) -> tuple[Any, float]:
    """The compiled `sharded_decode` of rows with `shapes`, and the seconds it took."""
    plan = self.plan
    config, batch = plan.config, self.batch_per_chip * self.mesh.size

    def give(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, spec))

    def everywhere(tree: Any) -> Any:
      return jax.tree.map(lambda x: give(x, PartitionSpec()), tree)

    params = jax.eval_shape(
      functools.partial(inference_params, dtype=jnp.bfloat16), abstract_params(config)
    )
    rows, tables = state_lib.plan_rows(plan)
    rows = jax.tree.map(lambda x: x[:num_rows], rows)
    state, inputs = jax.eval_shape(
      lambda: (
        state_lib.empty_state(
          plan,
          jnp.zeros((batch, config.seq_len, config.token_dim)),
          jnp.zeros((batch, config.seq_len), jnp.int32),
          jnp.bfloat16,
        ),
        Inputs(
          jnp.zeros(batch, jnp.int32), state_lib.image_keys(jax.random.key(0), jnp.arange(batch))
        ),
      )
    )
    state = jax.tree.map(give, state, state_lib.state_specs(plan, "data"))
    inputs = jax.tree.map(lambda x: give(x, PartitionSpec("data")), inputs)
    decode = sampler.sharded_decode(
      self.mesh,
      plan,
      step_shapes=shapes,
      dtype=jnp.bfloat16,
      head_dtype=jnp.bfloat16,
    )
    start = time.monotonic()
    compiled = decode.lower(
      everywhere(params), state, *everywhere((rows, tables)), inputs
    ).compile()
    return compiled, time.monotonic() - start

  def cache_bytes(self) -> int:
    """Keys and values in bfloat16 on one chip."""
    c = self.plan.config
    width = c.encoder_depth * c.encoder_embed_dim + c.decoder_depth * c.decoder_embed_dim
    sequences = self.plan.cache_halves * self.batch_per_chip
    return 2 * 2 * sequences * c.num_tokens * width


def copies_of_caches(hlo: str, plan: DecodePlan, batch: int) -> int:
  """Instructions in the text of a compiled program that copy a whole stack's keys or values."""
  c, sequences = plan.config, plan.cache_halves * batch
  positions = c.num_tokens
  shapes = {
    f"{depth},{sequences},{positions},{width}"
    for depth, width in (
      (c.encoder_depth, c.encoder_embed_dim), (c.decoder_depth, c.decoder_embed_dim)
    )
  }  # fmt: skip
  return len(re.findall(rf"= bf16\[(?:{'|'.join(shapes)})\]\S* copy(?:-done)?\(", hlo))


def bodies_once(plan: DecodePlan, shape: StepShape, batch: int) -> float:
  """FLOPs of an iteration as the compiler counts them: the body of every loop once.

  The loops over layers have one body each, so that stacks of one layer (and the decoder's last one)
  are counted; the diffusion steps count as one that takes the modulations of several.
  """
  config = dataclasses.replace(plan.config, encoder_depth=1, decoder_depth=2)
  fewest = shape.head.diffusion_steps or shape.head.fewest
  halves = 2 if shape.guided else 1
  flops = cost.iteration_flops(config, shape, 1)
  together = head_sampler.steps_together(fewest, halves * batch * shape.head.slots)
  modulation = 2 * (3 * config.diffloss_d + 2) * config.diffloss_w**2
  extra = (together - 1) * halves * shape.head.slots * modulation
  return batch * (flops.total + extra)


def largest_shapes(plan: DecodePlan) -> tuple[StepShape, ...]:
  """Of step shapes that differ in their slots alone, the one with the most: what memory follows."""
  found: dict[tuple[bool, bool], StepShape] = {}
  for shape in sorted(plan.step_shapes, key=lambda s: (s.encoder.slots, s.head.slots)):
    found[shape.encoder.active is None, shape.decoder.active is None] = shape
  return tuple(found.values())


def flops_of_shapes(request: Request) -> list[dict[str, float]]:
  """Compiled and predicted FLOPs on one chip of every step shape, loop bodies counted once."""
  found = []
  for shape in request.plan.step_shapes:
    compiled, seconds = request.compile((shape,), num_rows=1)
    found.append(
      {
        "compiled": compiled.cost_analysis()["flops"],
        "predicted": bodies_once(request.plan, shape, request.batch_per_chip),
        "copies_of_caches": copies_of_caches(
          compiled.as_text(), request.plan, request.batch_per_chip
        ),
        "seconds": round(seconds, 1),
      }
    )
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("config", help="configuration file")
  parser.add_argument("batch_per_chip", type=int, help="images per chip")
  parser.add_argument("--policy", default="full")
  parser.add_argument("--steps", type=int, default=100, help="diffusion steps")
  parser.add_argument("--shapes", action="store_true", help="compile every step shape alone")
  parser.add_argument(
    "--largest", action="store_true", help="the largest step shape of each kind alone, together"
  )
  parser.add_argument("--hlo", help="file to write the compiled program's text to")
  args = parser.parse_args()
  config = freeze(runpy.run_path(args.config)["get_config"]())
  sample = SampleConfig(
    num_iter=64, cfg=3.0, cfg_schedule="linear", num_sampling_steps=args.steps, policy=args.policy
  )
  devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
  mesh = Mesh(np.asarray(devices), ("data",))  # its axes are Auto
  psum = compile_psum(mesh)
  request = Request(mesh, make_plan(config.model, sample), args.batch_per_chip)
  if args.shapes:
    print(json.dumps({"shapes": flops_of_shapes(request)}))
    return
  shapes = largest_shapes(request.plan) if args.largest else request.plan.step_shapes
  compiled, seconds = request.compile(shapes, len(request.plan.rows))
  memory, hlo = compiled.memory_analysis(), compiled.as_text()
  if args.hlo:
    with open(args.hlo, "w") as file:
      file.write(hlo)
  print(
    json.dumps(
      {
        "config": config.name,
        "policy": args.policy,
        "batch_per_chip": args.batch_per_chip,
        "step_shapes": [len(shapes), len(request.plan.step_shapes)],
        "cache_bytes": request.cache_bytes(),
        "copies_of_caches": copies_of_caches(hlo, request.plan, args.batch_per_chip),
        "compile_seconds": round(seconds, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "collectives": collectives(hlo),
        "collectives_of_psum": collectives(psum.as_text()),
        "flops": compiled.cost_analysis()["flops"],  # a loop's body counts once
        "predicted_flops": sum(
          bodies_once(request.plan, shape, args.batch_per_chip) for shape in shapes
        ),
      }
    )
  )


if __name__ == "__main__":
  main()
