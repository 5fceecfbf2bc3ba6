r"""MAR-H, 256x256 ImageNet, KL-16 autoencoder: 943M parameters.

Published (arXiv 2406.11838): FID-50k 1.55, IS 303.7 with 256 iterations and guidance 3.2 (linear),
100 diffusion steps, temperature 1. To sample so, add --config.sample.num_iter=256. The default here
is 64 iterations, a quarter of the work, at the same guidance, which was not tuned again for 64.

Convert the published weights (MAR-H `checkpoint-last.pth` and KL-16 `kl16.ckpt`), then sample:

    pip install -e ".[convert]"
    python tools/convert_weights.py --kind=mar --src=checkpoint-last.pth \
      --dst=checkpoints/mar_huge --config=configs/mar_huge.py
    python tools/convert_weights.py --kind=vae --src=kl16.ckpt \
      --dst=checkpoints/mar_huge --config=configs/mar_huge.py
    python -m marche_jax.sample --config=configs/mar_huge.py --checkpoint=checkpoints/mar_huge \
      --out=samples/mar_huge --num_images=16 --batch_size=4 --labels=207,360
"""

from marche_jax.config import Config, ModelConfig, Mutable, SampleConfig, VAEConfig, mutable


def get_config() -> Mutable[Config]:
  return mutable(
    Config(
      name="mar_huge",
      model=ModelConfig(
        encoder_embed_dim=1280,
        encoder_depth=20,
        encoder_num_heads=16,
        decoder_embed_dim=1280,
        decoder_depth=20,
        decoder_num_heads=16,
        diffloss_d=12,
        diffloss_w=1536,
      ),
      vae=VAEConfig(),
      sample=SampleConfig(num_iter=64, cfg=3.2, cfg_schedule="linear"),
    )
  )
