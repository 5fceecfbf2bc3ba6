"""Compiles the sharded sampler for TPU chips, without a TPU, and prints what came out as JSON.

`test_tpu.py` runs this as a process of its own, with a Python that has the extra `tpu-aot`: the
compiler in libtpu must not be seen by a process that computes on another backend. By hand:

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python tests/tpu_compile.py configs/mar_base.py 64
"""

from __future__ import annotations

import argparse
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
from marche_jax.config import ModelConfig, SampleConfig, freeze
from marche_jax.models.mar import abstract_params, inference_params
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


def compile_sampler(
  mesh: Mesh, config: ModelConfig, sample: SampleConfig, batch_per_chip: int
) -> tuple[Any, float]:
  """The compiled `sharded_decode` of one plan on a mesh, in bfloat16; and the seconds it took."""
  plan = make_plan(config, sample)
  batch = batch_per_chip * mesh.size

  def give(spec: PartitionSpec, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  everywhere = functools.partial(give, PartitionSpec())
  data = functools.partial(give, PartitionSpec("data"))
  params = jax.eval_shape(
    functools.partial(inference_params, dtype=jnp.bfloat16), abstract_params(config)
  )
  params, rows, tables = jax.tree.map(
    lambda x: everywhere(x.shape, x.dtype), (params, *sampler.plan_rows(plan))
  )
  state = sampler.DecodeState(
    tokens=data((batch, config.seq_len, config.token_dim), jnp.float32),
    order=data((batch, config.seq_len), jnp.int32),
  )
  inputs = sampler.Inputs(
    labels=data((batch,), jnp.int32), keys=data((batch,), jax.random.key(0).dtype)
  )
  decode = sampler.sharded_decode(
    mesh, config=config, shapes=plan.shapes, dtype=jnp.bfloat16, head_dtype=jnp.bfloat16
  )
  start = time.monotonic()
  compiled = decode.lower(params, state, rows, tables, inputs).compile()
  return compiled, time.monotonic() - start


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
  compiled, seconds = compile_sampler(mesh, config.model, sample, args.batch_per_chip)
  memory, hlo = compiled.memory_analysis(), compiled.as_text()
  if args.hlo:
    with open(args.hlo, "w") as file:
      file.write(hlo)
  print(
    json.dumps(
      {
        "config": config.name,
        "batch_per_chip": args.batch_per_chip,
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
