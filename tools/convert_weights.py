r"""Converts the PyTorch reference's weights into a checkpoint of this project, or back.

    python tools/convert_weights.py --kind=mar --src=checkpoint-last.pth --dst=DIR \
      --config=configs/mar_base.py
    python tools/convert_weights.py --kind=vae --src=kl16.ckpt --dst=DIR \
      --config=configs/mar_base.py
    python tools/convert_weights.py --kind=mar --reverse --src=DIR --dst=mar.safetensors

Both kinds go into the same DIR, which is then all that sampling needs. Reading `.pth` and `.ckpt`
needs torch, reading `.safetensors` needs safetensors: pip install "marche_jax[convert]".
"""

from __future__ import annotations

import collections
import time

import jax
from absl import flags as absl_flags

from marche_jax import flags
from marche_jax.models.params import Params
from marche_jax.weights import checkpoint, convert

FLAGS = absl_flags.FLAGS


def define_flags() -> None:
  """Defines the command's flags: when it runs, not when its functions are imported."""
  absl_flags.DEFINE_enum("kind", "mar", ["mar", "vae"], "The transformer or the autoencoder.")
  absl_flags.DEFINE_string(
    "src", None, "File of the reference (.pth, .ckpt, .safetensors); with --reverse a checkpoint.",
    required=True,
  )  # fmt: skip
  absl_flags.DEFINE_string(
    "dst", None, "Checkpoint directory; with --reverse a .safetensors file.", required=True
  )
  absl_flags.DEFINE_enum(
    "weights", "ema", ["ema", "model"], "Which of the two sets in a MAR .pth; others hold one set."
  )
  absl_flags.DEFINE_bool("reverse", False, "From a checkpoint to .safetensors.")
  absl_flags.DEFINE_bool("overwrite", False, "Replace what --dst holds already.")
  flags.define_config()


def _report(start: float, params: Params) -> None:
  leaves = jax.tree.leaves(params)
  count, size = sum(x.size for x in leaves), sum(x.nbytes for x in leaves)
  print(
    f"{count:,} parameters, {size / 1e9:.3f} GB in float32, {time.monotonic() - start:.1f} s: "
    f"{FLAGS.dst}"
  )


def _progress(done: int, total: int) -> None:
  if done == total or done * 10 // total > (done - 1) * 10 // total:
    print(f"  {done}/{total} tensors", flush=True)


def _forward(start: float) -> None:
  config = flags.parsed_config()
  part = config.model if FLAGS.kind == "mar" else config.vae
  if part is None:
    raise ValueError(f"--kind=vae: the config {config.name!r} has no autoencoder (vae=None)")
  checkpoint.check_destination(FLAGS.dst, FLAGS.kind, part, FLAGS.overwrite)
  tensors = convert.open_weights(FLAGS.src, FLAGS.kind, FLAGS.weights)
  print(f"{FLAGS.src}: {len(tensors)} tensors", flush=True)
  if not FLAGS.src.endswith(".safetensors") and not convert.is_mappable(FLAGS.src):
    print("  an old torch format that cannot be mapped: the whole file was read into memory")
  params = convert.convert(tensors, FLAGS.kind, part, _progress)
  for dtype, count in collections.Counter(t.dtype for t in tensors.values()).items():
    if dtype != "float32":
      print(f"  {count} tensors were {dtype} and are stored as float32")
  checkpoint.save_model(
    FLAGS.dst, FLAGS.kind, part, params, overwrite=FLAGS.overwrite,
    sample_config=config.sample if FLAGS.kind == "mar" else None,
  )  # fmt: skip
  _report(start, params)


def _reverse(start: float) -> None:
  config, params = checkpoint.load_part(FLAGS.src, FLAGS.kind)
  convert.write_safetensors(FLAGS.dst, FLAGS.kind, config, params, FLAGS.overwrite)
  _report(start, params)


def main() -> None:
  jax.config.update("jax_platforms", "cpu")  # nothing here needs an accelerator
  start = time.monotonic()
  (_reverse if FLAGS.reverse else _forward)(start)


if __name__ == "__main__":
  define_flags()
  flags.run(main)
