"""Conversion between the PyTorch reference's weights and our checkpoints.

A foreign file becomes a mapping of names to `Tensor`s that are read one by one (`open_weights`);
`targets` says where in our tree every tensor of the reference belongs; `convert` checks names and
shapes, all of them before it reads the first value, and fills preallocated arrays. So the peak
memory is that of the converted weights and one tensor more. `write_safetensors` is the way back.

torch and safetensors are imported only where a file needs them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import operator
import os
import pathlib
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING

import jax
import numpy as np
from absl import logging

from marche_jax.files import atomic_write, user_path
from marche_jax.models import vae
from marche_jax.models.params import Params
from marche_jax.weights import archive, checkpoint
from marche_jax.weights.checkpoint import PartConfig, PathLike

if TYPE_CHECKING:
  import safetensors
  import torch

MAX_LISTED_PROBLEMS = 10

ABSURD = 1e3
"""Weights beyond this, and beyond `ABSURD_RATIO` times their tensor's median, are warned of.

A float32 weight of 0.02 with one bit of its exponent flipped is 1,300 at the least where it grows
by more than a factor of 256; a trained network has no weight near that in a tensor of small
ones."""

ABSURD_RATIO = 1e4

_TORCH_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # in the first record before torch 1.6

_FLOATS = ("float32", "float16", "bfloat16")  # float64 would lose digits, integers are no weights
_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}

# Our module names where they are not the reference's, per module of the tree.
_BLOCK_MODULES = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
_HEAD_BLOCK_MODULES = {
  "norm": "in_ln",
  "fc1": "mlp.0",
  "fc2": "mlp.2",
  "modulation": "adaLN_modulation.1",
}
_HEAD_MODULES = {
  "time_embed_0": "time_embed.mlp.0",
  "time_embed_2": "time_embed.mlp.2",
  "final_modulation": "final_layer.adaLN_modulation.1",
  "final_linear": "final_layer.linear",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a foreign file; `read` gives its values, as float32, when they are needed."""

  shape: tuple[int, ...]
  dtype: str  # numpy's name of it in the file
  read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Target:
  """Where a tensor of the reference belongs in our tree.

  Attributes:
    path: of the leaf, e.g. ('encoder_blocks', 'qkv', 'kernel').
    layer: index into the leaf's leading axis where layers are stacked, else None.
    shape: of the reference's tensor.
    axes: its transposition that gives ours: kernels are [in, out] and HWIO here, [out, in] and
      OIHW in the reference.
  """

  path: tuple[str, ...]
  layer: int | None
  shape: tuple[int, ...]
  axes: tuple[int, ...]


# ---- names and shapes


def targets(kind: str, config: PartConfig) -> dict[str, Target]:
  """Every tensor that the reference's model of this configuration has, by its name there.

  Args:
    kind: 'mar' or 'vae'.
    config: ModelConfig or VAEConfig.
  """
  found = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(checkpoint.abstract_params(kind, config)):
    path = tuple(key.key for key in keys)
    stacked = kind == "mar" and (path[0].endswith("_blocks") or path[:2] == ("head", "blocks"))
    shape = leaf.shape[1:] if stacked else leaf.shape
    axes = tuple(range(len(shape)))
    if path[-1] == "kernel":  # ours from theirs: [out, in] -> [in, out], OIHW -> HWIO
      axes = (1, 0) if len(shape) == 2 else (2, 3, 1, 0)
    theirs = tuple(shape[axes.index(i)] for i in range(len(shape)))
    for layer in range(leaf.shape[0]) if stacked else (None,):
      name = vae.torch_name(path) if kind == "vae" else _mar_torch_name(path, layer)
      found[name] = Target(path, layer, theirs, axes)
  return found


def _mar_torch_name(path: tuple[str, ...], layer: int | None) -> str:
  """('encoder_blocks', 'qkv', 'kernel'), layer 3 -> 'encoder_blocks.3.attn.qkv.weight'."""
  if len(path) == 1:  # a bare parameter such as mask_token
    return path[0]
  *modules, leaf = path
  if modules[0].endswith("_blocks"):
    names = [modules[0], str(layer), _BLOCK_MODULES.get(modules[1], modules[1])]
  elif modules[:2] == ["head", "blocks"]:
    names = ["diffloss.net.res_blocks", str(layer), _HEAD_BLOCK_MODULES[modules[2]]]
  elif modules[0] == "head":
    names = ["diffloss.net", _HEAD_MODULES.get(modules[1], modules[1])]
  else:
    names = modules
  return ".".join([*names, _LEAVES[leaf]])


# ---- readers


