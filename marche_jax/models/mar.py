"""MAR: masked autoregressive image generation with continuous tokens (arXiv 2406.11838).

An encoder sees buffer tokens and the known tokens; a decoder sees the encoder's output at known
positions and mask tokens elsewhere; its output z conditions the diffusion head of every token.

Shapes: B images, S image tokens, N = buffer + S tokens (buffer first), C token channels,
De / Dd encoder / decoder width, L layers. Layers of a stack share one set of parameters with a
leading axis [L], so that compile time does not grow with depth.

Reference: `models/mar.py` of MAR; the transformer block is that of timm's ViT.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from marche_jax.config import ModelConfig
from marche_jax.models.head import LAYER_NORM_EPSILON, Head
from marche_jax.models.params import Params as Params

_xavier = nn.initializers.xavier_uniform()
_normal = nn.initializers.normal(0.02)
_layer_norm = functools.partial(nn.LayerNorm, epsilon=LAYER_NORM_EPSILON, use_fast_variance=False)


def attention_logits(q: jax.Array, k: jax.Array, heads: int, valid: jax.Array | None) -> jax.Array:
  """q k^T / sqrt(head width), float32 [B, heads, Nq, Nk]; minus infinity for invalid keys.

  Args:
    q: queries [B, Nq, width], heads packed in the last axis.
    k: keys [B, Nk, width].
    heads: number of heads.
    valid: bool [B or 1, Nk]; False keys get no weight. None: all are valid.
  """
  split_q = q.reshape(*q.shape[:2], heads, -1)
  split_k = k.reshape(*k.shape[:2], heads, -1)
  logits = jnp.einsum("bqhd,bkhd->bhqk", split_q, split_k, preferred_element_type=jnp.float32)
  logits *= (q.shape[-1] // heads) ** -0.5
  return logits if valid is None else jnp.where(valid[:, None, None, :], logits, -jnp.inf)


def attention_weights(q: jax.Array, k: jax.Array, heads: int, valid: jax.Array | None) -> jax.Array:
  """Softmax of `attention_logits`, float32 [B, heads, Nq, Nk]."""
  return jax.nn.softmax(attention_logits(q, k, heads, valid), axis=-1)


def attention_output(weights: jax.Array, v: jax.Array) -> jax.Array:
  """Weights [B, heads, Nq, Nk] times values [B, Nk, width] -> [B, Nq, width]."""
  split_v = v.reshape(*v.shape[:2], weights.shape[1], -1)
  out = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), split_v)
  return out.reshape(*out.shape[:2], v.shape[-1])


class Block(nn.Module):
  """Pre-norm transformer block, with attention and feed-forward callable apart.

  Decoding runs layer ranges with keys and values of a cache, so `qkv`, `attend` and `feed_forward`
  are methods of their own; `__call__` is their composition over all tokens, for training.
  """

  width: int
  heads: int
  mlp_ratio: float
  attn_dropout: float = 0.0
  proj_dropout: float = 0.0
  dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=_xavier)
    self.norm1 = _layer_norm(dtype=self.dtype)
    self.qkv_proj = dense(3 * self.width, name="qkv")
    self.proj = dense(self.width)
    self.norm2 = _layer_norm(dtype=self.dtype)
    self.fc1 = dense(int(self.width * self.mlp_ratio))
    self.fc2 = dense(self.width)
    self.dropout_attn = nn.Dropout(self.attn_dropout)
    self.dropout_proj = nn.Dropout(self.proj_dropout)

  def qkv(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[B, N, width] -> queries, keys, values, each [B, N, width]."""
    q, k, v = jnp.split(self.qkv_proj(self.norm1(x)), 3, axis=-1)
    return q, k, v

  def queries(self, x: jax.Array) -> jax.Array:
    """[B, N, width] -> queries [B, N, width] alone."""
    return self._part(x, 0, 1)

  def queries_keys(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, N, width] -> queries and keys alone, each [B, N, width]."""
    q, k = jnp.split(self._part(x, 0, 2), 2, axis=-1)
    return q, k

  def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, N, width] -> keys and values alone, each [B, N, width]."""
    k, v = jnp.split(self._part(x, 1, 3), 2, axis=-1)
    return k, v

  def _part(self, x: jax.Array, first: int, last: int) -> jax.Array:
    """Some of the packed [query, key, value] projections."""
    weights = self.qkv_proj.variables["params"]
    columns = slice(first * self.width, last * self.width)
    kernel = weights["kernel"][:, columns].astype(self.dtype)
    return self.norm1(x) @ kernel + weights["bias"][columns].astype(self.dtype)

  def attend(
    self,
    x: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
    deterministic: bool = True,
  ) -> jax.Array:
    """The residual attention branch: x, q [B, Nq, width]; k, v [B, Nk, width]; valid [B, Nk]."""
    weights = attention_weights(q, k, self.heads, valid)
    weights = self.dropout_attn(weights, deterministic=deterministic)
    return self.project(x, attention_output(weights, v), deterministic)

  def project(self, x: jax.Array, attended: jax.Array, deterministic: bool = True) -> jax.Array:
    """Adds the projection of what attention gave, [B, Nq, width], to the residual x."""
    return x + self.dropout_proj(self.proj(attended), deterministic=deterministic)

  def feed_forward(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
    """The residual feed-forward branch, [B, N, width] -> [B, N, width]."""
    h = jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False)
    h = self.fc2(self.dropout_proj(h, deterministic=deterministic))
    return x + self.dropout_proj(h, deterministic=deterministic)

  def __call__(
    self, x: jax.Array, valid: jax.Array | None, deterministic: bool
  ) -> tuple[jax.Array, None]:
    """[B, N, width] -> [B, N, width] (as a scan's carry)."""
    q, k, v = self.qkv(x)
    x = self.attend(x, q, k, v, valid, deterministic)
    return self.feed_forward(x, deterministic), None


