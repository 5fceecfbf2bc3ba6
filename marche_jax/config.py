"""Typed configuration of models, sampling and training.

Every class here is a frozen, hashable dataclass: it is validated on construction and may be a
static argument of `jax.jit`. The command lines need values that flags can override one at a time,
so `mutable` makes a mutable twin of a configuration and `freeze` validates it back.

Argument names are the reference's (`models/mar.py` and `main_mar.py` of MAR). In this field `cfg`
means classifier-free guidance; configuration is always called `config`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
  from _typeshed import DataclassInstance

NUM_TRAIN_TIMESTEPS = 1000
"""Diffusion steps of the training process; fixed by the published checkpoints."""


def _require(condition: bool, field: str, found: object, expected: str) -> None:
  if not condition:
    raise ValueError(f"{field}={found!r}: expected {expected}")


def _require_int(config: object, prefix: str, minimum: int, *fields: str) -> None:
  for field in fields:
    value = getattr(config, field)
    is_int = isinstance(value, int) and not isinstance(value, bool)
    _require(
      is_int and value >= minimum, prefix + field, value, f"an integer of at least {minimum}"
    )


def _require_range(config: object, prefix: str, low: float, high: float, *fields: str) -> None:
  for field in fields:
    value = getattr(config, field)
    ok = isinstance(value, int | float) and low <= value <= high  # false for NaN
    _require(ok, prefix + field, value, f"a number in [{low}, {high}]")


def _require_positive(config: object, prefix: str, *fields: str) -> None:
  for field in fields:
    value = getattr(config, field)
    ok = isinstance(value, int | float) and 0 < value < math.inf  # false for NaN
    _require(ok, prefix + field, value, "a positive number")


def _require_one_of(config: object, prefix: str, **allowed: tuple[str, ...]) -> None:
  for field, names in allowed.items():
    value = getattr(config, field)
    _require(value in names, prefix + field, value, f"one of {', '.join(names)}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The MAR transformer and its diffusion head (reference: `models/mar.py`, class MAR)."""

  img_size: int = 256  # image height and width, pixels
  vae_stride: int = 16  # pixels per latent cell; 1 means pixel space, without an autoencoder
  patch_size: int = 1  # latent cells per token, each way
  vae_embed_dim: int = 16  # channels of a latent cell (of a pixel, in pixel space)
  encoder_embed_dim: int = 768
  encoder_depth: int = 12
  encoder_num_heads: int = 12
  decoder_embed_dim: int = 768
  decoder_depth: int = 12
  decoder_num_heads: int = 12
  mlp_ratio: float = 4.0
  class_num: int = 1000
  buffer_size: int = 64  # buffer tokens in front of the image tokens
  diffloss_d: int = 6  # residual blocks of the head
  diffloss_w: int = 1024  # width of the head
  latent_scale: float = 0.2325  # factor on latents between the autoencoder and the model
  # Only training uses the fields below: see `TRAINING_FIELDS`.
  mask_ratio_min: float = 0.7
  label_drop_prob: float = 0.1
  attn_dropout: float = 0.1
  proj_dropout: float = 0.1  # also in both layers of the feed-forward
  diffusion_batch_mul: int = 4  # diffusion timesteps drawn per masked token

  def __post_init__(self) -> None:
    p = "model."
    _require_int(self, p, 1, "img_size", "vae_stride", "patch_size", "vae_embed_dim",
                 "encoder_embed_dim", "encoder_depth", "encoder_num_heads", "decoder_embed_dim",
                 "decoder_depth", "decoder_num_heads", "class_num", "buffer_size",
                 "diffloss_d", "diffloss_w", "diffusion_batch_mul")  # fmt: skip
    _require_range(self, p, 0.0, 1.0, "mask_ratio_min", "label_drop_prob")
    _require_range(self, p, 0.0, 0.999, "attn_dropout", "proj_dropout")
    _require_positive(self, p, "mlp_ratio", "latent_scale")
    cell = self.vae_stride * self.patch_size
    _require(
      self.img_size % cell == 0, p + "img_size", self.img_size,
      f"a multiple of vae_stride * patch_size = {cell}",
    )  # fmt: skip
    for stack in ("encoder", "decoder"):
      width = getattr(self, f"{stack}_embed_dim")
      heads = getattr(self, f"{stack}_num_heads")
      _require(
        width % heads == 0, f"{p}{stack}_embed_dim", width,
        f"a multiple of {stack}_num_heads = {heads}",
      )  # fmt: skip

  @property
  def grid_size(self) -> int:
    """Tokens per row and per column of an image."""
    return self.img_size // self.vae_stride // self.patch_size

  @property
  def seq_len(self) -> int:
    """S, the number of image tokens."""
    return self.grid_size**2

  @property
  def num_tokens(self) -> int:
    """Buffer tokens and image tokens: what the decoder sees."""
    return self.buffer_size + self.seq_len

  @property
  def token_dim(self) -> int:
    """C, the channels of a token."""
    return self.vae_embed_dim * self.patch_size**2

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """[channels, height, width] of one image's latents."""
    side = self.img_size // self.vae_stride
    return (self.vae_embed_dim, side, side)


