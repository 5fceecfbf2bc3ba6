"""MAR in JAX, accelerated without training by MARché."""

from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.decoding.generation import generate
from marche_jax.decoding.pixels import to_images
from marche_jax.weights.checkpoint import Model, load_model, save_model

__all__ = [
  "Model", "ModelConfig", "SampleConfig", "generate", "load_model", "save_model", "to_images",
]  # fmt: skip
