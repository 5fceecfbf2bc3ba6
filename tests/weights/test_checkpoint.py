"""Checkpoints: what is stored comes back; what was damaged, or does not fit, is refused."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marche_jax.config import TRAINING_FIELDS, ModelConfig, SampleConfig, VAEConfig
from marche_jax.weights import checkpoint

MODEL = ModelConfig(
  img_size=16, vae_stride=2, vae_embed_dim=4, encoder_embed_dim=16, encoder_depth=2,
  encoder_num_heads=2, decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2, mlp_ratio=2.0,
  class_num=3, buffer_size=4, diffloss_d=2, diffloss_w=8,
)  # fmt: skip
VAE = VAEConfig(
  ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), resolution=16, z_channels=4,
  embed_dim=4,
)  # fmt: skip
SAMPLE = SampleConfig(num_iter=8, cfg=2.5)


def random_params(kind: str, config: ModelConfig | VAEConfig, seed: int = 0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: rng.standard_normal(leaf.shape, dtype=np.float32),
    checkpoint.abstract_params(kind, config),
  )


def assert_equal(a, b) -> None:
  jax.tree.map(np.testing.assert_array_equal, a, b)


def stored_files(directory: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in directory.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def params():
  return random_params("mar", MODEL)


@pytest.fixture(scope="module")
def vae_params():
  return random_params("vae", VAE)


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
  directory = tmp_path_factory.mktemp("saved") / "model"
  checkpoint.save_model(directory, "mar", MODEL, params, sample_config=SAMPLE)
  return directory


@pytest.fixture
def copied(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / "copied"))


def reseal(directory: pathlib.Path, change) -> None:
  """Rewrites config.json as if `save_model` had written other values."""
  path = directory / "mar" / "config.json"
  body = json.loads(path.read_text())
  del body["sha256"]
  change(body)
  path.write_text(checkpoint.sealed(body))


def test_comes_back_bit_for_bit(saved, params):
  model = checkpoint.load_model(saved)
  assert model.config == MODEL
  assert model.sample_config == SAMPLE
  assert model.vae_config is None and model.vae_params is None
  assert all(
    isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32
    for leaf in jax.tree.leaves(model.params)
  )
  assert_equal(model.params, params)


@pytest.mark.parametrize("order", [("mar", "vae"), ("vae", "mar")])
def test_both_kinds_share_a_directory(order, params, vae_params, tmp_path):
  parts = {"mar": (MODEL, params), "vae": (VAE, vae_params)}
  for kind in order:
    checkpoint.save_model(tmp_path / "a" / "b", kind, *parts[kind])
  model = checkpoint.load_model(tmp_path / "a" / "b")
  assert (model.config, model.vae_config, model.sample_config) == (MODEL, VAE, None)
  assert_equal(model.params, params)
  assert_equal(model.vae_params, vae_params)
  config, numpy_params = checkpoint.load_part(tmp_path / "a" / "b", "vae")
  assert config == VAE
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(numpy_params))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_stored_small_and_loaded_as_float32(dtype, saved, params, tmp_path):
  on_device = jax.tree.map(jnp.asarray, params)
  checkpoint.save_model(tmp_path / "half", "mar", MODEL, on_device, dtype=dtype)
  expected = jax.tree.map(lambda p: p.astype(jnp.dtype(dtype)).astype(np.float32), params)
  loaded = checkpoint.load_model(tmp_path / "half").params
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(loaded))
  assert_equal(loaded, expected)
  full, half = (sum(p.stat().st_size for p in stored_files(d)) for d in (saved, tmp_path / "half"))
  assert half < 0.75 * full  # the rest of this small model's files is metadata


def test_overflow_of_the_stored_dtype_is_refused(params, tmp_path):
  large = {**params, "fake_latent": np.full_like(params["fake_latent"], 1e5)}
  with pytest.raises(ValueError, match=r"fake_latent: not finite once cast .* to float16"):
    checkpoint.save_model(tmp_path / "new", "mar", MODEL, large, dtype="float16")
  assert not (tmp_path / "new").exists()


def test_nothing_stored_tells_where_it_was_written(saved, copied, params):
  for path in stored_files(saved):
    content = path.read_bytes()
    assert str(saved).encode() not in content and saved.name.encode() not in content, path
    assert "__pycache__" not in path.parts
  assert_equal(checkpoint.load_model(copied).params, params)  # it may be moved


def test_a_config_that_differs_is_refused_by_field(saved):
  other = dataclasses.replace(MODEL, encoder_depth=3, latent_scale=1.0)
  with pytest.raises(ValueError) as error:
    checkpoint.load_model(saved, other)
  message = str(error.value)
  assert str(saved) in message
  assert "model.encoder_depth=3, stored 2" in message
  assert "model.latent_scale=1.0, stored 0.2325" in message
  assert "decoder_depth" not in message


def test_fields_of_training_alone_may_differ(saved):
  other = dataclasses.replace(MODEL, attn_dropout=0.0, label_drop_prob=0.5)
  assert checkpoint.load_model(saved, other).config == other


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ModelConfig)])
def test_every_field_is_of_training_alone_or_must_agree(saved, field):
  """Images depend on all but those of training; on latent_scale too, by which they are decoded."""
  value = getattr(MODEL, field)
  # Twice each side of a division, so that the configuration stays a possible one.
  other = dataclasses.replace(
    MODEL, **{field: value / 2 if isinstance(value, float) else 2 * value}
  )
  if field in TRAINING_FIELDS:
    assert checkpoint.load_model(saved, other).config == other
  else:
    with pytest.raises(ValueError, match=rf"model\.{field}=.*, stored {re.escape(repr(value))}"):
      checkpoint.load_model(saved, other)


def test_fields_of_training():
  assert "latent_scale" not in TRAINING_FIELDS
  assert len(TRAINING_FIELDS) == 5 and all(hasattr(MODEL, field) for field in TRAINING_FIELDS)


def test_damage_to_any_stored_byte_is_refused(saved, copied):
  names = [p.relative_to(saved) for p in stored_files(saved)]
  assert len(names) > 5
  for name in names:
    path = copied / name
    content = path.read_bytes()
    damaged = [content + b"x"]
    if content:
      damaged += [content[:-1], content[: len(content) // 2]]
      for place in {0, len(content) // 2, len(content) - 1}:
        flipped = bytearray(content)
        flipped[place] ^= 1
        damaged.append(bytes(flipped))
    for wrong in damaged:
      path.write_bytes(wrong)
      with pytest.raises(ValueError, match=str(copied)):
        checkpoint.load_model(copied)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{copied}.*{path.name}"):
      checkpoint.load_model(copied)
    path.write_bytes(content)
  checkpoint.load_model(copied)


def test_an_edited_config_is_refused(copied):
  path = copied / "mar" / "config.json"
  path.write_text(path.read_text().replace('"cfg": 2.5', '"cfg": 7.5'))
  with pytest.raises(ValueError, match=r"config\.json is damaged or was edited"):
    checkpoint.load_model(copied)


def test_another_format_or_an_unknown_field_is_refused(copied):
  reseal(copied, lambda body: body.update(format=2))
  with pytest.raises(ValueError, match=rf"{copied}: format=2: expected 1"):
    checkpoint.load_model(copied)
  reseal(copied, lambda body: body.update(format=1, config={**body["config"], "surprise": 1}))
  with pytest.raises(ValueError, match=rf"{copied}: unknown field surprise"):
    checkpoint.load_model(copied)


def test_fields_younger_than_the_checkpoint_take_their_defaults(copied):
  reseal(copied, lambda body: (body["sample"].pop("policy"), body["config"].pop("latent_scale")))
  model = checkpoint.load_model(copied)
  assert model.sample_config == SAMPLE
  assert model.config == MODEL


def test_what_is_no_checkpoint_is_refused(vae_params, tmp_path):
  with pytest.raises(ValueError, match=r"nowhere: no such directory"):
    checkpoint.load_model(tmp_path / "nowhere")
  (tmp_path / "file").write_text("x")
  with pytest.raises(ValueError, match=r"file: no such directory"):
    checkpoint.load_model(tmp_path / "file")
  with pytest.raises(ValueError, match=r"not a 'mar' checkpoint"):
    checkpoint.load_model(tmp_path)
  checkpoint.save_model(tmp_path / "vae_alone", "vae", VAE, vae_params)
  with pytest.raises(ValueError, match=r"not a 'mar' checkpoint"):
    checkpoint.load_model(tmp_path / "vae_alone")


def test_overwriting_must_be_asked_for(copied, params):
  other = random_params("mar", MODEL, seed=1)
  with pytest.raises(ValueError, match=r"holds a 'mar' already"):
    checkpoint.save_model(copied, "mar", MODEL, other)
  assert_equal(checkpoint.load_model(copied).params, params)
  checkpoint.save_model(copied, "mar", MODEL, other, overwrite=True)
  assert_equal(checkpoint.load_model(copied).params, other)
  assert [p.name for p in copied.iterdir()] == ["mar"]


def test_a_failing_save_leaves_everything_as_it_was(copied, params, tmp_path, monkeypatch):
  def fail(path, tree):
    pathlib.Path(path).mkdir()
    (pathlib.Path(path) / "half").write_text("written")
    raise RuntimeError("disk full")

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.ocp, "save", fail)
    with pytest.raises(RuntimeError, match="disk full"):
      checkpoint.save_model(tmp_path / "a" / "b", "mar", MODEL, params)
    with pytest.raises(RuntimeError, match="disk full"):
      checkpoint.save_model(copied, "mar", MODEL, params, overwrite=True)
  assert not (tmp_path / "a").exists()
  assert [p.name for p in copied.iterdir()] == ["mar"]
  assert_equal(checkpoint.load_model(copied).params, params)


def test_too_little_space_is_noticed_before_writing(params, tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
  with pytest.raises(ValueError, match=r"GB needed, 0\.00 GB free"):
    checkpoint.save_model(tmp_path / "new", "mar", MODEL, params)
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda p: p.pop("z_proj"), r"missing parameter z_proj/bias of shape \(16,\)"),
    (lambda p: p.update(extra=np.zeros(2)), r"unknown parameter extra of shape \(2,\)"),
    (
      lambda p: p.update(mask_token=np.zeros((1, 24), np.float32)),
      r"mask_token has shape \(1, 24\), expected \(1, 1, 24\)",
    ),
    (
      lambda p: p.update(mask_token=np.zeros((1, 1, 24), np.int32)),
      r"mask_token has dtype int32, expected a float",
    ),
  ],
)
def test_parameters_of_another_model_are_refused(change, message, params, tmp_path):
  wrong = dict(params)
  change(wrong)
  with pytest.raises(ValueError, match=message):
    checkpoint.save_model(tmp_path / "new", "mar", MODEL, wrong)
  assert not (tmp_path / "new").exists()


def test_an_autoencoder_must_fit_the_transformer_beside_it(copied):
  wide = dataclasses.replace(VAE, embed_dim=3)
  with pytest.raises(ValueError, match=r"vae\.embed_dim=3: expected model\.vae_embed_dim = 4"):
    checkpoint.save_model(copied, "vae", wide, random_params("vae", wide))
  assert [p.name for p in copied.iterdir()] == ["mar"]


def test_a_place_that_cannot_be_written_is_named(params, tmp_path):
  (tmp_path / "file").write_text("x")
  with pytest.raises(ValueError, match=r"file/model: cannot be written"):
    checkpoint.save_model(tmp_path / "file" / "model", "mar", MODEL, params)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("mat", MODEL), r"kind='mat': expected one of mar, vae"),
    (("vae", MODEL), r"expected a VAEConfig"),
  ],
)
def test_wrong_arguments_are_named(arguments, message, params, tmp_path):
  with pytest.raises(ValueError, match=message):
    checkpoint.save_model(tmp_path, *arguments, params)
  with pytest.raises(ValueError, match=r"dtype='int8': expected one of float32"):
    checkpoint.save_model(tmp_path, "mar", MODEL, params, dtype="int8")