def make_block(config: ModelConfig, stack: str, dtype: DTypeLike = jnp.float32) -> Block:
  """One block of the 'encoder' or 'decoder', without dropout, for one layer's parameters."""
  return Block(
    getattr(config, f"{stack}_embed_dim"),
    getattr(config, f"{stack}_num_heads"),
    config.mlp_ratio,
    dtype=dtype,
    parent=None,
  )


class MAR(nn.Module):
  """The transformer and its head.

  Attributes:
    config: sizes.
    dtype: of activations; norms, softmax and the head's last layer compute in float32 regardless.
    remat: recompute each block's activations in the backward pass.
  """

  config: ModelConfig
  dtype: DTypeLike = jnp.float32
  remat: bool = False

  def setup(self) -> None:
    c = self.config
    dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=_xavier)
    self.class_emb = nn.Embed(c.class_num, c.encoder_embed_dim, embedding_init=_normal)
    self.fake_latent = self.param("fake_latent", _normal, (1, c.encoder_embed_dim))
    self.z_proj = dense(c.encoder_embed_dim)
    self.z_proj_ln = _layer_norm(dtype=self.dtype)
    self.encoder_pos_embed_learned = self.param(
      "encoder_pos_embed_learned", _normal, (1, c.num_tokens, c.encoder_embed_dim)
    )
    self.encoder_blocks = self._stack("encoder")
    self.encoder_norm = _layer_norm(dtype=self.dtype)
    self.decoder_embed = dense(c.decoder_embed_dim)
    self.mask_token = self.param("mask_token", _normal, (1, 1, c.decoder_embed_dim))
    self.decoder_pos_embed_learned = self.param(
      "decoder_pos_embed_learned", _normal, (1, c.num_tokens, c.decoder_embed_dim)
    )
    self.decoder_blocks = self._stack("decoder")
    self.decoder_norm = _layer_norm(dtype=self.dtype)
    self.diffusion_pos_embed_learned = self.param(
      "diffusion_pos_embed_learned", _normal, (1, c.seq_len, c.decoder_embed_dim)
    )
    self.head = Head(c, self.dtype)

  def _stack(self, stack: str) -> nn.Module:
    c = self.config
    block = nn.remat(Block, static_argnums=(3,), prevent_cse=False) if self.remat else Block
    return nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=nn.broadcast,
      length=getattr(c, f"{stack}_depth"),
    )(
      getattr(c, f"{stack}_embed_dim"),
      getattr(c, f"{stack}_num_heads"),
      c.mlp_ratio,
      c.attn_dropout,
      c.proj_dropout,
      self.dtype,
    )

  def class_embedding(self, labels: jax.Array, dropped: jax.Array | None = None) -> jax.Array:
    """int [B] -> [B, De]; where bool [B] `dropped` holds, the unconditional `fake_latent`."""
    embedding = self.class_emb(labels)
    if dropped is None:
      return embedding
    return jnp.where(dropped[:, None], self.fake_latent, embedding)

  def encoder_input(
    self, tokens: jax.Array, positions: jax.Array, class_embedding: jax.Array
  ) -> jax.Array:
    """Buffer tokens, then the given tokens, as the encoder's first layer sees them.

    Args:
      tokens: [B, n, C].
      positions: of the image tokens, int [B, n].
      class_embedding: [B, De]; every buffer token starts as a copy of it.

    Returns:
      [B, buffer + n, De].
    """
    c = self.config
    batch = tokens.shape[0]
    buffer = jnp.broadcast_to(
      class_embedding[:, None].astype(self.dtype), (batch, c.buffer_size, c.encoder_embed_dim)
    )
    x = jnp.concatenate([buffer, self.z_proj(tokens)], axis=1)
    position_embedding = self.encoder_pos_embed_learned[0]
    x += jnp.concatenate(
      [
        jnp.broadcast_to(position_embedding[: c.buffer_size], buffer.shape),
        position_embedding[c.buffer_size + positions],
      ],
      axis=1,
    ).astype(self.dtype)
    return self.z_proj_ln(x)

  def decoder_embedding(self, x: jax.Array) -> jax.Array:
    """Encoder output before its norm [B, n, De] -> [B, n, Dd], no position embedding added yet."""
    return self.decoder_embed(self.encoder_norm(x))

  def decoder_input(self, embedded: jax.Array, positions: jax.Array, valid: jax.Array) -> jax.Array:
    """Puts known tokens at their positions among mask tokens and adds position embeddings.

    Args:
      embedded: [B, buffer + n, Dd] from `decoder_embedding`.
      positions: of the n image tokens, int [B, n].
      valid: bool [B, n]; slots that hold no token are dropped.

    Returns:
      [B, N, Dd].
    """
    c = self.config
    batch = embedded.shape[0]
    x = jnp.broadcast_to(
      self.mask_token.astype(self.dtype),
      (batch, c.num_tokens, c.decoder_embed_dim),
    )
    x = x.at[:, : c.buffer_size].set(embedded[:, : c.buffer_size])
    where = jnp.where(valid, c.buffer_size + positions, x.shape[1])  # out of range: dropped
    images = jnp.arange(batch)[:, None]
    x = x.at[images, where].set(embedded[:, c.buffer_size :], mode="drop")
    return x + self.decoder_pos_embed_learned.astype(self.dtype)

  def decoder_positions(self, positions: jax.Array) -> jax.Array:
    """Position embedding of the buffer, then of image positions int [B, n]: [B, buffer + n, Dd]."""
    embedding = self.decoder_pos_embed_learned[0].astype(self.dtype)
    buffer = self.config.buffer_size
    shape = (positions.shape[0], buffer, embedding.shape[-1])
    return jnp.concatenate(
      [jnp.broadcast_to(embedding[:buffer], shape), embedding[buffer + positions]], axis=1
    )

  def masked_input(self, positions: jax.Array) -> jax.Array:
    """What the decoder sees of unknown tokens at image positions int [B, n]: [B, n, Dd]."""
    embedded = self.decoder_positions(positions)[:, self.config.buffer_size :]
    return embedded + self.mask_token[0].astype(self.dtype)

  def condition(self, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Decoder output before its norm, at image positions int [B, n]: [B, n, Dd] -> z [B, n, Dd]."""
    z = self.decoder_norm(x)
    return z + self.diffusion_pos_embed_learned[0][positions].astype(self.dtype)

  def forward_encoder(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    class_embedding: jax.Array,
    slots: int,
    deterministic: bool = True,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the encoder over buffer and visible tokens.

    Args:
      tokens: [B, S, C].
      mask: [B, S], 1 where a token is unknown.
      class_embedding: [B, De].
      slots: static number of slots for visible tokens, at least the visible ones of any image.
      deterministic: switches dropout off.

    Returns:
      Encoder output after its norm [B, buffer + slots, De] with visible tokens in raster order,
      their positions int [B, slots], and bool [B, slots] whether a slot holds a token.
    """
    positions = jnp.argsort(mask.astype(jnp.int32), axis=1, stable=True)[:, :slots]
    valid = jnp.take_along_axis(mask, positions, axis=1) == 0
    known = jnp.take_along_axis(tokens, positions[..., None], axis=1)
    x = self.encoder_input(known, positions, class_embedding)
    buffer_valid = jnp.ones((x.shape[0], self.config.buffer_size), bool)
    keys = jnp.concatenate([buffer_valid, valid], axis=1)
    x, _ = self.encoder_blocks(x, keys, deterministic)
    return self.encoder_norm(x), positions, valid

  def forward_decoder(
    self,
    encoded: jax.Array,
    positions: jax.Array,
    valid: jax.Array,
    deterministic: bool = True,
  ) -> jax.Array:
    """Runs the decoder over all tokens: what `forward_encoder` returned -> z [B, S, Dd]."""
    x = self.decoder_input(self.decoder_embed(encoded), positions, valid)
    x, _ = self.decoder_blocks(x, None, deterministic)
    seq_len = self.config.seq_len
    everywhere = jnp.broadcast_to(jnp.arange(seq_len), (x.shape[0], seq_len))
    return self.condition(x[:, self.config.buffer_size :], everywhere)

  def __call__(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    labels: jax.Array,
    dropped: jax.Array | None = None,
    *,
    slots: int | None = None,
    deterministic: bool = True,
  ) -> jax.Array:
    """Tokens [B, S, C] under a mask [B, S] with labels int [B] -> z [B, S, Dd].

    `dropped` (bool [B]) replaces a label by the unconditional embedding. `slots` defaults to S.
    """
    embedding = self.class_embedding(labels, dropped)
    slots = self.config.seq_len if slots is None else slots
    encoded, positions, valid = self.forward_encoder(tokens, mask, embedding, slots, deterministic)
    return self.forward_decoder(encoded, positions, valid, deterministic)

  def denoise(self, x: jax.Array, t: jax.Array, z: jax.Array) -> jax.Array:
    """The head: see `Head.__call__`."""
    return self.head(x, t, z)

  def everything(self, tokens: jax.Array, labels: jax.Array) -> jax.Array:
    """Touches every parameter, for initialisation only."""
    dropped = jnp.zeros(labels.shape, bool)
    z = self(tokens, jnp.ones(tokens.shape[:2]), labels, dropped)[:, 0]
    return self.head(tokens[:, 0], jnp.zeros(labels.shape, jnp.int32), z)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
  """Fresh float32 parameters, initialised as the reference does."""
  tokens = jnp.zeros((1, config.seq_len, config.token_dim))
  labels = jnp.zeros((1,), jnp.int32)
  return MAR(config).init(key, tokens, labels, method="everything")["params"]


def abstract_params(config: ModelConfig) -> Params:
  """The parameters' shapes and dtypes (nested dict of jax.ShapeDtypeStruct); computes nothing."""
  return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def inference_params(params: Params, dtype: DTypeLike) -> Params:
  """Parameters stored as decoding with `dtype` and `head_dtype` both of this dtype uses them.

  The result of decoding is the same: norms, the timestep embedding and the head's last layer, which
  compute in float32, stay as they are, and all others would be cast at every use.
  """
  float32 = ("norm", "z_proj_ln", "time_embed", "final_linear")

  def cast(path: tuple[jax.tree_util.DictKey, ...], x: jax.Array) -> jax.Array:
    wide = any(name in key.key for key in path for name in float32)
    return x if wide else x.astype(dtype)

  return jax.tree_util.tree_map_with_path(cast, params)


def patchify(latents: jax.Array, config: ModelConfig) -> jax.Array:
  """Latents [B, channels, h, w] -> tokens [B, S, C]; C is (channel, patch row, patch column)."""
  b, c, h, w = latents.shape
  p = config.patch_size
  x = latents.reshape(b, c, h // p, p, w // p, p)
  return x.transpose(0, 2, 4, 1, 3, 5).reshape(b, (h // p) * (w // p), c * p * p)


def unpatchify(tokens: jax.Array, config: ModelConfig) -> jax.Array:
  """Tokens [B, S, C] -> latents [B, channels, h, w]; undoes `patchify`."""
  p, g = config.patch_size, config.grid_size
  x = tokens.reshape(tokens.shape[0], g, g, config.vae_embed_dim, p, p)
  return x.transpose(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], *config.latent_shape)
