"""The type of parameters: nested mappings from names to arrays, as Flax gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

Leaf: TypeAlias = jax.Array | np.ndarray | jax.ShapeDtypeStruct
"""One parameter: on a device, on the host, or its shape and dtype alone."""

Params: TypeAlias = Mapping[str, Any]
"""Values are `Leaf` or `Params`: Flax's trees are typed no further, and every access would ask."""
