r"""Fashion-MNIST with MAR's sequence length: 32x32 pixels (28 padded), 256 tokens of 2x2 pixels.

The stacks are those of the embedded model; what differs is the number of tokens, MAR's own, so that
policies can be compared where caching is meant to pay. Not trained yet. For 2 CPU cores:

    apt-get install dataset-fashion-mnist
    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1  # on a CPU: 1.25 times as fast
    python -m marche_jax.train --config=configs/fashion_mnist_256.py
"""

from marche_jax import config as config_lib
from marche_jax.embedded import config as embedded_config


def get_config() -> config_lib.Mutable[config_lib.Config]:
  """The embedded model's configuration, with more and smaller tokens."""
  config = embedded_config.get_config()
  config.name = "fashion_mnist_256"
  config.model.img_size = 32
  config.model.patch_size = 2
  config.sample.num_iter = 64
  config.data.pad = 2
  config.train.checkpoint_every = 500
  return config
