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
import contextlib
import pathlib
import time
from collections.abc import Iterator

import jax
from absl import flags as absl_flags

from marche_jax import flags
from marche_jax.files import user_path
from marche_jax.models.params import Params
from marche_jax.weights import archive, checkpoint, convert

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


def _report(start: float, params: Params, dst: pathlib.Path) -> None:
  leaves = jax.tree.leaves(params)
  count, size = sum(x.size for x in leaves), sum(x.nbytes for x in leaves)
  print(
    f"{count:,} parameters, {size / 1e9:.3f} GB in float32, {time.monotonic() - start:.1f} s: {dst}"
  )


def _progress(done: int, total: int) -> None:
  if done == total or done * 10 // total > (done - 1) * 10 // total:
    print(f"  {done}/{total} tensors", flush=True)


@contextlib.contextmanager
def _about(flag: str, path: pathlib.Path) -> Iterator[None]:
  """Errors name the flag and its path, once."""
  try:
    yield
  except (ValueError, OSError) as error:
    raise ValueError(f"{flag}={path}: {str(error).removeprefix(f'{path}: ')}") from error


def _forward(start: float) -> None:
  config = flags.parsed_config()
  part = config.model if FLAGS.kind == "mar" else config.vae
  if part is None:
    raise ValueError(f"--kind=vae: the config {config.name!r} has no autoencoder (vae=None)")
  src, dst = user_path(FLAGS.src, "--src"), user_path(FLAGS.dst, "--dst")
  with _about("--dst", dst):
    checkpoint.check_destination(dst, FLAGS.kind, part, FLAGS.overwrite)
  with _about("--src", src):
    tensors = convert.open_weights(src, FLAGS.kind, FLAGS.weights)
    print(f"{src}: {len(tensors)} tensors", flush=True)
    if src.suffix != ".safetensors" and not archive.is_archive(src):
      print("  an old torch format without checksums: the whole file was read into memory")
    params = convert.convert(tensors, FLAGS.kind, part, _progress)
  for dtype, count in collections.Counter(t.dtype for t in tensors.values()).items():
    if dtype != "float32":
      print(f"  {count} tensors were {dtype} and are stored as float32")
  with _about("--dst", dst):
    checkpoint.save_model(
      dst, FLAGS.kind, part, params, overwrite=FLAGS.overwrite,
      sample_config=config.sample if FLAGS.kind == "mar" else None,
    )  # fmt: skip
  _report(start, params, dst)


def _reverse(start: float) -> None:
  src, dst = user_path(FLAGS.src, "--src"), user_path(FLAGS.dst, "--dst")
  with _about("--src", src):
    config, params = checkpoint.load_part(src, FLAGS.kind)
  with _about("--dst", dst):
    convert.write_safetensors(dst, FLAGS.kind, config, params, FLAGS.overwrite)
  _report(start, params, dst)


def main() -> None:
  jax.config.update("jax_platforms", "cpu")  # nothing here needs an accelerator
  start = time.monotonic()
  (_reverse if FLAGS.reverse else _forward)(start)


if __name__ == "__main__":
  define_flags()
  flags.run(main)
