"""The embedded model's configuration; it lives in the package, `marche_jax/embedded/config.py`."""

from marche_jax.embedded.config import get_config as get_config
