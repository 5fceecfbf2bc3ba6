"""The converter: names and shapes of the published files, exact values, refusals, memory."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import tarfile
import tempfile
import types
import warnings
import zipfile
from collections.abc import Mapping

import jax
import numpy as np
import pytest

from marche_jax import config
from marche_jax.config import ModelConfig, VAEConfig
from marche_jax.weights import archive, checkpoint, convert

ROOT = pathlib.Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
TOOL = ROOT / "tools" / "convert_weights.py"
SIZES = ("base", "large", "huge")


def golden_config(name: str) -> ModelConfig:
  values = json.loads((DATA / name / "config.json").read_text())
  del values["num_sampling_steps"]
  return ModelConfig(**values)


def vae_config() -> VAEConfig:
  return VAEConfig(**json.loads((DATA / "vae_tiny" / "config.json").read_text()))


def published_config(size: str) -> config.Config:
  path = ROOT / "configs" / f"mar_{size}.py"
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return config.freeze(module.get_config())


def manifest(name: str) -> dict[str, list[int]]:
  return json.loads((DATA / "manifests" / f"{name}.json").read_text())


def ones(shape: tuple[int, ...], dtype: str = "float32") -> convert.Tensor:
  return convert.Tensor(tuple(shape), dtype, lambda: np.ones(shape, np.float32))


def leaf(params, path: str) -> np.ndarray:
  for key in path.split("/"):
    params = params[key]
  return params


@pytest.fixture(scope="module")
def torch():
  return pytest.importorskip("torch")


def state_of(torch, name: str, key: str):
  with torch.serialization.safe_globals([argparse.Namespace]):
    return torch.load(DATA / name, weights_only=True)[key]


# ---- names and shapes


@pytest.mark.parametrize("size", SIZES)
def test_published_mar_by_names_and_shapes(size):
  places = convert.targets("mar", published_config(size).model)
  assert {n: list(t.shape) for n, t in places.items()} == manifest(f"mar_{size}")


def test_published_autoencoder_by_names_and_shapes():
  places = convert.targets("vae", published_config("base").vae)
  assert {n: list(t.shape) for n, t in places.items()} == manifest("kl16")


@pytest.mark.parametrize("kind", ["mar", "vae"])
def test_targets_fill_every_value_of_the_tree_once(kind):
  part = golden_config("mar_patch2") if kind == "mar" else vae_config()
  params = jax.tree.map(lambda x: np.zeros(x.shape, int), checkpoint.abstract_params(kind, part))
  for target in convert.targets(kind, part).values():
    values = leaf(params, "/".join(target.path))
    values = values if target.layer is None else values[target.layer]
    assert values.shape == np.ones(target.shape).transpose(target.axes).shape
    values += 1
  assert all((x == 1).all() for x in jax.tree.leaves(params))


@pytest.mark.parametrize("size, cfg", [("base", 2.9), ("large", 3.0), ("huge", 3.2)])
def test_published_sampling_defaults(size, cfg):
  sample = published_config(size).sample
  assert (sample.cfg, sample.cfg_schedule, sample.num_sampling_steps) == (cfg, "linear", 100)


# ---- values


def test_values_land_transposed_and_stacked(torch):
  tensors = convert.open_weights(DATA / "mar_patch2" / "checkpoint-last.pth", "mar")
  params = convert.convert(tensors, "mar", golden_config("mar_patch2"))
  state = {
    n: t.numpy() for n, t in state_of(torch, "mar_patch2/checkpoint-last.pth", "model_ema").items()
  }
  for path, name in [
    ("fake_latent", "fake_latent"),
    ("class_emb/embedding", "class_emb.weight"),
    ("z_proj/bias", "z_proj.bias"),
    ("z_proj_ln/scale", "z_proj_ln.weight"),
  ]:
    np.testing.assert_array_equal(leaf(params, path), state[name])
  np.testing.assert_array_equal(leaf(params, "z_proj/kernel"), state["z_proj.weight"].T)
  for path, layer, name in [
    ("decoder_blocks/qkv/kernel", 2, "decoder_blocks.2.attn.qkv.weight"),
    ("encoder_blocks/fc1/kernel", 1, "encoder_blocks.1.mlp.fc1.weight"),
    ("head/blocks/modulation/kernel", 0, "diffloss.net.res_blocks.0.adaLN_modulation.1.weight"),
    ("head/blocks/fc2/bias", 0, "diffloss.net.res_blocks.0.mlp.2.bias"),
  ]:
    np.testing.assert_array_equal(leaf(params, path)[layer], state[name].T)
  for path, name in [
    ("head/final_modulation/kernel", "diffloss.net.final_layer.adaLN_modulation.1.weight"),
    ("head/time_embed_2/kernel", "diffloss.net.time_embed.mlp.2.weight"),
  ]:
    np.testing.assert_array_equal(leaf(params, path), state[name].T)


def test_autoencoder_kernels_become_hwio(torch):
  tensors = convert.open_weights(DATA / "vae_tiny" / "kl.ckpt", "vae")
  params = convert.convert(tensors, "vae", vae_config())
  state = state_of(torch, "vae_tiny/kl.ckpt", "model")
  theirs = state["encoder.conv_in.weight"].numpy()  # [O, I, kh, kw]
  ours = leaf(params, "encoder/conv_in/kernel")
  assert ours.shape == (3, 3, 3, 32)
  assert ours[0, 2, 1, 5] == theirs[5, 1, 0, 2]


def test_the_ema_weights_are_the_default(torch):
  path = DATA / "mar_tiny" / "checkpoint-last.pth"
  for weights, key in [({}, "model_ema"), ({"weights": "model"}, "model")]:
    tensors = convert.open_weights(path, "mar", **weights)
    state = state_of(torch, "mar_tiny/checkpoint-last.pth", key)
    assert all((tensors[name].read() == state[name].numpy()).all() for name in state)
  assert any(
    (convert.read_torch(path, "ema")[name].read() != tensor.read()).any()
    for name, tensor in convert.read_torch(path, "model").items()
  )


@pytest.mark.parametrize(
  "kind, file, key",
  [
    ("mar", "mar_tiny/checkpoint-last.pth", "model_ema"),
    ("mar", "mar_patch2/checkpoint-last.pth", "model_ema"),
    ("vae", "vae_tiny/kl.ckpt", "model"),
  ],
)
def test_the_round_trip_is_bit_exact(kind, file, key, torch, tmp_path):
  safetensors = pytest.importorskip("safetensors.numpy")
  part = vae_config() if kind == "vae" else golden_config(file.split("/")[0])
  params = convert.convert(convert.open_weights(DATA / file, kind), kind, part)
  checkpoint.save_model(tmp_path / "ours", kind, part, params)
  stored_config, stored = checkpoint.load_part(tmp_path / "ours", kind)
  assert stored_config == part
  back = tmp_path / "back.safetensors"
  convert.write_safetensors(back, kind, stored_config, stored)

  state = {name: tensor.numpy() for name, tensor in state_of(torch, file, key).items()}
  written = safetensors.load_file(back)
  assert written.keys() == state.keys()
  for name, values in written.items():
    assert values.dtype == np.float32
    assert values.tobytes() == state[name].tobytes(), name

  again = convert.convert(convert.open_weights(back, kind), kind, part)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(again)):
    assert a.tobytes() == b.tobytes(), path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_widened_exactly(dtype, suffix, torch, tmp_path):
  state = state_of(torch, "mar_patch2/checkpoint-last.pth", "model")
  state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
  path = tmp_path / f"half{suffix}"
  if suffix == ".pth":
    torch.save({"model_ema": state}, path)
  else:
    pytest.importorskip("safetensors.torch").save_file(state, path)
  tensors = convert.open_weights(path, "mar")
  assert {tensor.dtype for tensor in tensors.values()} == {dtype}
  convert.convert(tensors, "mar", golden_config("mar_patch2"))
  for name, tensor in state.items():
    values = tensors[name].read()
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, tensor.float().numpy())


def test_the_format_before_zip_is_read_too(torch, tmp_path):
  state = state_of(torch, "mar_patch2/checkpoint-last.pth", "model")
  path = tmp_path / "old.pth"
  torch.save({"model_ema": state}, path, _use_new_zipfile_serialization=False)
  assert not archive.is_archive(path)
  assert archive.is_archive(DATA / "mar_patch2" / "checkpoint-last.pth")
  tensors = convert.open_weights(path, "mar")
  assert all((tensors[name].read() == tensor.numpy()).all() for name, tensor in state.items())


# ---- refusals


def fitting() -> tuple[ModelConfig, dict[str, convert.Tensor]]:
  part = golden_config("mar_patch2")
  return part, {n: ones(t.shape) for n, t in convert.targets("mar", part).items()}


@pytest.mark.parametrize(
  "change, message",
  [
    (
      lambda t: t.pop("decoder_blocks.1.norm2.bias"),
      r"missing tensor decoder_blocks\.1\.norm2\.bias, expected shape \[32\]",
    ),
    (
      lambda t: t.update({"loss.logvar": ones((3, 2))}),
      r"unknown tensor loss\.logvar of shape \[3, 2\]",
    ),
    (
      lambda t: t.update({"z_proj.weight": ones((12, 48))}),
      r"tensor z_proj\.weight has shape \[12, 48\], expected \[48, 12\]",
    ),
    (
      lambda t: t.update({"mask_token": ones((1, 32))}),
      r"tensor mask_token has shape \[1, 32\], expected \[1, 1, 32\]",
    ),
    (
      lambda t: t.update({"z_proj.bias": ones((48,), "float64")}),
      r"tensor z_proj\.bias is float64, expected float32, float16, bfloat16",
    ),
    (
      lambda t: t.update({"z_proj.bias": ones((48,), "int64")}),
      r"tensor z_proj\.bias is int64, expected float32, float16, bfloat16",
    ),
  ],
)
def test_a_tensor_that_does_not_fit_is_named(change, message):
  part, tensors = fitting()
  convert.convert(tensors, "mar", part)
  change(tensors)
  with pytest.raises(ValueError, match=f"^{message}$"):
    convert.convert(tensors, "mar", part)


def test_the_first_ten_problems_are_listed():
  part, tensors = fitting()
  with pytest.raises(ValueError) as error:
    convert.convert({f"x.{n}": t for n, t in tensors.items()}, "mar", part)
  message = str(error.value)
  assert message.count("missing tensor") == 10
  assert message.endswith(f"; and {2 * len(tensors) - 10} more")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value):
  part, tensors = fitting()
  values = np.ones(tensors["z_proj.bias"].shape, np.float32)
  values[7] = value
  tensors["z_proj.bias"] = convert.Tensor(values.shape, "float32", lambda: values)
  with pytest.raises(ValueError, match=r"tensor z_proj\.bias: holds NaN or infinity"):
    convert.convert(tensors, "mar", part)


class Payload:
  """Unpickled without care, it would run a command."""

  def __init__(self, command: str):
    self.command = command

  def __reduce__(self):
    return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda p: {"model_ema": p}, lambda p: {"args": {"x": [p]}}])
def test_a_malicious_pickle_is_refused_and_not_executed(wrap, zipped, torch, tmp_path):
  path, witness = tmp_path / "evil.pth", tmp_path / "witness"
  content = {"model_ema": {}, **wrap(Payload(f"touch {witness}"))}
  torch.save(content, path, _use_new_zipfile_serialization=zipped)
  with pytest.raises(ValueError, match=rf"{path}: refused, its pickle asks for \w+\.system"):
    convert.open_weights(path, "mar")
  assert not witness.exists()


SMALL = DATA / "mar_patch2" / "checkpoint-last.pth"


def record(path: pathlib.Path, name: str) -> tuple[int, int]:
  """Where the contents of a record lie in an archive: their first byte, and how many they are."""
  with zipfile.ZipFile(path) as content:
    info = content.getinfo(name)
  with path.open("rb") as file:
    file.seek(info.header_offset + 26)
    lengths = struct.unpack("<HH", file.read(4))
  return info.header_offset + 30 + sum(lengths), info.file_size


def records(path: pathlib.Path) -> list[str]:
  with zipfile.ZipFile(path) as content:
    return content.namelist()


def test_one_flipped_bit_of_a_tensor_is_refused_by_its_name(torch, tmp_path):
  path = tmp_path / "weights.pth"
  state = state_of(torch, "mar_patch2/checkpoint-last.pth", "model_ema")
  other = {name: tensor + 1 for name, tensor in state.items()}
  parameter = torch.nn.Parameter(state["fake_latent"])
  torch.save({"model": other, "model_ema": {**state, "fake_latent": parameter}}, path)
  whole = path.read_bytes()
  convert.open_weights(path, "mar")
  for number, (key, name) in {
    0: ("model", next(iter(state))),
    len(state) + list(state).index("z_proj.weight"): ("model_ema", "z_proj.weight"),
    len(state) + list(state).index("fake_latent"): ("model_ema", "fake_latent"),
  }.items():
    start, size = record(path, f"weights/data/{number}")
    damaged = bytearray(whole)
    damaged[start + size // 2 // 4 * 4 + 3] ^= 0x40  # the highest bit of an exponent
    path.write_bytes(damaged)
    with pytest.raises(ValueError) as error:
      convert.open_weights(path, "mar")
    assert str(error.value) == (
      f"{path}: not a readable torch file (its checksums show damage in "
      f"weights/data/{number} ({key}/{name}))"
    )
    path.write_bytes(whole)
  start, _ = record(path, "weights/data.pkl")
  path.write_bytes(whole[: start + 99] + bytes([whole[start + 99] ^ 1]) + whole[start + 100 :])
  with pytest.raises(ValueError, match=r"damage in weights/data\.pkl\)$"):
    convert.open_weights(path, "mar")


def test_any_flipped_bit_is_refused_or_harmless(torch, tmp_path):
  """In headers, padding and the directory too: what is accepted holds the same values."""
  expected = {name: t.read().copy() for name, t in convert.open_weights(SMALL, "mar").items()}
  path, whole = tmp_path / "weights.pth", SMALL.read_bytes()
  rng = np.random.default_rng(0)
  ends = [record(SMALL, name)[0] for name in records(SMALL)]
  with zipfile.ZipFile(SMALL) as content:
    directory = content.start_dir
  places = [*rng.integers(0, len(whole), 15), *(rng.choice(ends, 15) - rng.integers(1, 64, 15)),
            *rng.integers(directory, len(whole), 15)]  # fmt: skip
  refused = 0
  for place in map(int, places):
    damaged = bytearray(whole)
    damaged[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(damaged)
    try:
      found = convert.open_weights(path, "mar")
    except ValueError as error:
      assert str(error).startswith(f"{path}: not a readable torch file (")
      refused += 1
      continue
    assert found.keys() == expected.keys(), place
    for name, values in expected.items():
      np.testing.assert_array_equal(found[name].read(), values, err_msg=f"{place} {name}")
  assert refused > 15


def test_a_compressed_or_repeated_record_is_refused(torch, tmp_path):
  """torch maps the compressed bytes as if they were values."""
  for compression, repeated, message in (
    (zipfile.ZIP_DEFLATED, False, "is compressed"),
    (zipfile.ZIP_STORED, True, "stands there twice"),
  ):
    path = tmp_path / "weights.pth"
    with (
      zipfile.ZipFile(SMALL) as content,
      zipfile.ZipFile(path, "w", compression) as changed,
      warnings.catch_warnings(),
    ):
      warnings.simplefilter("ignore")  # of the name that stands there twice
      for name in content.namelist():
        changed.writestr(name, content.read(name))
      if repeated:
        changed.writestr(name, content.read(name))
    with pytest.raises(
      ValueError, match=rf"{path}: not a readable torch file \(record .*{message}"
    ):
      convert.open_weights(path, "mar")


def test_naming_the_damaged_tensors_executes_nothing(torch, tmp_path):
  path, witness = tmp_path / "evil.pth", tmp_path / "witness"
  torch.save({"args": Payload(f"touch {witness}"), "model_ema": {"z": torch.ones(3)}}, path)
  start, _ = record(path, "evil/data/0")
  content = bytearray(path.read_bytes())
  content[start] ^= 1
  path.write_bytes(content)
  with pytest.raises(ValueError, match=r"damage in evil/data/0 \(model_ema/z\)"):
    convert.open_weights(path, "mar")
  assert not witness.exists()


def test_what_follows_the_last_tensor_of_the_old_format_is_refused(torch, tmp_path):
  path = tmp_path / "old.pth"
  torch.save({"model_ema": {"z": torch.ones(3)}}, path, _use_new_zipfile_serialization=False)
  convert.open_weights(path, "mar")
  whole = path.read_bytes()
  path.write_bytes(whole + b"123")
  with pytest.raises(ValueError, match=r"not a readable torch file \(3 bytes follow its last tens"):
    convert.open_weights(path, "mar")
  path.write_bytes(whole[:-1])
  with pytest.raises(ValueError, match="not a readable torch file"):
    convert.open_weights(path, "mar")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_bare_pickle_is_refused_without_advice_to_execute_it(protocol, torch, tmp_path):
  path, witness = tmp_path / "bare.pth", tmp_path / "witness"
  for content in ({"model_ema": {"z": np.ones(3)}}, Payload(f"touch {witness}")):
    path.write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(ValueError, match=rf"^{path}: ") as error:
      convert.open_weights(path, "mar")
    assert "weights_only" not in str(error.value) and "trust" not in str(error.value)
    if protocol:
      assert "a bare pickle, which torch.save did not write" in str(error.value)
  assert not witness.exists()


def test_no_refusal_repeats_advice_to_execute(torch, tmp_path):
  with tarfile.open(tmp_path / "old.pth", "w") as file:
    file.addfile(tarfile.TarInfo("storages"))
  with pytest.raises(ValueError, match=r"torch's tar format of before 0\.1\.10"):
    convert.open_weights(tmp_path / "old.pth", "mar")
  advice = pickle.UnpicklingError(
    "Weights only load failed. In PyTorch 2.6, we changed the default ... `weights_only` to `False`"
    "\n WeightsUnpickler error: Unsupported operand 149\n\nCheck the documentation"
  )
  assert convert._reason(advice) == "Unsupported operand 149"
  assert "only" not in convert._reason(RuntimeError("Cannot use ``weights_only=True`` with ..."))


def test_safetensors_whose_contents_do_not_cover_the_file_are_refused(tmp_path):
  """The format has no checksums, but its header must account for every byte."""
  pytest.importorskip("safetensors")
  path = tmp_path / "weights.safetensors"

  def write(offsets, size=32, length=None, shapes=((4,), (4,))):
    header = {
      name: {"dtype": "F32", "shape": list(shape), "data_offsets": list(place)}
      for name, shape, place in zip("ab", shapes, offsets)
    }
    text = json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + text + bytes(size))

  write([(0, 16), (16, 32)])
  assert set(convert.open_weights(path, "mar")) == {"a", "b"}
  for arguments in (
    {"offsets": [(0, 16), (8, 24)]},  # overlap
    {"offsets": [(0, 16), (20, 36)], "size": 36},  # a gap
    {"offsets": [(0, 16), (16, 32)], "size": 33},  # bytes after the last
    {"offsets": [(0, 16), (16, 32)], "size": 31},
    {"offsets": [(0, 16), (16, 32)], "length": 1 << 40},
    {"offsets": [(0, 16), (16, 32)], "length": 0},
    {"offsets": [(0, 16), (16, 32)], "shapes": ((4,), (5,))},
  ):
    write(**arguments)
    with pytest.raises(ValueError, match=rf"{path}: not a readable safetensors file \("):
      convert.open_weights(path, "mar")


@pytest.mark.parametrize("large", [2e38, -2e38, 1311.0])
def test_absurd_weights_are_warned_of_by_name(large):
  part, tensors = fitting()
  values = np.full(tensors["z_proj.bias"].shape, 0.02, np.float32)
  values[7] = large
  tensors["z_proj.bias"] = convert.Tensor(values.shape, "float32", lambda: values)
  told = []
  params = convert.convert(tensors, "mar", part, warn=told.append)
  assert told == [f"tensor z_proj.bias: largest weight {abs(large):.3g}, median 0.02; "
                  "the file may be damaged"]  # fmt: skip
  assert params["z_proj"]["bias"][7] == np.float32(large)  # warned of, not changed


def test_ordinary_weights_are_not_warned_of(torch):
  """Nor a tensor whose weights are all large, or some of whose weights are thousands of medians."""
  told = []
  for name in ("mar_patch2", "mar_tiny"):
    tensors = convert.open_weights(DATA / name / "checkpoint-last.pth", "mar")
    convert.convert(tensors, "mar", golden_config(name), warn=told.append)
  convert.convert(
    convert.open_weights(DATA / "vae_tiny" / "kl.ckpt", "vae"), "vae", vae_config(),
    warn=told.append,
  )  # fmt: skip
  part, tensors = fitting()
  for values in (np.full(48, 1e5), np.linspace(0, 999, 48), np.r_[np.zeros(47), 999]):
    values = values.astype(np.float32)
    tensors["z_proj.bias"] = convert.Tensor((48,), "float32", lambda values=values: values)
    convert.convert(tensors, "mar", part, warn=told.append)
  assert told == []


def test_a_path_that_is_no_file(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match=rf"^{tmp_path}: expected a file .*, found a directory"):
    convert.open_weights(tmp_path, "mar")
  monkeypatch.setenv("HOME", str(tmp_path))
  with pytest.raises(ValueError, match=rf"^{tmp_path}/x\.pth: no such file"):
    convert.open_weights("~/x.pth", "mar")


def test_what_is_no_checkpoint_is_refused(torch, tmp_path):
  cases = {
    "absent.pth": (None, "no such file"),
    "weights.bin": (b"x", r"expected a name ending in \.pth, \.ckpt or \.safetensors"),
    "empty.pth": (b"", "not a readable torch file"),
    "text.pth": (b"hello", "not a readable torch file"),
    "empty.safetensors": (b"", "not a readable safetensors file"),
    "text.safetensors": (b"hello, world", "not a readable safetensors file"),
  }
  whole = (DATA / "mar_patch2" / "checkpoint-last.pth").read_bytes()
  cases["half.pth"] = (whole[: len(whole) // 2], "not a readable torch file")
  for name, (content, message) in cases.items():
    if content is not None:
      (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path / name}: {message}"):
      convert.open_weights(tmp_path / name, "mar")
  for name, content, message in [
    ("list.pth", [1, 2], "holds no state dict 'model_ema', but: list"),
    ("other.pth", {"model": {}, "epoch": 3}, "holds no state dict 'model_ema', but: model, epoch"),
    ("value.pth", {"model_ema": {"z": 3}}, "z is no dense tensor but a int"),
  ]:
    torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=message):
      convert.open_weights(tmp_path / name, "mar")


def test_a_truncated_safetensors_is_refused(tmp_path):
  part = golden_config("mar_patch2")
  params = jax.tree.map(
    lambda x: np.ones(x.shape, np.float32), checkpoint.abstract_params("mar", part)
  )
  path = tmp_path / "weights.safetensors"
  convert.write_safetensors(path, "mar", part, params)
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(ValueError, match=rf"{path}: not a readable safetensors file"):
    convert.open_weights(path, "mar")


@pytest.mark.parametrize("module, suffix", [("torch", ".pth"), ("safetensors", ".safetensors")])
def test_a_missing_package_is_named_with_its_remedy(module, suffix, tmp_path, monkeypatch):
  path = tmp_path / f"x{suffix}"
  path.write_bytes(b"PK\x03\x04")
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ImportError, match=rf'{module} is needed .*"marche_jax\[convert\]"'):
    convert.open_weights(path, "mar")


def test_the_way_back_refuses_what_it_would_destroy(tmp_path):
  part = golden_config("mar_patch2")
  params = jax.tree.map(
    lambda x: np.ones(x.shape, np.float32), checkpoint.abstract_params("mar", part)
  )
  with pytest.raises(ValueError, match=r"expected a name ending in \.safetensors"):
    convert.write_safetensors(tmp_path / "x.pth", "mar", part, params)
  with pytest.raises(ValueError, match=r"cannot be written"):
    convert.write_safetensors(tmp_path / "no" / "x.safetensors", "mar", part, params)
  path = tmp_path / "x.safetensors"
  path.write_text("precious")
  with pytest.raises(ValueError, match=r"exists already"):
    convert.write_safetensors(path, "mar", part, params)
  assert path.read_text() == "precious"
  convert.write_safetensors(path, "mar", part, params, overwrite=True)
  assert len(convert.open_weights(path, "mar")) == len(convert.targets("mar", part))
  assert [p.name for p in tmp_path.iterdir()] == [path.name]


# ---- the command line


CONFIG = """
import json
from marche_jax.config import Config, ModelConfig, VAEConfig, mutable
def get_config():
  values = json.load(open({mar!r}))
  del values["num_sampling_steps"]
  values |= dict(img_size=64, vae_stride=4, patch_size=2)  # 64 tokens too, beside the tiny KL
  return mutable(Config(model=ModelConfig(**values), vae=VAEConfig(**json.load(open({vae!r})))))
