"""Compiles the sharded sampler for TPU chips, without a TPU, and prints what came out as JSON.

`test_tpu.py` runs this as a process of its own, with a Python that has the extra `tpu-aot`: the
compiler in libtpu must not be seen by a process that computes on another backend. By hand:

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python tests/tpu_compile.py configs/mar_base.py 64
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

from marche_jax import sampler
from marche_jax.config import SampleConfig, freeze
from marche_jax.models.mar import abstract_params, inference_params
from marche_jax.plan import DecodePlan, StepShape
from marche_jax.policies import make_plan

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

  def compile(self, shapes: tuple[StepShape, ...] | None = None) -> tuple[Any, float]:
    """The compiled `sharded_decode` (of one row with `shapes`), and the seconds it took."""
    plan = self.plan if shapes is None else dataclasses.replace(self.plan, shapes=shapes)
    config, batch = plan.config, self.batch_per_chip * self.mesh.size

    def give(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, spec))

    def everywhere(tree: Any) -> Any:
      return jax.tree.map(lambda x: give(x, PartitionSpec()), tree)

    params = jax.eval_shape(
      functools.partial(inference_params, dtype=jnp.bfloat16), abstract_params(config)
    )
    rows, tables = sampler.plan_rows(plan)
    if shapes is not None:
      rows = jax.tree.map(lambda x: x[:1], rows)
    state, inputs = jax.eval_shape(
      lambda: (
        sampler.empty_state(
          self.plan,
          jnp.zeros((batch, config.seq_len, config.token_dim)),
          jnp.zeros((batch, config.seq_len), jnp.int32),
          jnp.bfloat16,
        ),
        sampler.Inputs(
          jnp.zeros(batch, jnp.int32), sampler.image_keys(jax.random.key(0), jnp.arange(batch))
        ),
      )
    )
    state = jax.tree.map(give, state, sampler.state_specs(self.plan, "data"))
    inputs = jax.tree.map(lambda x: give(x, PartitionSpec("data")), inputs)
    decode = sampler.sharded_decode(
      self.mesh, plan, dtype=jnp.bfloat16, head_dtype=jnp.bfloat16
    )
    start = time.monotonic()
    compiled = decode.lower(everywhere(params), state, *everywhere((rows, tables)), inputs).compile()
    return compiled, time.monotonic() - start

  def cache_bytes(self) -> int:
    """Keys and values on one chip."""
    return _cache_bytes(self.plan, self.batch_per_chip)


def _cache_bytes(plan: DecodePlan, batch: int) -> int:
  c = plan.config
  width = c.encoder_depth * c.encoder_embed_dim + c.decoder_depth * c.decoder_embed_dim
  return 2 * 2 * plan.cache_halves * batch * (c.buffer_size + c.seq_len) * width


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("config", help="configuration file")
  parser.add_argument("batch_per_chip", type=int, help="images per chip")
  parser.add_argument("--policy", default="full")
  parser.add_argument("--hlo", help="file to write the compiled program's text to")
  args = parser.parse_args()
  config = freeze(runpy.run_path(args.config)["get_config"]())
  sample = SampleConfig(
    num_iter=64, cfg=3.0, cfg_schedule="linear", num_sampling_steps=100, policy=args.policy
  )
  devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
  mesh = Mesh(np.asarray(devices), ("data",))  # its axes are Auto
  psum = compile_psum(mesh)
  request = Request(mesh, make_plan(config.model, sample), args.batch_per_chip)
  compiled, seconds = request.compile()
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
        "cache_bytes": request.cache_bytes(),
        "compile_seconds": round(seconds, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "collectives": collectives(hlo),
        "collectives_of_psum": collectives(psum.as_text()),
        "flops": compiled.cost_analysis()["flops"],  # a loop's body counts once
      }
    )
  )


if __name__ == "__main__":
  main()
