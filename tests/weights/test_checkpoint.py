"""Checkpoints: what is stored comes back; what was damaged, or does not fit, is refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
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
def test_half_precision_is_stored_small_and_loaded_as_float32(dtype, tmp_path):
  config = dataclasses.replace(MODEL, class_num=3000)  # so large that metadata hardly count
  params = random_params("mar", config)
  on_device = jax.tree.map(jnp.asarray, params)
  checkpoint.save_model(tmp_path / "full", "mar", config, params)
  checkpoint.save_model(tmp_path / "half", "mar", config, on_device, dtype=dtype)
  expected = jax.tree.map(lambda p: p.astype(jnp.dtype(dtype)).astype(np.float32), params)
  loaded = checkpoint.load_model(tmp_path / "half").params
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(loaded))
  assert_equal(loaded, expected)
  full, half = (sum(p.stat().st_size for p in stored_files(tmp_path / d)) for d in ("full", "half"))
  assert half < 0.75 * full


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
  with pytest.raises(ValueError, match=rf"{copied}: mar/config\.json: format=2: expected 1"):
    checkpoint.load_model(copied)
  reseal(copied, lambda body: body.update(format=1, config={**body["config"], "surprise": 1}))
  with pytest.raises(ValueError, match=rf"{copied}: mar/config\.json: unknown field surprise"):
    checkpoint.load_model(copied)


def _file(body) -> dict[str, object]:
  return next(iter(body["files"].values()))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda b: b.pop("format"), "format=None: expected 1"),
    (lambda b: b.pop("kind"), "missing field kind"),
    (lambda b: b.pop("dtype"), "missing field dtype"),
    (lambda b: b.pop("files"), "missing field files"),
    (lambda b: b.update(notes="x"), "unknown field notes"),
    (lambda b: b.update(kind="vae"), "kind='vae': expected 'mar'"),
    (lambda b: b.update(dtype="float64"), "dtype='float64': expected one of float32"),
    (lambda b: b.update(dtype=["float32"]), r"dtype=\['float32'\]: expected one of float32"),
    (lambda b: b.update(config=None), "config=None: expected fields"),
    (lambda b: b.update(sample=[]), r"sample=\[\]: expected fields"),
    (lambda b: b.update(files={}), r"files=\{\}: expected every file in params/"),
    (lambda b: b.update(files=[1]), r"files=\[1\]: expected every file in params/"),
    (lambda b: b["files"].update({"/etc/passwd": _file(b)}), "'/etc/passwd': expected a path"),
    (lambda b: b["files"].update({"params/../../x": _file(b)}), r"'params/\.\./\.\./x': expected"),
    (lambda b: b["files"].update({"config.json": _file(b)}), r"'config\.json': expected a path"),
    (lambda b: b["files"].update({"params/x": {}}), "params/x: expected bytes and sha256"),
    (lambda b: b["files"].update({"params/x": 3}), "params/x: expected bytes and sha256"),
    (lambda b: _file(b).update(bytes="264"), "expected bytes and sha256, found .*'264'"),
    (lambda b: _file(b).update(sha256="0" * 63), "expected bytes and sha256"),
    (lambda b: _file(b).update(sha256=None), "expected bytes and sha256"),
  ],
)
def test_a_config_of_other_fields_is_refused_by_file_and_field(copied, change, message):
  """Sealed, as by another program: nothing of it is an error inside the loader."""
  reseal(copied, change)
  with pytest.raises(ValueError, match=rf"^checkpoint {copied}: mar/config\.json: .*{message}"):
    checkpoint.load_model(copied)
  with pytest.raises(ValueError, match=message):
    checkpoint.load_part(copied, "mar")


def test_a_file_without_a_digest_is_refused(copied):
  """Orbax would read it: a second manifest changes every array."""
  names = [
    p.relative_to(copied / "mar").as_posix() for p in stored_files(copied / "mar" / "params")
  ]
  for name in names:  # named in turn as if the digests did not know it
    content = (copied / "mar" / "config.json").read_text()
    reseal(copied, lambda body, name=name: body["files"].pop(name))
    with pytest.raises(ValueError, match=rf"mar/{name} is not listed in mar/config\.json"):
      checkpoint.load_model(copied)
    (copied / "mar" / "config.json").write_text(content)
  (copied / "mar" / "notes.txt").write_text("beside params/: nobody reads it")
  checkpoint.load_model(copied)
  (copied / "mar" / "params" / "more").symlink_to(copied)
  with pytest.raises(ValueError, match=r"mar/params/more is not listed"):
    checkpoint.load_model(copied)


def test_a_link_out_of_the_checkpoint_is_refused(copied, tmp_path):
  name = stored_files(copied / "mar" / "params")[0]
  name.rename(tmp_path / "elsewhere")
  name.symlink_to(tmp_path / "elsewhere")
  with pytest.raises(ValueError, match=rf"mar/params/.*{name.name} is a link out of mar/"):
    checkpoint.load_model(copied)
  (tmp_path / "elsewhere").rename(name)
  (tmp_path / "link").symlink_to(copied)  # the directory itself may lie anywhere
  checkpoint.load_model(tmp_path / "link")


@pytest.mark.parametrize(
  ("name", "other", "message"),
  [
    ("mask_token", np.zeros((1 << 20, 1), np.float32), r"shape \(1048576, 1\), expected \(1, 1"),
    ("mask_token", np.zeros((1, 1, 24), np.float16), r"dtype float16, expected float32"),
    ("mask_token", np.zeros((1, 1, 24), np.int32), r"dtype int32, expected a float"),
    ("extra", np.zeros(2, np.float32), r"unknown parameter extra"),
  ],
)
def test_stored_arrays_of_another_shape_are_never_made(
  copied, params, name, other, message, monkeypatch
):
  """Sealed with valid digests; the stored shape is a number, which costs nothing to make large."""
  stored = copied / "mar" / "params"
  shutil.rmtree(stored)
  checkpoint.ocp.save(stored, {**params, name: other})
  entries = {
    f"params/{p.relative_to(stored).as_posix()}": {
      "bytes": p.stat().st_size, "sha256": checkpoint._sha256(p)
    }
    for p in stored_files(stored)
  }  # fmt: skip
  reseal(copied, lambda body: body.update(files=entries))

  def load(*args):
    raise AssertionError("arrays were made before their shapes were looked at")

  monkeypatch.setattr(checkpoint.ocp, "load", load)
  with pytest.raises(ValueError, match=rf"checkpoint {copied}: mar: .*{name}.*") as error:
    checkpoint.load_model(copied)
  assert re.search(message, str(error.value))


def test_the_home_directory(saved, params, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(saved.parent))
  assert checkpoint.load_model(f"~/{saved.name}").config == MODEL
  assert checkpoint.load_part(f"~/{saved.name}", "mar")[0] == MODEL
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  checkpoint.save_model("~/new", "mar", MODEL, params)
  assert [p.name for p in tmp_path.iterdir()] == ["new"]
  with pytest.raises(ValueError, match="expected a path, found an empty text"):
    checkpoint.load_model("")


def test_the_digest_of_weights(saved, params):
  model = checkpoint.load_model(saved)
  assert re.fullmatch("[0-9a-f]{64}", model.weights_digest)
  assert checkpoint.load_model(saved).weights_digest == model.weights_digest
  changed = dict(params, mask_token=params["mask_token"] + 1)
  assert dataclasses.replace(model, params=changed).weights_digest != model.weights_digest
  assert dataclasses.replace(model, vae_params=changed).weights_digest != model.weights_digest


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
    with pytest.raises(ValueError, match=r"a/b: cannot be written \(disk full\)"):
      checkpoint.save_model(tmp_path / "a" / "b", "mar", MODEL, params)
    with pytest.raises(ValueError, match=r"copied: cannot be written \(disk full\)"):
      checkpoint.save_model(copied, "mar", MODEL, params, overwrite=True)
  assert not (tmp_path / "a").exists()
  assert [p.name for p in copied.iterdir()] == ["mar"]
  assert_equal(checkpoint.load_model(copied).params, params)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no way to reserve space")
def test_a_place_that_takes_no_more_is_noticed_before_writing(params, tmp_path, monkeypatch):
  """By a limit of file sizes, as a quota or a disk would: no traceback of Orbax's threads."""
  resource = pytest.importorskip("resource")
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  monkeypatch.setattr(checkpoint.ocp, "save", None)
  resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
  try:
    with pytest.raises(ValueError, match=r"a/b: cannot be written \(File too large\)$"):
      checkpoint.save_model(tmp_path / "a" / "b", "mar", MODEL, params)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert not (tmp_path / "a").exists()


def test_a_file_system_that_reserves_nothing_is_written_all_the_same(params, tmp_path, monkeypatch):
  def refuse(*args):
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")

  monkeypatch.setattr(checkpoint.os, "posix_fallocate", refuse, raising=False)
  checkpoint.save_model(tmp_path / "new", "mar", MODEL, params)
  checkpoint.load_model(tmp_path / "new")


def test_tensorstores_reason_is_short(params, tmp_path, monkeypatch):
  def fail(path, tree):
    raise ValueError("OUT_OF_RANGE: Error [tensorstore_spec='{...}'] [os_error_code='28']")

  monkeypatch.setattr(checkpoint.ocp, "save", fail)
  with pytest.raises(ValueError, match=r"new: cannot be written \(No space left on device\)$"):
    checkpoint.save_model(tmp_path / "new", "mar", MODEL, params)


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
