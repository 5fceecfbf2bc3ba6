r"""MAR-B, 256x256 ImageNet, KL-16 autoencoder: 208M parameters.

Published (arXiv 2406.11838): FID-50k 2.31, IS 281.7 with 256 iterations and guidance 2.9 (linear),
100 diffusion steps, temperature 1. To sample so, add --config.sample.num_iter=256. The default here
is 64 iterations, a quarter of the work, at the same guidance, which was not tuned again for 64.

Convert the published weights (MAR-B `checkpoint-last.pth` and KL-16 `kl16.ckpt`), then sample:

    pip install -e ".[convert]"
    python tools/convert_weights.py --kind=mar --src=checkpoint-last.pth \
      --dst=checkpoints/mar_base --config=configs/mar_base.py
    python tools/convert_weights.py --kind=vae --src=kl16.ckpt \
      --dst=checkpoints/mar_base --config=configs/mar_base.py
    python -m marche_jax.sample --config=configs/mar_base.py --checkpoint=checkpoints/mar_base \
      --out=samples/mar_base --num_images=16 --batch_size=4 --labels=207,360
"""

from marche_jax.config import Config, ModelConfig, Mutable, SampleConfig, VAEConfig, mutable


def get_config() -> Mutable[Config]:
  return mutable(
    Config(
      name="mar_base",
      model=ModelConfig(
        encoder_embed_dim=768,
        encoder_depth=12,
        encoder_num_heads=12,
        decoder_embed_dim=768,
        decoder_depth=12,
        decoder_num_heads=12,
        diffloss_d=6,
        diffloss_w=1024,
      ),
      vae=VAEConfig(),
      sample=SampleConfig(num_iter=64, cfg=2.9, cfg_schedule="linear"),
    )
  )
