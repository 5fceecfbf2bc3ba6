r"""The embedded model: Fashion-MNIST in pixel space, 49 tokens of 4x4 pixels, 2.4M parameters.

Trained on 2 cores of an AMD EPYC CPU (AVX-512), batch 32, 10 epochs = 18,750 updates in 94 minutes
(123 images per second where nothing else ran), by

    apt-get install dataset-fashion-mnist
    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1  # on a CPU: 1.25 times as fast
    python -m marche_jax.train --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist
    python -m marche_jax.train --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist \
      --export=fashion_mnist --export_dtype=float16

but for one thing: up to update 11,000 the learning rate followed the cosine of 12 epochs
(--config.train.epochs=12), and from there that of 10. Mean loss of the 2,000 updates up to update
4,000: 0.113, 8,000: 0.102, 12,000: 0.098, 16,000: 0.091; of the last 2,750: 0.089.

5,000 samples (python -m marche_jax.sample --num_images=5000 --batch_size=250, then
python -m marche_jax.evaluate): the shipped classifier recognises 95.9%; their Fréchet distance on
its features is 14.8 (13.8 to 16.0), where real test images have 0.4. More updates would help: the
loss was still falling, and some garments carry patchwise noise.
"""

from marche_jax import config as config_lib


def get_config() -> config_lib.Mutable[config_lib.Config]:
  """Returns a mutable `marche_jax.config.Config`."""
  return config_lib.mutable(
    config_lib.Config(
      name="fashion_mnist",
      model=config_lib.ModelConfig(
        img_size=28,
        vae_stride=1,
        patch_size=4,
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
        num_iter=32, cfg=3.5, temperature=0.9, num_sampling_steps=50, max_timestep=950
      ),
      data=config_lib.DataConfig(source="idx", flip=False),
      train=config_lib.TrainConfig(
        batch_size=32,
        epochs=10,
        blr=6.4e-3,  # learning rate 8e-4
        warmup_epochs=1,
        lr_schedule="cosine",
        ema_rate=0.9995,
        log_every=100,
        checkpoint_every=1000,
        sample_every=0,
      ),
    )
  )
