r"""Encodes a folder of images into the latents that a MAR with an autoencoder is trained on.

    python tools/encode_latents.py --config=configs/mar_base.py --data=IMAGES --vae=DIR \
      --out=LATENTS

IMAGES holds one subfolder per class, DIR a checkpoint with the autoencoder (made by
tools/convert_weights.py --kind=vae). Then train with --config.data.source=latents and
--config.data.path=LATENTS. Every image is cut to its central square (`sources.center_crop`) and
encoded twice, as it is and mirrored; --noflip leaves out the second, for data.flip=False.

Reference: `main_cache.py` and `cache_latents` in `engine_mar.py` of MAR.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import pathlib
import shutil
import time
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags as absl_flags
from tqdm import tqdm

from marche_jax import config as config_lib
from marche_jax import flags
from marche_jax.config import ModelConfig, VAEConfig
from marche_jax.files import naming, user_path
from marche_jax.models import vae
from marche_jax.models.params import Params
from marche_jax.training import sources
from marche_jax.weights import checkpoint

FLAGS = absl_flags.FLAGS


def define_flags() -> None:
  """Defines the command's flags: when it runs, not when its functions are imported."""
  absl_flags.DEFINE_string(
    "data", None, "Folder of images, one subfolder per class.", required=True
  )
  absl_flags.DEFINE_string("vae", None, "Checkpoint with the autoencoder.", required=True)
  absl_flags.DEFINE_string("out", None, "Directory to write; new or empty.", required=True)
  absl_flags.DEFINE_integer("batch_size", 16, "Images encoded at a time.", lower_bound=1)
  absl_flags.DEFINE_bool("flip", True, "Also encode the mirrored images, for data.flip=True.")
  absl_flags.DEFINE_enum(
    "on_error", "raise", ["raise", "skip"], "On a broken image (named either way)."
  )
  flags.define_config()


def batches(source: sources.Source, size: int) -> Iterator[np.ndarray]:
  """Images float32 [size, H, W, 3] in [-1, 1], in order; the last is padded by repetition.

  Threads decode a batch while the caller is busy with the one before.
  """
  with concurrent.futures.ThreadPoolExecutor() as pool:

    def load(start: int) -> list[concurrent.futures.Future[sources.Record]]:
      ids = range(start, min(start + size, len(source)))
      return [pool.submit(source.__getitem__, i) for i in ids]

    ahead = load(0)
    for start in range(0, len(source), size):
      records, ahead = ahead, load(start + size)
      images = np.stack([record.result()["image"] for record in records])
      pad = [(0, size - len(images))] + [(0, 0)] * 3
      yield np.pad(images, pad, mode="edge").astype(np.float32) / np.float32(127.5) - 1


def encode(
  source: sources.Source,
  model: ModelConfig,
  vae_config: VAEConfig,
  vae_params: Params,
  directory: pathlib.Path,
  *,
  batch_size: int,
  flip: bool,
) -> None:
  """Writes moments.npy, labels.npy and, with `flip`, moments_flip.npy into `directory`.

  The moments are float32, as `sources.LatentSource` describes them. They are written batch by
  batch, so that memory does not grow with the data; not through a memory map, which ends the
  process where the disk is full.

  Raises:
    ValueError: where an image's moments are not finite, or the disk has too little space.
  """
  channels, height, width = model.latent_shape
  shape = (len(source), 2 * channels, height, width)
  needed, free = 4 * math.prod(shape) * (1 + flip), shutil.disk_usage(directory).free
  if needed > free:
    raise ValueError(f"{directory}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
  encoder = jax.jit(lambda params, images: vae.encode(vae_config, params, images).moments)
  params = jax.device_put(vae_params)
  np.save(directory / "labels.npy", source.labels)
  names = ["moments", "moments_flip"] if flip else ["moments"]
  with contextlib.ExitStack() as stack:
    files = [stack.enter_context((directory / f"{name}.npy").open("wb")) for name in names]
    for file in files:
      header = {"descr": "<f4", "fortran_order": False, "shape": shape}
      np.lib.format.write_array_header_1_0(file, header)
    bar = stack.enter_context(tqdm(total=len(source), desc="encode", unit="image"))
    for start, images in zip(range(0, len(source), batch_size), batches(source, batch_size)):
      views = [images, images[:, :, ::-1]][: len(files)]
      num = min(batch_size, len(source) - start)
      for file, moments in zip(files, [encoder(params, view) for view in views]):
        values = np.asarray(moments, np.float32)[:num]
        finite = np.isfinite(values).all(axis=(1, 2, 3))
        if not finite.all():
          raise ValueError(f"image {start + int(finite.argmin())}: its moments are not finite")
        file.write(values.tobytes())
      bar.update(num)


def main() -> None:
  start = time.monotonic()
  config = flags.parsed_config()
  data, out = user_path(FLAGS.data, "--data"), user_path(FLAGS.out, "--out")
  vae_config, vae_params = checkpoint.load_part(user_path(FLAGS.vae, "--vae"), "vae")
  config_lib.check_vae(config.model, vae_config)
  with sources.new_directory(out) as aside, naming(out, aside):
    source = sources.FolderSource(data, FLAGS.on_error, config.model)
    encode(
      source, config.model, vae_config, vae_params, aside,
      batch_size=FLAGS.batch_size, flip=FLAGS.flip,
    )  # fmt: skip
  print(
    f"{out}: moments of {len(source):,} images of {source.labels.max() + 1} classes, "
    f"{time.monotonic() - start:.1f} s"
  )


if __name__ == "__main__":
  define_flags()
  flags.run(main)
