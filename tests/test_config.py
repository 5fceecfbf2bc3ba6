"""Configuration: validation names its field, and every way in and out keeps the values."""

from __future__ import annotations

import dataclasses
import json
import math

import golden
import jax
import pytest

from marche_jax.config import (
  Config,
  DataConfig,
  ModelConfig,
  SampleConfig,
  TrainConfig,
  VAEConfig,
  check_vae,
  freeze,
  from_dict,
  mutable,
)
from marche_jax.models.mar import abstract_params

PREFIX = {
  ModelConfig: "model", VAEConfig: "vae", SampleConfig: "sample", DataConfig: "data",
  TrainConfig: "train",
}  # fmt: skip
POSITIVE_INT = (0, -1, 1.5, True, "1", None)
NON_NEGATIVE_INT = (-1, 0.5, "0")
FRACTION = (-0.1, 1.1, math.nan, "x", None)
POSITIVE = (0, -1.0, math.nan, math.inf, "x", None)

BAD = {
  ModelConfig: {
    **dict.fromkeys(
      ("vae_stride", "patch_size", "vae_embed_dim", "encoder_depth", "encoder_num_heads",
       "decoder_depth", "decoder_num_heads", "class_num", "buffer_size", "diffloss_d",
       "diffloss_w", "diffusion_batch_mul"), POSITIVE_INT,
    ),
    "img_size": (*POSITIVE_INT, 250),
    "encoder_embed_dim": (*POSITIVE_INT, 770),
    "decoder_embed_dim": (*POSITIVE_INT, 770),
    "mask_ratio_min": FRACTION,
    "label_drop_prob": FRACTION,
    "attn_dropout": (*FRACTION, 1.0),
    "proj_dropout": (*FRACTION, 1.0),
    "mlp_ratio": POSITIVE,
    "latent_scale": POSITIVE,
  },
  VAEConfig: {
    **dict.fromkeys(("num_res_blocks", "resolution", "z_channels", "embed_dim"), POSITIVE_INT),
    "ch": (*POSITIVE_INT, 48),
    "ch_mult": ((), (1, 0), (1, 2.5), 3, None),
    "attn_resolutions": ((-1,), 16, "16"),
  },
  SampleConfig: {
    "num_iter": POSITIVE_INT,
    "num_sampling_steps": (*POSITIVE_INT, 1, 1001),
    "max_timestep": (*NON_NEGATIVE_INT, 0, 1000),
    "cfg": (-0.1, math.nan, math.inf, "3"),
    "temperature": (-0.1, math.nan, math.inf, "1"),
    "cfg_schedule": ("cosine", "", None),
    "solver": ("ddim", "", None),
    "policy": (None, 3, ("marche",)),
    **dict.fromkeys(("active_size", "encoder_active_size"), NON_NEGATIVE_INT),
    **dict.fromkeys(("refresh_interval", "select_layer"), POSITIVE_INT),
    "refresh_iterations": (3, None, "3", (-1,), (0, 1.5), [0, "1"]),
    "selection": ("none", None),
    **dict.fromkeys(
      ("condition_cache", "recap_raster", "head_cache", "detail_tokens"), (0, 1, None, "True")
    ),
  },
  DataConfig: {
    "source": ("imagenet", None),
    "split": ("test", None),
    "on_error": ("ignore", None),
    "pad": NON_NEGATIVE_INT,
    "num_workers": NON_NEGATIVE_INT,
  },
  TrainConfig: {
    **dict.fromkeys(
      ("batch_size", "epochs", "log_every", "checkpoint_every", "keep_checkpoints"), POSITIVE_INT
    ),
    **dict.fromkeys(("warmup_epochs", "seed", "sample_every"), NON_NEGATIVE_INT),
    **dict.fromkeys(("weight_decay", "beta1", "beta2", "ema_rate", "blr"), FRACTION),
    "grad_clip": POSITIVE,
    "lr_schedule": ("linear", None),
    "dtype": ("float16", "fp32"),
  },
}  # fmt: skip

UNRESTRICTED = {"path", "flip", "remat"}


@pytest.mark.parametrize("cls", BAD)
def test_every_field_is_validated(cls):
  assert BAD[cls].keys() == {f.name for f in dataclasses.fields(cls)} - UNRESTRICTED


@pytest.mark.parametrize(
  ("cls", "field", "value"),
  [(cls, field, value) for cls in BAD for field in BAD[cls] for value in BAD[cls][field]],
)
def test_errors_name_field_value_and_expectation(cls, field, value):
  with pytest.raises(ValueError) as caught:
    cls(**{field: value})
  message = str(caught.value)
  assert message.startswith(f"{PREFIX[cls]}.{field}={value!r}: expected ")


