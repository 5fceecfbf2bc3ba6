"""MAR in JAX, accelerated without training by MARché."""

from marche_jax.checkpoint import Model, load_model, save_model
from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.generation import generate, to_images

__all__ = [
  "Model", "ModelConfig", "SampleConfig", "generate", "load_model", "save_model", "to_images",
]  # fmt: skip