"""


def run_tool(
  *flags: str, prefix: tuple[str, ...] = (), env: Mapping[str, str] = types.MappingProxyType({})
) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, *prefix, str(TOOL), *flags], capture_output=True, text=True, check=False,
    env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **env},
  )  # fmt: skip


def test_the_command_makes_one_directory_of_both_kinds_and_goes_back(torch, tmp_path):
  config_file, dst = tmp_path / "config.py", tmp_path / "out" / "model"
  config_file.write_text(
    CONFIG.format(
      mar=str(DATA / "mar_tiny" / "config.json"), vae=str(DATA / "vae_tiny" / "config.json")
    )
  )
  # The configuration has patch 2, so tokens of 16 channels; the golden model has 4: refused.
  mar_flags = ["--kind=mar", f"--dst={dst}", f"--config={config_file}"]
  wrong = run_tool(*mar_flags, f"--src={DATA / 'mar_tiny' / 'checkpoint-last.pth'}")
  assert wrong.returncode == 1
  assert wrong.stderr.startswith(
    f"error: --src={DATA / 'mar_tiny' / 'checkpoint-last.pth'}: tensor "
  )
  assert "z_proj.weight has shape [64, 4], expected [64, 16]" in wrong.stderr
  assert wrong.stderr.count("\n") == 1
  assert not dst.parent.exists()

  state = state_of(torch, "mar_tiny/checkpoint-last.pth", "model_ema")
  state["z_proj.weight"] = torch.randn(64, 16)
  state["diffloss.net.input_proj.weight"] = torch.randn(48, 16)
  state["diffloss.net.final_layer.linear.weight"] = torch.randn(32, 48)
  state["diffloss.net.final_layer.linear.bias"] = torch.randn(32)
  torch.save({"model_ema": state, "args": argparse.Namespace(lr=1.0)}, tmp_path / "wide.pth")
  done = run_tool(*mar_flags, f"--src={tmp_path / 'wide.pth'}", "--config.sample.num_iter=32")
  assert (done.returncode, done.stderr) == (0, "")
  count = sum(tensor.numel() for tensor in state.values())
  assert f"{len(state)}/{len(state)} tensors" in done.stdout
  assert f"{count:,} parameters, {4 * count / 1e9:.3f} GB in float32" in done.stdout
  vae = run_tool(
    "--kind=vae", f"--src={DATA / 'vae_tiny' / 'kl.ckpt'}", f"--dst={dst}",
    f"--config={config_file}",
  )  # fmt: skip
  assert (vae.returncode, vae.stderr) == (0, "")
  model = checkpoint.load_model(dst)
  assert model.sample_config.num_iter == 32
  assert model.vae_config == vae_config()
  np.testing.assert_array_equal(model.params["z_proj"]["kernel"], state["z_proj.weight"].T)

  back = tmp_path / "back.safetensors"
  reverse = run_tool("--kind=mar", "--reverse", f"--src={dst}", f"--dst={back}")
  assert (reverse.returncode, reverse.stderr) == (0, "")
  tensors = convert.open_weights(back, "mar")
  assert all((tensors[name].read() == tensor.numpy()).all() for name, tensor in state.items())


def test_the_command_names_flag_and_path_in_one_line(torch, tmp_path):
  """`~` is the home directory; nothing is left of what is refused."""
  damaged = bytearray(SMALL.read_bytes())
  start, _ = record(SMALL, records(SMALL)[-8])
  damaged[start] ^= 1
  (tmp_path / "damaged.pth").write_bytes(damaged)
  flags = ["--kind=mar", f"--config={ROOT / 'configs' / 'mar_base.py'}", "--dst=~/new"]
  for src, message in (
    ("~/damaged.pth", "damaged.pth: not a readable torch file (its checksums show damage in "),
    ("~", ": expected a file (.pth, .ckpt, .safetensors), found a directory"),
    ("", "--src: expected a path, found an empty text"),
  ):
    done = run_tool(*flags, f"--src={src}", env={"HOME": str(tmp_path)})
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and message in done.stderr
    assert done.stderr.startswith(f"error: --src={tmp_path}" if src else "error: --src: ")
  assert [p.name for p in tmp_path.iterdir()] == ["damaged.pth"]


# ---- memory

# Runs the tool and reports, in bytes, the anonymous memory with all libraries loaded and its peak.
SAMPLED = """
import runpy, sys, threading, time
def anonymous():
  with open("/proc/self/status") as file:
    return next(1024 * int(l.split()[1]) for l in file if l.startswith("RssAnon"))
