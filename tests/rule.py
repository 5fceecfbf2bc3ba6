"""Weights made by a rule from their names, for full-size parity without a file of weights."""

from __future__ import annotations

import math
import zlib

import numpy as np

SEED = 7


def rule_weights(manifest: dict[str, list[int]]) -> dict[str, np.ndarray]:
  """Weights of the golden data in `data/rule/`.

  Each tensor is standard normal, drawn from a generator seeded by its name, and then scaled: weight
  matrices by 1 / sqrt(fan in), biases and embeddings by 0.02, norm scales to 1 + 0.1 w.

  Args:
    manifest: shape of every tensor by its name in the reference.

  Returns:
    float32 arrays of these names and shapes.
  """
  return {name: _tensor(name, tuple(shape)) for name, shape in manifest.items()}


def _tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
  generator = np.random.Generator(np.random.PCG64([SEED, zlib.crc32(name.encode())]))
  w = generator.standard_normal(shape, dtype=np.float32)
  if len(shape) >= 2 and shape[0] != 1 and "class_emb" not in name:
    return w / math.sqrt(math.prod(shape[1:]))
  if len(shape) == 1 and not name.endswith(".bias"):
    return 1 + 0.1 * w
  return 0.02 * w
