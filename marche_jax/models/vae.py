"""The KL autoencoder between images and latents (arXiv 2112.10752, section 3.1).

Reference: `models/vae.py` of MAR, class AutoencoderKL. Each level of the encoder has residual
blocks (followed by attention where `attn_resolutions` says so) and, the last one excepted, halves
the feature map; the decoder mirrors it with one residual block more per level and no attention.
Both have a middle of block, attention, block. Level 0 is the highest resolution in both.

Outside, images are [B, H, W, 3] in [-1, 1] and latents [B, C, h, w] with h = H / stride, before any
`latent_scale`; inside, everything is [B, height, width, channels] with kernels HWIO.
"""

from __future__ import annotations

import functools
import re

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from marche_jax.config import VAEConfig
from marche_jax.models.params import Params as Params

IMAGE_CHANNELS = 3
NORM_GROUPS = 32
NORM_EPSILON = 1e-6
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


def _wide(dtype: DTypeLike) -> np.dtype:
  """The dtype of norms, softmax and results under a compute dtype: float32 at least."""
  return jnp.promote_types(dtype, jnp.float32)


def _group_norm(dtype: DTypeLike, name: str) -> nn.GroupNorm:
  """Exact variance, in float32 even where the compute dtype is narrower: parity needs both."""
  return nn.GroupNorm(
    NORM_GROUPS, epsilon=NORM_EPSILON, use_fast_variance=False, dtype=_wide(dtype), name=name
  )


@flax.struct.dataclass
class Posterior:
  """The diagonal Gaussian over latents that the encoder gives; a pytree.

  Attributes:
    moments: [B, 2C, h, w]: mean, then log-variance as the network gives it (not clamped).
  """

  moments: jax.Array

  @property
  def mean(self) -> jax.Array:
    """[B, C, h, w]."""
    return jnp.split(self.moments, 2, axis=1)[0]

  @property
  def logvar(self) -> jax.Array:
    """[B, C, h, w], clamped to [-30, 20]."""
    return jnp.clip(jnp.split(self.moments, 2, axis=1)[1], LOGVAR_MIN, LOGVAR_MAX)

  @property
  def std(self) -> jax.Array:
    """[B, C, h, w]."""
    return jnp.exp(0.5 * self.logvar)

  def sample(self, key: jax.Array) -> jax.Array:
    """A draw mean + std * noise, [B, C, h, w]."""
    return self.mean + self.std * jax.random.normal(key, self.mean.shape, self.mean.dtype)


class ResnetBlock(nn.Module):
  """x + conv(SiLU(norm(conv(SiLU(norm(x)))))); [B, h, w, c] -> [B, h, w, width]."""

  width: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    conv = functools.partial(nn.Conv, self.width, dtype=self.dtype)
    h = conv((3, 3), padding=1, name="conv1")(nn.silu(_group_norm(self.dtype, "norm1")(x)))
    h = conv((3, 3), padding=1, name="conv2")(nn.silu(_group_norm(self.dtype, "norm2")(h)))
    if x.shape[-1] != self.width:
      x = conv((1, 1), name="nin_shortcut")(x)
    return x + h


class AttentionBlock(nn.Module):
  """Residual attention of one head over the feature map; [B, h, w, c] -> [B, h, w, c]."""

  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    b, height, width, c = x.shape
    conv = functools.partial(nn.Conv, c, (1, 1), dtype=self.dtype)
    h = _group_norm(self.dtype, "norm")(x)
    q, k, v = (conv(name=name)(h).reshape(b, height * width, c) for name in "qkv")
    logits = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=_wide(self.dtype)) * c**-0.5
    weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
    out = jnp.einsum("bqk,bkc->bqc", weights, v).reshape(x.shape)
    return x + conv(name="proj_out")(out)


class Downsample(nn.Module):
  """Halves height and width; pads right and bottom only, as the reference does."""

  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    padding = ((0, 1), (0, 1))
    return nn.Conv(x.shape[-1], (3, 3), 2, padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
  """Doubles height and width by repeating, then a convolution."""

  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return nn.Conv(x.shape[-1], (3, 3), padding=1, dtype=self.dtype, name="conv")(x)


def _middle(x: jax.Array, dtype: DTypeLike) -> jax.Array:
  """Block, attention, block; to be called within a compact method, whose module owns them."""
  x = ResnetBlock(x.shape[-1], dtype, name="mid_block_1")(x)
  x = AttentionBlock(dtype, name="mid_attn_1")(x)
  return ResnetBlock(x.shape[-1], dtype, name="mid_block_2")(x)


class Encoder(nn.Module):
  """Images [B, H, W, 3] -> features [B, h, w, 2 * z_channels]."""

  config: VAEConfig
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    conv = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1, dtype=self.dtype)
    x = conv(c.ch, name="conv_in")(x)
    for level, mult in enumerate(c.ch_mult):
      # Where attention is depends on the configured resolution, not on the input's size.
      attends = c.resolution // 2**level in c.attn_resolutions
      for i in range(c.num_res_blocks):
        x = ResnetBlock(c.ch * mult, self.dtype, name=f"down_{level}_block_{i}")(x)
        if attends:
          x = AttentionBlock(self.dtype, name=f"down_{level}_attn_{i}")(x)
      if level < len(c.ch_mult) - 1:
        x = Downsample(self.dtype, name=f"down_{level}_downsample")(x)
    x = _middle(x, self.dtype)
    x = nn.silu(_group_norm(self.dtype, "norm_out")(x))
    return conv(2 * c.z_channels, name="conv_out")(x)