peak = 0
def watch():
  global peak
  while True:
    peak = max(peak, anonymous())
    time.sleep(0.005)
import marche_jax.weights.checkpoint
from marche_jax.config import ModelConfig
if {with_torch}:
  import torch
marche_jax.weights.checkpoint.abstract_params("mar", ModelConfig())
libraries = anonymous()
threading.Thread(target=watch, daemon=True).start()
sys.argv = sys.argv[1:]
try:
  runpy.run_path(sys.argv[0], run_name="__main__")
finally:
  print("memory", libraries, peak)
"""


def peak_memory(with_torch: bool, *flags: str) -> tuple[int, int]:
  done = run_tool(*flags, prefix=("-c", SAMPLED.format(with_torch=with_torch)))
  assert done.returncode == 0, done.stderr
  line = next(line for line in done.stdout.splitlines() if line.startswith("memory"))
  libraries, peak = map(int, line.split()[1:])
  return libraries, peak


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_full_size_pth_is_mapped_not_read(torch):
  """MAR-B; the file also holds the other set of weights, as the published ones do."""
  shapes = manifest("mar_base")
  weights = 4 * sum(int(np.prod(s)) for s in shapes.values())
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory) / "base.pth"
    torch.save({k: {n: torch.zeros(s) for n, s in shapes.items()} for k in ("model", "model_ema")},
               path)  # fmt: skip
    assert path.stat().st_size > 2 * weights
    libraries, peak = peak_memory(
      True, "--kind=mar", f"--src={path}", f"--dst={directory}/out",
      f"--config={ROOT / 'configs' / 'mar_base.py'}",
    )  # fmt: skip
  # 1.3 for everything needs larger weights than these: torch alone takes 0.15 of them.
  assert peak - libraries <= 1.1 * weights, (libraries, peak, weights)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_the_largest_model_converts_within_1_3_of_its_size():
  """MAR-H from a sparse file: its pages are zeros that take no disk, and file-backed when read."""
  header, end = {}, 0
  for name, shape in manifest("mar_huge").items():
    start, end = end, end + 4 * int(np.prod(shape))
    header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory) / "huge.safetensors"
    with path.open("wb") as file:
      file.write(struct.pack("<Q", len(text)) + text)
      file.truncate(8 + len(text) + end)
    _, peak = peak_memory(
      False, "--kind=mar", f"--src={path}", f"--dst={directory}/out",
      f"--config={ROOT / 'configs' / 'mar_huge.py'}",
    )  # fmt: skip
  assert peak <= 1.3 * end, (peak, end)