def test_an_autoencoder_must_fit_the_model():
  with pytest.raises(ValueError, match=r"vae\.ch_mult=\(1, 2\): .*model\.vae_stride = 16"):
    Config(vae=VAEConfig(ch_mult=(1, 2)))
  with pytest.raises(ValueError, match=r"vae\.embed_dim=4: .*model\.vae_embed_dim = 16"):
    Config(vae=VAEConfig(embed_dim=4))
  check_vae(ModelConfig(), VAEConfig())
  check_vae(ModelConfig(), None)


@pytest.mark.parametrize("name", ["mar_base", "mar_large", "mar_huge", "fashion_mnist"])
def test_round_trips(name):
  config = golden.read_config(name)
  assert freeze(mutable(config)) == config
  assert from_dict(Config, json.loads(json.dumps(dataclasses.asdict(config)))) == config
  assert hash(config) == hash(freeze(mutable(config)))  # a static argument of jit


def test_mutable_twin_is_validated_when_frozen():
  twin = mutable(Config())
  twin.sample.num_iter = 32
  twin.model.class_num = 7
  twin.vae = None
  frozen = freeze(twin)
  assert (frozen.sample.num_iter, frozen.model.class_num, frozen.vae) == (32, 7, None)
  assert Config().sample.num_iter == 64  # the original is as it was
  twin.sample.cfg = -1.0
  with pytest.raises(ValueError, match=r"sample\.cfg=-1\.0"):
    freeze(twin)
  with pytest.raises(dataclasses.FrozenInstanceError):
    frozen.sample.num_iter = 1


def test_from_dict_refuses_what_it_does_not_know():
  values = dataclasses.asdict(Config())
  with pytest.raises(ValueError, match=r"unknown field sample\.steps; known: .*num_iter"):
    from_dict(Config, {**values, "sample": {**values["sample"], "steps": 3}})
  del values["model"]["class_num"]
  with pytest.raises(ValueError, match=r"missing field model\.class_num of ModelConfig"):
    from_dict(Config, values)
  with pytest.raises(ValueError, match=r"model: expected an object, found 3"):
    from_dict(Config, {**values, "model": 3})


def test_published_sizes():
  """MAR-B, L and H as configured hold as many values as the published checkpoints."""
  for name in ("mar_base", "mar_large", "mar_huge"):
    manifest = json.loads((golden.DATA / "manifests" / f"{name}.json").read_text())
    leaves = jax.tree.leaves(abstract_params(golden.read_config(name).model))
    assert sum(leaf.size for leaf in leaves) == sum(math.prod(s) for s in manifest.values())


def test_sizes_of_patches_and_pixels():
  base = ModelConfig()
  assert (base.grid_size, base.seq_len, base.token_dim) == (16, 256, 16)
  assert base.latent_shape == (16, 16, 16)
  patches = ModelConfig(vae_stride=8, vae_embed_dim=4, patch_size=2)  # KL-8
  assert (patches.seq_len, patches.token_dim, patches.latent_shape) == (256, 16, (4, 32, 32))
  pixels = ModelConfig(img_size=28, vae_stride=1, patch_size=4, vae_embed_dim=1)
  assert (pixels.seq_len, pixels.token_dim, pixels.latent_shape) == (49, 16, (1, 28, 28))
  large = ModelConfig(img_size=512)
  assert large.seq_len == 1024


def test_stacks_may_differ():
  config = ModelConfig(
    encoder_embed_dim=48, encoder_depth=2, encoder_num_heads=3,
    decoder_embed_dim=32, decoder_depth=5, decoder_num_heads=2, mlp_ratio=2.0,
  )  # fmt: skip
  params = abstract_params(config)
  assert params["encoder_blocks"]["qkv"]["kernel"].shape == (2, 48, 144)
  assert params["decoder_blocks"]["qkv"]["kernel"].shape == (5, 32, 96)
  assert params["decoder_embed"]["kernel"].shape == (48, 32)
  assert params["head"]["cond_embed"]["kernel"].shape == (32, 1024)


def test_refresh_iterations_are_a_sorted_tuple():
  """However they were written, a configuration is a static argument of jit."""
  sample = SampleConfig(refresh_iterations=[9, 3, 9])
  assert sample.refresh_iterations == (3, 9)
  assert hash(sample) == hash(SampleConfig(refresh_iterations=(3, 9)))