def open_weights(path: PathLike, kind: str, weights: str = "ema") -> dict[str, Tensor]:
  """The tensors of a reference file, by the reference's names; no value is read yet.

  Args:
    path: a `.pth` or `.ckpt` (torch) or a `.safetensors` file.
    kind: 'mar' or 'vae'.
    weights: 'ema' or 'model', of the two sets that a MAR `.pth` holds. An autoencoder's file and a
      `.safetensors` file hold a single set, which is taken.

  Raises:
    ValueError: no such file, another suffix, a damaged file, a pickle that wants anything but
      tensors and `argparse.Namespace`, a file without the asked-for set; starts with the path.
    ImportError: where torch or safetensors is needed and missing.
  """
  if weights not in ("ema", "model"):
    raise ValueError(f"weights={weights!r}: expected 'ema' or 'model'")
  path = user_path(path, "path")
  if path.is_dir():
    raise ValueError(f"{path}: expected a file (.pth, .ckpt, .safetensors), found a directory")
  if not path.is_file():
    raise ValueError(f"{path}: no such file")
  if path.suffix == ".safetensors":
    return read_safetensors(path)
  if path.suffix in (".pth", ".ckpt"):
    return read_torch(path, "model" if kind == "vae" else weights)
  raise ValueError(f"{path}: expected a name ending in .pth, .ckpt or .safetensors")


def read_torch(path: PathLike, weights: str = "ema") -> dict[str, Tensor]:
  """Tensors of a torch file `{'model': ..., 'model_ema': ...}`, mapped into memory, not read.

  Nothing in the file is executed: torch's weights-only unpickler builds tensors, plain containers
  and `argparse.Namespace` (the reference stores its arguments as one) and refuses all else. The
  checksums of all that is in the archive are compared first. A file in torch's format before 1.6
  has none and cannot be mapped: it is read whole (see `archive.is_archive`).

  Raises:
    ValueError, ImportError: as `open_weights`.
  """
  torch = _import("torch")
  try:
    content = _torch_content(torch, path)
  except pickle.UnpicklingError as error:
    wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
    if wanted:
      raise ValueError(
        f"{path}: refused, its pickle asks for {wanted[1]}, which weights do not need; "
        "nothing in it was executed"
      ) from error
    raise ValueError(f"{path}: not a readable torch file ({_reason(error)})") from error
  except Exception as error:  # torch raises RuntimeError, EOFError, KeyError, ... on damage
    raise ValueError(f"{path}: not a readable torch file ({_reason(error)})") from error
  key = {"ema": "model_ema", "model": "model"}[weights]
  state = content.get(key) if isinstance(content, dict) else None
  if not isinstance(state, dict):
    held = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
    raise ValueError(f"{path}: holds no state dict {key!r}, but: {held[:200]}")
  for name, tensor in state.items():
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
      raise ValueError(f"{path}: {name} is no dense tensor but a {type(tensor).__name__}")
  return {
    str(name): Tensor(
      tuple(tensor.shape),
      str(tensor.dtype).removeprefix("torch."),
      functools.partial(_torch_values, tensor),
    )
    for name, tensor in state.items()
  }


def _torch_content(torch: ModuleType, path: PathLike) -> object:
  """What torch.save was given, as far as weights need it."""
  with open(path, "rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
    if archive.is_archive(path):
      archive.check_archive(path)
      return torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)
    start = file.read(512)
    if not start:
      raise ValueError("it is empty")
    if start[257:262] == b"ustar":
      raise ValueError("torch's tar format of before 0.1.10: save it again with torch.save")
    if start.startswith(b"\x80") and _TORCH_MAGIC not in start[:32]:
      raise ValueError("a bare pickle, which torch.save did not write; nothing in it was executed")
    file.seek(0)
    content: object = torch.load(file, map_location="cpu", weights_only=True)
    if rest := os.fstat(file.fileno()).st_size - file.tell():
      raise ValueError(f"{rest} bytes follow its last tensor")
    return content


def _torch_values(tensor: torch.Tensor) -> np.ndarray:
  return tensor.detach().float().numpy()  # a view where it is float32


def read_safetensors(path: PathLike) -> dict[str, Tensor]:
  """Tensors of a `.safetensors` file, each read from the mapped file when it is needed.

  Raises:
    ValueError, ImportError: as `open_weights`.
  """
  safetensors = _import("safetensors")
  try:
    file = safetensors.safe_open(str(path), framework="numpy")
    slices = {name: file.get_slice(name) for name in file.keys()}
  except Exception as error:  # safetensors' own error derives from Exception alone
    raise ValueError(f"{path}: not a readable safetensors file ({_first_line(error)})") from error
  return {
    name: Tensor(
      tuple(part.get_shape()),
      _SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype()),
      functools.partial(_safetensors_values, file, name),
    )
    for name, part in slices.items()
  }


def _safetensors_values(file: safetensors.safe_open, name: str) -> np.ndarray:
  return file.get_tensor(name).astype(np.float32, copy=False)


# ---- conversion


