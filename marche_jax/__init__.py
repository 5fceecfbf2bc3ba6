"""MAR in JAX, accelerated without training by MARché."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from marche_jax.config import ModelConfig, SampleConfig
  from marche_jax.decoding.generation import generate
  from marche_jax.decoding.pixels import to_images
  from marche_jax.weights.checkpoint import Model, load_model, save_model

__all__ = [
  "Model", "ModelConfig", "SampleConfig", "generate", "load_model", "save_model", "to_images",
]  # fmt: skip

_HOMES = {
  "Model": "weights.checkpoint",
  "ModelConfig": "config",
  "SampleConfig": "config",
  "generate": "decoding.generation",
  "load_model": "weights.checkpoint",
  "save_model": "weights.checkpoint",
  "to_images": "decoding.pixels",
}


def __getattr__(name: str) -> object:
  """Imports a public name when it is first used: `python -m marche_jax` needs no jax."""
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