TRAINING_FIELDS = frozenset(
  {"mask_ratio_min", "label_drop_prob", "attn_dropout", "proj_dropout", "diffusion_batch_mul"}
)
"""Fields of `ModelConfig` on which no sample depends: weights may be used with others."""


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """The KL autoencoder (reference: `models/vae.py`, class AutoencoderKL)."""

  ch: int = 128
  ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
  num_res_blocks: int = 2
  attn_resolutions: tuple[int, ...] = (16,)  # encoder only, in pixels of the feature map
  resolution: int = 256  # image size for which attn_resolutions holds
  z_channels: int = 16
  embed_dim: int = 16

  def __post_init__(self) -> None:
    p = "vae."
    for field in ("ch_mult", "attn_resolutions"):  # JSON and flags give lists
      value = getattr(self, field)
      _require(
        isinstance(value, list | tuple) and all(isinstance(v, int) and v > 0 for v in value),
        p + field, value, "a list of positive integers",
      )  # fmt: skip
      object.__setattr__(self, field, tuple(value))
    _require_int(self, p, 1, "ch", "num_res_blocks", "resolution", "z_channels", "embed_dim")
    _require(len(self.ch_mult) > 0, p + "ch_mult", self.ch_mult, "at least one entry")
    _require(self.ch % 32 == 0, p + "ch", self.ch, "a multiple of 32 (GroupNorm has 32 groups)")

  @property
  def stride(self) -> int:
    """Pixels per latent cell, each way."""
    return 2 ** (len(self.ch_mult) - 1)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """How images are decoded (reference: `MAR.sample_tokens` and `main_mar.py`)."""

  num_iter: int = 64  # autoregressive iterations
  cfg: float = 3.0  # guidance scale; 1 switches guidance off
  cfg_schedule: str = "linear"  # linear or constant
  temperature: float = 1.0  # factor on the noise of the diffusion steps
  num_sampling_steps: int = 100  # diffusion steps per token, at least 2: from noise, and to 0
  max_timestep: int = NUM_TRAIN_TIMESTEPS - 1  # noisiest timestep used (DiSA: 950)
  solver: str = "ddpm"  # ddpm (ancestral) or dpm++ (SDE-DPM-Solver++, for 10-20 diffusion steps)
  policy: str = "full"  # what accelerates decoding; names joined by +, see planning/policies/
  # The fields below are those of policies.
  active_size: int = 0  # marche: tokens that the decoder recomputes; 0: a fifth, or what is forced
  encoder_active_size: int = 0  # marche: the encoder's; 0: a tenth, or what is forced
  refresh_interval: int = 3  # marche: every n-th iteration recomputes everything
  refresh_iterations: tuple[int, ...] = ()  # marche: these do instead (`sample --calibrate`)
  select_layer: int = 2  # marche: layer, from 1, whose attention chooses the refresh tokens
  selection: str = "scout"  # marche: whose attention: scout, carried or lower (see `stack.py`)
  condition_cache: bool = False  # marche: selective iterations compute the conditional half alone
  recap_raster: bool = False  # recap: the two sets of a pair are revealed in raster order
  head_cache: bool = False  # lazymar: most diffusion steps reuse what the head computed before
  detail_tokens: bool = True  # gtr: the tokens of most detail get more diffusion steps at the end

  def __post_init__(self) -> None:
    p = "sample."
    _require(
      isinstance(self.refresh_iterations, list | tuple)
      and all(type(k) is int and k >= 0 for k in self.refresh_iterations),
      p + "refresh_iterations", self.refresh_iterations,
      "a list of iterations, counted from 0, such as 0,3,9",
    )  # fmt: skip
    object.__setattr__(self, "refresh_iterations", tuple(sorted(set(self.refresh_iterations))))
    _require_int(self, p, 1, "refresh_interval", "select_layer")
    _require_int(self, p, 0, "active_size", "encoder_active_size")
    _require_one_of(self, p, solver=("ddpm", "dpm++"), selection=("scout", "carried", "lower"))
    for field in ("condition_cache", "recap_raster", "head_cache", "detail_tokens"):
      value = getattr(self, field)
      _require(isinstance(value, bool), p + field, value, "True or False")
    _require(isinstance(self.policy, str), p + "policy", self.policy, "a name")
    _require_int(self, p, 1, "num_iter")
    # At timestep 0 alone, where a single diffusion step would be, noise stays what it is.
    for field, least, most in (
      ("num_sampling_steps", 2, NUM_TRAIN_TIMESTEPS), ("max_timestep", 1, NUM_TRAIN_TIMESTEPS - 1)
    ):  # fmt: skip
      value = getattr(self, field)
      is_int = isinstance(value, int) and not isinstance(value, bool)
      _require(
        is_int and least <= value <= most, p + field, value, f"an integer in [{least}, {most}]"
      )
    _require_range(self, p, 0.0, 1e4, "cfg", "temperature")
    _require(
      self.cfg_schedule in ("linear", "constant"), p + "cfg_schedule", self.cfg_schedule,
      "'linear' or 'constant'",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where training images come from."""

  source: str = "idx"  # idx (MNIST-style files), folder (one subfolder per class) or latents (.npy)
  path: str = ""  # idx: directory of the files; folder: root of the images; latents: directory
  split: str = "train"  # idx only: train or t10k
  pad: int = 0  # idx only: black pixels added on every side, to reach model.img_size
  on_error: str = "raise"  # folder only, on a broken image: raise or skip (named either way)
  flip: bool = True  # random horizontal flip
  num_workers: int = 0  # loader processes; 0 loads in the training process

  def __post_init__(self) -> None:
    p = "data."
    _require_one_of(
      self, p, source=("idx", "folder", "latents"), split=("train", "t10k"),
      on_error=("raise", "skip"),
    )  # fmt: skip
    _require_int(self, p, 0, "num_workers", "pad")
    _require(
      self.pad == 0 or self.source == "idx", p + "pad", self.pad,
      f"0 with data.source={self.source!r}",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Optimisation (reference: `main_mar.py`; `engine_mar.py`)."""

  batch_size: int = 2048  # images per update, over all devices
  epochs: int = 800
  blr: float = 1e-4  # learning rate per 256 images of batch
  warmup_epochs: int = 100  # linear warm-up
  lr_schedule: str = "constant"  # after the warm-up: constant (the reference's) or cosine
  weight_decay: float = 0.02
  beta1: float = 0.9
  beta2: float = 0.95
  grad_clip: float = 3.0  # global norm
  ema_rate: float = 0.9999
  dtype: str = "float32"  # of activations: float32 or bfloat16; parameters and EMA stay float32
  remat: bool = False  # recompute the blocks' activations in the backward pass
  seed: int = 1
  log_every: int = 20  # updates between lines of metrics
  checkpoint_every: int = 500  # updates
  keep_checkpoints: int = 2
  sample_every: int = 2000  # updates between sample grids; 0 draws none

  def __post_init__(self) -> None:
    p = "train."
    _require_int(self, p, 1, "batch_size", "epochs", "log_every", "checkpoint_every",
                 "keep_checkpoints")  # fmt: skip
    _require_int(self, p, 0, "warmup_epochs", "seed", "sample_every")
    _require_range(self, p, 0.0, 1.0, "weight_decay", "beta1", "beta2", "ema_rate", "blr")
    _require_positive(self, p, "grad_clip")
    _require_one_of(self, p, lr_schedule=("constant", "cosine"), dtype=("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that one command needs."""

  name: str = "mar_base"
  model: ModelConfig = ModelConfig()
  vae: VAEConfig | None = VAEConfig()  # None in pixel space
  sample: SampleConfig = SampleConfig()
  data: DataConfig = DataConfig()
  train: TrainConfig = TrainConfig()

  def __post_init__(self) -> None:
    check_vae(self.model, self.vae)


def check_vae(model: ModelConfig, vae: VAEConfig | None) -> None:
  """Raises ValueError where an autoencoder does not fit a model."""
  if vae is None:
    return
  _require(vae.stride == model.vae_stride, "vae.ch_mult", vae.ch_mult,
           f"log2(model.vae_stride = {model.vae_stride}) + 1 entries")  # fmt: skip
  _require(vae.embed_dim == model.vae_embed_dim, "vae.embed_dim", vae.embed_dim,
           f"model.vae_embed_dim = {model.vae_embed_dim}")  # fmt: skip


@functools.cache
def _mutable_class(cls: type) -> type:
  hints = typing.get_type_hints(cls)
  fields: list[tuple[str, object, object]] = []
  for field in dataclasses.fields(cls):
    hint = hints[field.name]
    inner = [h for h in typing.get_args(hint) or (hint,) if dataclasses.is_dataclass(h)]
    if inner:
      twin = _mutable_class(inner[0])  # type: ignore[arg-type]
      hint = typing.Optional[twin] if isinstance(hint, types.UnionType) else twin  # noqa: UP045
    fields.append((field.name, hint, dataclasses.field(default=None)))
  return dataclasses.make_dataclass(cls.__name__, fields, namespace={"frozen_class": cls})


T = TypeVar("T", bound="DataclassInstance")
T_co = TypeVar("T_co", bound="DataclassInstance", covariant=True)


class Mutable(Protocol[T_co]):
  """A mutable twin: it has the fields of its `frozen_class`, nested ones mutable too."""

  @property
  def frozen_class(self) -> type[T_co]: ...

  def __getattr__(self, field: str) -> Any: ...  # flags get and set fields by their names

  def __setattr__(self, field: str, value: Any) -> None: ...


def mutable(config: T) -> Mutable[T]:
  """A mutable twin of a frozen configuration, for flags to override field by field."""
  values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
  return _mutable_class(type(config))(
    **{
      k: mutable(v) if dataclasses.is_dataclass(v) and not isinstance(v, type) else v
      for k, v in values.items()
    }
  )


def freeze(config: Mutable[T]) -> T:
  """The frozen twin of what `mutable` made.

  Raises:
    ValueError: where a field is out of range; the message names it.
  """
  cls = config.frozen_class
  values = {f.name: getattr(config, f.name) for f in dataclasses.fields(cls)}
  return cls(**{k: freeze(v) if hasattr(v, "frozen_class") else v for k, v in values.items()})


def from_dict(cls: type[T], values: Mapping[str, object], prefix: str = "") -> T:
  """Builds a frozen configuration from plain JSON values, refusing unknown and missing fields."""
  if not isinstance(values, dict):
    raise ValueError(f"{prefix.rstrip('.') or cls.__name__}: expected an object, found {values!r}")
  hints = typing.get_type_hints(cls)
  names = {f.name for f in dataclasses.fields(cls)}
  if unknown := sorted(set(values) - names):
    raise ValueError(f"unknown field {prefix}{unknown[0]}; known: {', '.join(sorted(names))}")
  if missing := sorted(names - set(values)):
    raise ValueError(f"missing field {prefix}{missing[0]} of {cls.__name__}")
  built = {}
  for key, value in values.items():
    inner = [h for h in typing.get_args(hints[key]) or (hints[key],) if dataclasses.is_dataclass(h)]
    nested = inner and value is not None
    built[key] = from_dict(inner[0], value, f"{prefix}{key}.") if nested else value  # type: ignore[arg-type]
  return cls(**built)