class Decoder(nn.Module):
  """Features [B, h, w, z_channels] -> images [B, H, W, 3]."""

  config: VAEConfig
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    conv = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1, dtype=self.dtype)
    x = _middle(conv(c.ch * c.ch_mult[-1], name="conv_in")(x), self.dtype)
    for level in reversed(range(len(c.ch_mult))):
      for i in range(c.num_res_blocks + 1):
        x = ResnetBlock(c.ch * c.ch_mult[level], self.dtype, name=f"up_{level}_block_{i}")(x)
      if level > 0:
        x = Upsample(self.dtype, name=f"up_{level}_upsample")(x)
    x = nn.silu(_group_norm(self.dtype, "norm_out")(x))
    return conv(IMAGE_CHANNELS, name="conv_out")(x)


class AutoencoderKL(nn.Module):
  """Encoder, decoder and the 1x1 convolutions at the latents.

  Attributes:
    config: sizes.
    dtype: of convolutions and attention products; norms, softmax and what comes out have it too,
      but are float32 where it is narrower.
  """

  config: VAEConfig
  dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    c = self.config
    self.encoder = Encoder(c, self.dtype)
    self.decoder = Decoder(c, self.dtype)
    self.quant_conv = nn.Conv(2 * c.embed_dim, (1, 1), dtype=self.dtype)
    self.post_quant_conv = nn.Conv(c.z_channels, (1, 1), dtype=self.dtype)

  def encode(self, images: jax.Array) -> Posterior:
    """Images float [B, H, W, 3] in [-1, 1] -> posterior over latents [B, C, H/stride, W/stride].

    Raises:
      ValueError: where the shape or dtype differs, or a side is no positive multiple of the stride.
    """
    _check_array("images", images, "[batch, height, width, 3]", 3, IMAGE_CHANNELS)
    stride = self.config.stride
    for name, size in zip(("height", "width"), images.shape[1:3]):
      if size < 1 or size % stride:
        raise ValueError(
          f"images {name}={size}: expected a positive multiple of the autoencoder's stride {stride}"
        )
    moments = self.quant_conv(self.encoder(images))
    return Posterior(moments.transpose(0, 3, 1, 2).astype(_wide(self.dtype)))

  def decode(self, latents: jax.Array) -> jax.Array:
    """Latents float [B, C, h, w] -> images [B, h * stride, w * stride, 3], about [-1, 1].

    Raises:
      ValueError: where the shape or dtype differs.
    """
    channels = self.config.embed_dim
    _check_array("latents", latents, f"[batch, {channels}, height, width]", 1, channels)
    x = self.post_quant_conv(latents.transpose(0, 2, 3, 1))
    return self.decoder(x).astype(_wide(self.dtype))

  def __call__(self, images: jax.Array) -> jax.Array:
    """Reconstruction: decodes the posterior's mean; [B, H, W, 3] -> [B, H, W, 3]."""
    return self.decode(self.encode(images).mean)


def encode(
  config: VAEConfig, params: Params, images: jax.Array, dtype: DTypeLike = jnp.float32
) -> Posterior:
  """`AutoencoderKL.encode` as a pure function."""
  model = AutoencoderKL(config, dtype)
  posterior: Posterior = model.apply({"params": params}, images, method="encode")
  return posterior


def decode(
  config: VAEConfig, params: Params, latents: jax.Array, dtype: DTypeLike = jnp.float32
) -> jax.Array:
  """`AutoencoderKL.decode` as a pure function."""
  model = AutoencoderKL(config, dtype)
  images: jax.Array = model.apply({"params": params}, latents, method="decode")
  return images


def init_params(config: VAEConfig, key: jax.Array) -> Params:
  """Fresh float32 parameters (of random features: this project does not train autoencoders)."""
  images = jnp.zeros((1, config.stride, config.stride, IMAGE_CHANNELS))
  return AutoencoderKL(config).init(key, images)["params"]


def abstract_params(config: VAEConfig) -> Params:
  """The parameters' shapes and dtypes (nested dict of jax.ShapeDtypeStruct); computes nothing."""
  return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def torch_name(path: tuple[str, ...]) -> str:
  """The reference's name of a parameter, given its path in our tree.

  ('encoder', 'down_0_block_1', 'conv1', 'kernel') -> 'encoder.down.0.block.1.conv1.weight'. Kernels
  are HWIO here and [O, I, kh, kw] there; every other parameter has the same shape in both.

  Raises:
    ValueError: where the path does not end in kernel, scale or bias.
  """
  *modules, leaf = path
  leaves = {"kernel": "weight", "scale": "weight", "bias": "bias"}
  if leaf not in leaves:
    raise ValueError(f"path={path!r}: expected its last entry to be one of {', '.join(leaves)}")
  return ".".join([*map(_torch_module, modules), leaves[leaf]])


def _torch_module(name: str) -> str:
  """'down_0_block_1' -> 'down.0.block.1', 'mid_attn_1' -> 'mid.attn_1'; others are kept."""
  if re.match(r"(down|up)_\d", name):
    return name.replace("_", ".")
  return re.sub(r"^mid_", "mid.", name)


def _check_array(name: str, array: jax.Array, shape: str, axis: int, channels: int) -> None:
  if array.ndim != 4 or array.shape[axis] != channels:
    raise ValueError(f"{name} shape={array.shape}: expected {shape}")
  if not jnp.issubdtype(array.dtype, jnp.floating):
    raise ValueError(f"{name} dtype={array.dtype}: expected a floating-point dtype")