def convert(
  tensors: Mapping[str, Tensor],
  kind: str,
  config: PartConfig,
  progress: Callable[[int, int], None] = lambda done, total: None,
  warn: Callable[[str], None] = logging.warning,
) -> Params:
  """Our parameters from the reference's tensors: nested dict of float32 numpy arrays.

  float16 and bfloat16 tensors are widened, which is exact.

  Args:
    tensors: from `open_weights`.
    kind: 'mar' or 'vae'.
    config: ModelConfig or VAEConfig.
    progress: called with the numbers of tensors done and in all.
    warn: called with a sentence about every tensor with weights that are finite and absurd: a
      format without checksums (safetensors, torch before 1.6) does not notice a flipped bit.

  Raises:
    ValueError: a tensor that is missing, unknown, misshaped, of another dtype (the first 10
      are listed, with both shapes), or not finite.
  """
  wanted = targets(kind, config)
  check(tensors, wanted)
  params = jax.tree.map(
    lambda leaf: np.empty(leaf.shape, np.float32), checkpoint.abstract_params(kind, config)
  )
  for done, (name, target) in enumerate(wanted.items(), start=1):
    values = tensors[name].read()
    if not np.isfinite(values).all():
      raise ValueError(f"tensor {name}: holds NaN or infinity")
    if absurd := _absurd(values):
      warn(f"tensor {name}: {absurd}; the file may be damaged")
    leaf = _leaf(params, target.path)
    (leaf if target.layer is None else leaf[target.layer])[...] = values.transpose(target.axes)
    progress(done, len(wanted))
  return params


def check(tensors: Mapping[str, Tensor], wanted: Mapping[str, Target]) -> None:
  """Raises ValueError, listing the first problems, unless names, shapes and dtypes all fit."""
  problems = []
  for name, target in wanted.items():
    if name not in tensors:
      problems.append(f"missing tensor {name}, expected shape {list(target.shape)}")
    elif tensors[name].shape != target.shape:
      problems.append(
        f"tensor {name} has shape {list(tensors[name].shape)}, expected {list(target.shape)}"
      )
    elif tensors[name].dtype not in _FLOATS:
      problems.append(f"tensor {name} is {tensors[name].dtype}, expected {', '.join(_FLOATS)}")
  problems += [
    f"unknown tensor {name} of shape {list(tensor.shape)}"
    for name, tensor in tensors.items()
    if name not in wanted
  ]
  if problems:
    rest = len(problems) - MAX_LISTED_PROBLEMS
    more = f"; and {rest} more" if rest > 0 else ""
    raise ValueError("; ".join(problems[:MAX_LISTED_PROBLEMS]) + more)


def _absurd(values: np.ndarray) -> str | None:
  """What is absurd about finite weights, or None."""
  largest = max(float(values.max()), -float(values.min()))
  if largest <= ABSURD:
    return None
  median = float(np.median(np.abs(values)))
  if largest <= ABSURD_RATIO * median:
    return None
  return f"largest weight {largest:.3g}, median {median:.3g}"


def write_safetensors(
  path: PathLike, kind: str, config: PartConfig, params: Params, overwrite: bool = False
) -> None:
  """Writes our parameters as float32 `.safetensors` under the reference's names, bit for bit.

  The file is written tensor by tensor, aside and renamed, so that it needs no more memory
  than one tensor. Format: https://huggingface.co/docs/safetensors, section Format.

  Raises:
    ValueError: another suffix, a file that is there already, a place that cannot be written.
  """
  path = pathlib.Path(path)
  if path.suffix != ".safetensors":
    raise ValueError(f"{path}: expected a name ending in .safetensors")
  if path.exists() and not overwrite:
    raise ValueError(f"{path}: exists already; overwrite it explicitly")
  wanted = targets(kind, config)
  header: dict[str, object] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, target in wanted.items():
    start, end = end, end + 4 * int(np.prod(target.shape))
    header[name] = {"dtype": "F32", "shape": target.shape, "data_offsets": [start, end]}
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  try:
    with atomic_write(path) as aside, aside.open("wb") as file:
      file.write(struct.pack("<Q", len(text)) + text)
      for target in wanted.values():
        leaf = _leaf(params, target.path)
        values = leaf if target.layer is None else leaf[target.layer]
        theirs = values.transpose(tuple(np.argsort(target.axes)))
        file.write(np.ascontiguousarray(theirs, dtype="<f4").data)
  except OSError as error:
    raise ValueError(f"{path}: cannot be written ({error})") from error


def _leaf(params: Params, path: tuple[str, ...]) -> np.ndarray:
  return functools.reduce(operator.getitem, path, params)  # type: ignore[arg-type]


def _import(module: str) -> ModuleType:
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ImportError(
      f'{module} is needed to read this file: pip install "marche_jax[convert]"'
    ) from error


def _reason(error: BaseException) -> str:
  """Why torch refused a file, without its advice to execute what is in it."""
  if found := re.search(r"WeightsUnpickler error: (.+)", str(error)):
    return found[1][:200]
  line = _first_line(error)
  return "torch cannot read it as weights" if re.search("(?i)weights.only", line) else line


def _first_line(error: BaseException) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
