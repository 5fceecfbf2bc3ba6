"""`tools/encode_latents.py`: images in, the latents that training reads out."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys

import golden
import jax
import numpy as np
import pytest
from golden import quick_environment, quick_jit
from golden import quick_programs as quick_programs
from PIL import Image

from marche_jax.config import DataConfig, ModelConfig, VAEConfig
from marche_jax.models import vae
from marche_jax.training import sources
from marche_jax.weights import checkpoint

ROOT = pathlib.Path(__file__).parents[2]
TOOL = ROOT / "tools" / "encode_latents.py"
MODEL = ModelConfig(img_size=8, vae_stride=2, vae_embed_dim=3, class_num=2)
VAE = VAEConfig(
  ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), z_channels=3, embed_dim=3
)
CONFIG = f"""
from marche_jax.config import Config, ModelConfig, VAEConfig, mutable
def get_config():
  return mutable(Config(model={MODEL!r}, vae={VAE!r}))
"""

_spec = importlib.util.spec_from_file_location("encode_latents", TOOL)
encode_latents = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(encode_latents)


@pytest.fixture(scope="module")
def params() -> vae.Params:
  return jax.tree.map(np.asarray, golden.random_params(VAE, seed=3))


@pytest.fixture
def images(tmp_path: pathlib.Path) -> np.ndarray:
  """Five images of two classes in tmp_path/images, as uint8 [5, 8, 8, 3]."""
  pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
  for name, image in zip(("a/0.png", "a/1.png", "b/0.png", "b/1.png", "b/2.png"), pixels):
    path = tmp_path / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
  return pixels


def run_tool(work: pathlib.Path, *flags: str) -> subprocess.CompletedProcess[str]:
  (work / "config.py").write_text(CONFIG)
  return subprocess.run(
    [sys.executable, str(TOOL), "--config=config.py", "--data=images", "--vae=vae", *flags],
    cwd=work, capture_output=True, text=True, check=False,
    env=quick_environment(ROOT),
  )  # fmt: skip


encode = quick_jit(vae.encode, static_argnums=0)


def expected_moments(params: vae.Params, images: np.ndarray) -> np.ndarray:
  return np.asarray(encode(VAE, params, images.astype(np.float32) / 127.5 - 1).moments)


def test_the_command_writes_what_training_reads(
  tmp_path: pathlib.Path, images: np.ndarray, params: vae.Params
) -> None:
  checkpoint.save_model(tmp_path / "vae", "vae", VAE, params)
  done = run_tool(tmp_path, "--out=new/latents", "--batch_size=2")
  assert done.returncode == 0, done.stderr
  assert "moments of 5 images of 2 classes" in done.stdout
  assert os.listdir(tmp_path / "new") == ["latents"]
  config = DataConfig(source="latents", path=str(tmp_path / "new" / "latents"), flip=True)
  source = sources.open_source(config, MODEL)
  assert source.labels.tolist() == [0, 0, 1, 1, 1]
  plain, mirrored = expected_moments(params, images), expected_moments(params, images[:, :, ::-1])
  for n in range(5):
    np.testing.assert_allclose(source[n]["moments"], plain[n], atol=1e-4)
    np.testing.assert_allclose(source.mirrored(n)["moments"], mirrored[n], atol=1e-4)
  assert np.abs(plain - mirrored).max() > 0.1

  (tmp_path / "images" / "a" / "0.png").write_bytes(
    b"broken"
  )  # it would be refused if it got there
  again = run_tool(tmp_path, "--out=new/latents")
  message = "error: new/latents: expected a new or an empty directory\n"
  assert (again.returncode, again.stderr) == (1, message)


@pytest.mark.parametrize("broken", ["image", "parameters"])
def test_a_failure_leaves_nothing(
  tmp_path: pathlib.Path, images: np.ndarray, params: vae.Params, broken: str
) -> None:
  source = sources.FolderSource(tmp_path / "images", "raise", MODEL)
  if broken == "image":
    (tmp_path / "images" / "b" / "2.png").unlink()
  else:
    params = jax.tree.map(lambda x: x * np.nan, params)
  message = "b/2.png: broken image" if broken == "image" else "image 0: its moments are not finite"
  with (
    pytest.raises(ValueError, match=message),
    sources.new_directory(tmp_path / "latents") as directory,
  ):
    encode_latents.encode(source, MODEL, VAE, params, directory, batch_size=4, flip=False)
  assert os.listdir(tmp_path) == ["images"]


def test_without_flip_and_without_space(
  tmp_path: pathlib.Path,
  images: np.ndarray,
  params: vae.Params,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  source = sources.FolderSource(tmp_path / "images", "raise", MODEL)
  encode_latents.encode(source, MODEL, VAE, params, tmp_path, batch_size=8, flip=False)
  assert sorted(p.name for p in tmp_path.glob("*.npy")) == ["labels.npy", "moments.npy"]
  found = np.load(tmp_path / "moments.npy")
  np.testing.assert_allclose(found, expected_moments(params, images), atol=1e-4)
  usage = type("Usage", (), {"free": 100})
  monkeypatch.setattr(encode_latents.shutil, "disk_usage", lambda _: usage)
  with pytest.raises(ValueError, match=r"GB needed, 0\.0 GB free"):
    encode_latents.encode(source, MODEL, VAE, params, tmp_path, batch_size=8, flip=False)
