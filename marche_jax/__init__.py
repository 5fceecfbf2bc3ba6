"""MAR in JAX, accelerated without training by MARché."""

from marche_jax.config import ModelConfig, SampleConfig

__all__ = ["ModelConfig", "SampleConfig"]
