r"""MAR-L, 256x256 ImageNet, KL-16 autoencoder: 479M parameters.

Published (arXiv 2406.11838): FID-50k 1.78, IS 296.0 with 256 iterations and guidance 3.0 (linear),
100 diffusion steps, temperature 1. To sample so, add --config.sample.num_iter=256. The default here
is 64 iterations, a quarter of the work, at the same guidance, which was not tuned again for 64.

Convert the published weights (MAR-L `checkpoint-last.pth` and KL-16 `kl16.ckpt`), then sample:

    pip install -e ".[convert]"
    python tools/convert_weights.py --kind=mar --src=checkpoint-last.pth \
      --dst=checkpoints/mar_large --config=configs/mar_large.py
    python tools/convert_weights.py --kind=vae --src=kl16.ckpt \
      --dst=checkpoints/mar_large --config=configs/mar_large.py
    python -m marche_jax.sample --config=configs/mar_large.py --checkpoint=checkpoints/mar_large \
      --out=samples/mar_large --num_images=16 --batch_size=4 --labels=207,360
"""

from marche_jax.config import Config, ModelConfig, Mutable, SampleConfig, VAEConfig, mutable


def get_config() -> Mutable[Config]:
  return mutable(
    Config(
      name="mar_large",
      model=ModelConfig(
        encoder_embed_dim=1024,
        encoder_depth=16,
        encoder_num_heads=16,
        decoder_embed_dim=1024,
        decoder_depth=16,
        decoder_num_heads=16,
        diffloss_d=8,
        diffloss_w=1280,
      ),
      vae=VAEConfig(),
      sample=SampleConfig(num_iter=64, cfg=3.0, cfg_schedule="linear"),
    )
  )
