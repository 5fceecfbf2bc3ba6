"""A model small enough to compile and train within seconds, and data for it."""

from __future__ import annotations

import gzip
import pathlib

import numpy as np

from marche_jax.config import Config, DataConfig, ModelConfig, SampleConfig, TrainConfig

MODEL = ModelConfig(
  img_size=8,
  vae_stride=1,
  patch_size=2,
  vae_embed_dim=1,
  encoder_embed_dim=16,
  encoder_depth=2,
  encoder_num_heads=2,
  decoder_embed_dim=16,
  decoder_depth=2,
  decoder_num_heads=2,
  class_num=4,
  buffer_size=2,
  diffloss_d=1,
  diffloss_w=16,
  diffusion_batch_mul=1,
  latent_scale=1.0,
)
UNEQUAL = ModelConfig(
  img_size=20,
  vae_stride=1,
  patch_size=4,
  vae_embed_dim=3,
  encoder_embed_dim=32,
  encoder_depth=5,
  encoder_num_heads=2,
  decoder_embed_dim=24,
  decoder_depth=6,
  decoder_num_heads=3,
  mlp_ratio=3.0,
  class_num=5,
  buffer_size=7,
  diffloss_d=4,
  diffloss_w=40,
)
"""Every width, depth and count differs, so that no two terms can be mistaken for each other."""

SAMPLE = SampleConfig(num_iter=4, cfg=2.0, num_sampling_steps=4, max_timestep=950)


def config(path: pathlib.Path, **train: object) -> Config:
  """A training configuration over the IDX files that `write_idx` puts into `path`."""
  fields = {
    "batch_size": 8, "epochs": 3, "warmup_epochs": 1, "log_every": 1, "checkpoint_every": 3,
    "sample_every": 0, "ema_rate": 0.9,
  }  # fmt: skip
  return Config(
    name="tiny",
    model=MODEL,
    vae=None,
    sample=SAMPLE,
    data=DataConfig(source="idx", path=str(path), flip=True),
    train=TrainConfig(**{**fields, **train}),  # type: ignore[arg-type]
  )


def write_idx(path: pathlib.Path, num: int = 40, size: int = 8) -> None:
  """Writes `num` random images and labels as train-*-ubyte.gz."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (num, size, size), dtype=np.uint8)
  labels = rng.integers(0, 4, num, dtype=np.uint8)
  for name, array in (("images-idx3", images), ("labels-idx1", labels)):
    header = bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, ">u4").tobytes()
    with gzip.open(path / f"train-{name}-ubyte.gz", "wb") as file:
      file.write(header + array.tobytes())
