"""The type of parameters: nested mappings from names to arrays, as Flax gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias, Union

import jax
import numpy as np

Leaf: TypeAlias = jax.Array | np.ndarray | jax.ShapeDtypeStruct
"""One parameter: on a device, on the host, or its shape and dtype alone."""

Params: TypeAlias = Mapping[str, Union[Leaf, "Params"]]


def subtree(params: Params, name: str) -> Params:
  """The parameters of a module within others."""
  inner = params[name]
  assert isinstance(inner, Mapping), name
  return inner
