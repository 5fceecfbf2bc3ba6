r"""Fashion-MNIST with MAR's sequence length: 32x32 pixels (28 padded), 256 tokens of 2x2 pixels.

The stacks are those of the embedded model; what differs is the number of tokens, MAR's own, so that
policies can be compared where caching is meant to pay. Not trained yet. For 2 CPU cores:

    apt-get install dataset-fashion-mnist
    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1  # on a CPU: 1.25 times as fast
    python -m marche_jax.train --config=configs/fashion_mnist_256.py
"""

from marche_jax import config as config_lib


def get_config() -> config_lib.Mutable[config_lib.Config]:
  """Returns a mutable `marche_jax.config.Config`."""
  return config_lib.mutable(
    config_lib.Config(
      name="fashion_mnist_256",
      model=config_lib.ModelConfig(
        img_size=32,
        vae_stride=1,
        patch_size=2,
        vae_embed_dim=1,
        encoder_embed_dim=128,
        encoder_depth=4,
        encoder_num_heads=4,
        decoder_embed_dim=128,
        decoder_depth=4,
        decoder_num_heads=4,
        class_num=10,
        buffer_size=8,
        diffloss_d=3,
        diffloss_w=192,
        diffusion_batch_mul=2,
        attn_dropout=0.0,
        proj_dropout=0.0,
        latent_scale=1.0,
      ),
      vae=None,
      sample=config_lib.SampleConfig(
        num_iter=64, cfg=3.5, temperature=0.9, num_sampling_steps=50, max_timestep=950
      ),
      data=config_lib.DataConfig(source="idx", pad=2, flip=False),
      train=config_lib.TrainConfig(
        batch_size=32,
        epochs=10,
        blr=6.4e-3,  # learning rate 8e-4
        warmup_epochs=1,
        lr_schedule="cosine",
        ema_rate=0.9995,
        log_every=100,
        checkpoint_every=500,
        sample_every=0,
      ),
    )
  )
