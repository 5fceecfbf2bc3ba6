"""Checkpoints of models: an Orbax directory with its configuration, verified when it is loaded.

    DIR/mar/config.json  DIR/mar/params/   the transformer and its head
    DIR/vae/config.json  DIR/vae/params/   the autoencoder, where there is one

`config.json` holds the format, the model configuration, the dtype of the stored parameters, the
default sampling configuration and the SHA-256 of every file in `params/`; its own last entry is the
SHA-256 of the rest. So a truncated, altered or added file is refused instead of being sampled from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from typing import Generic, Literal, TypeAlias, TypedDict, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.tree_util import KeyPath

from marche_jax import config as config_lib
from marche_jax import embedded
from marche_jax.config import ModelConfig, SampleConfig, VAEConfig
from marche_jax.files import user_path
from marche_jax.models import mar, vae
from marche_jax.models.params import Leaf, Params

PathLike: TypeAlias = str | os.PathLike[str]
PartConfig: TypeAlias = ModelConfig | VAEConfig
C = TypeVar("C", bound=ModelConfig | VAEConfig | SampleConfig, covariant=True)

FORMAT = 1
_RESERVED = 1 << 26  # bytes reserved at a time
DTYPES = ("float32", "float16", "bfloat16")

KINDS: dict[str, type[ModelConfig] | type[VAEConfig]] = {"mar": ModelConfig, "vae": VAEConfig}
"""The parts of a checkpoint, and the class of each one's configuration."""


@dataclasses.dataclass(frozen=True)
class Model:
  """All that sampling needs.

  Attributes:
    config: sizes of the transformer and its head.
    params: their float32 parameters (`marche_jax.models.mar`).
    vae_config: of the autoencoder; None where the checkpoint has none (pixel space).
    vae_params: its float32 parameters (`marche_jax.models.vae`), or None.
    sample_config: the model's own default; None where none was stored.
  """

  config: ModelConfig
  params: Params
  vae_config: VAEConfig | None = None
  vae_params: Params | None = None
  sample_config: SampleConfig | None = None

  @functools.cached_property
  def weights_digest(self) -> str:
    """Names all weights, the autoencoder's too: SHA-256 of their values, in hexadecimal."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((self.params, self.vae_params)):
      digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def abstract_params(kind: str, config: PartConfig) -> Params:
  """Shapes of a kind's ('mar', 'vae') parameters: nested dict of float32 ShapeDtypeStruct."""
  _check_kind(kind)
  return jax.tree.map(lambda leaf: leaf, _abstract_params(config))  # the caller's own dicts


@functools.cache
def _abstract_params(config: PartConfig) -> Params:  # traces the model, some tenths of a second
  if isinstance(config, ModelConfig):
    return mar.abstract_params(config)
  return vae.abstract_params(config)


def save_model(
  directory: PathLike,
  kind: str,
  config: PartConfig,
  params: Params,
  *,
  sample_config: SampleConfig | None = None,
  dtype: str = "float32",
  overwrite: bool = False,
) -> None:
  """Stores one kind of parameters; the other kind in the same directory stays as it is.

  Everything is written to a temporary sibling that is then renamed: whatever goes wrong, the
  destination is as it was before. Contiguous host arrays of the stored dtype are not copied.

  Args:
    directory: of the checkpoint, `~` is the home directory; made where it does not exist.
    kind: 'mar' or 'vae'.
    config: that the parameters belong to.
    params: nested dict of floating-point arrays, as `abstract_params(kind, config)`.
    sample_config: the model's default (kind 'mar').
    dtype: to store in: float32, float16 or bfloat16. Loading always gives float32.
    overwrite: replace a kind that is there already.

  Raises:
    ValueError: parameters that do not belong to the configuration, a value that overflows the
      dtype, an autoencoder that does not fit the transformer beside it, a kind that is there
      already, a directory that cannot be written or has too little space.
  """
  _check_kind(kind)
  directory = user_path(directory, "directory")
  if dtype not in DTYPES:
    raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
  if not isinstance(config, KINDS[kind]):
    raise ValueError(f"config={config!r}: expected a {KINDS[kind].__name__}")
  _check_tree(params, abstract_params(kind, config), "params")
  check_destination(directory, kind, config, overwrite)
  with _written_aside(pathlib.Path(directory).absolute(), kind, params, dtype) as aside:
    _save_params(aside / "params", params, dtype)
    body = {
      "format": FORMAT,
      "kind": kind,
      "dtype": dtype,
      "config": dataclasses.asdict(config),
      "sample": None if sample_config is None else dataclasses.asdict(sample_config),
      "files": {
        str(p.relative_to(aside).as_posix()): {"bytes": p.stat().st_size, "sha256": _sha256(p)}
        for p in sorted(aside.rglob("*"))
        if p.is_file()
      },
    }
    (aside / "config.json").write_text(sealed(body))


def check_destination(
  directory: PathLike, kind: str, config: PartConfig, overwrite: bool = False
) -> None:
  """Raises ValueError where `save_model` would refuse the place: for a check before long work."""
  _check_kind(kind)
  directory = user_path(directory, "directory")
  if _has_kind(directory, kind) and not overwrite:
    raise ValueError(f"{directory}: holds a {kind!r} already; overwrite it explicitly")
  root = pathlib.Path(directory).absolute()
  existing = next(p for p in (root, *root.parents) if p.exists())
  if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
    raise ValueError(f"{directory}: cannot be written, {existing} is no writable directory")
  _check_beside(directory, config)


def load_model(directory: PathLike | None = None, config: ModelConfig | None = None) -> Model:
  """Loads what `save_model` stored, verified, as float32 arrays on the default device.

  Args:
    directory: of the checkpoint; `~` is the home directory. Default: the embedded model.
    config: the configuration that the caller wants to use. It must agree with the stored one in
      all that shapes the samples; what only training uses (dropout, ...) is taken from it.

  Raises:
    ValueError: no directory, no checkpoint, a truncated or altered file, a later format, or
      a `config` that does not fit (the message names the fields).
  """
  directory = embedded.CHECKPOINT if directory is None else user_path(directory, "directory")
  stored = _read_config(directory, "mar", ModelConfig)
  if config is not None:
    _check_fits(directory, config, stored.config)
  beside = _read_config(directory, "vae", VAEConfig) if _has_kind(directory, "vae") else None
  if beside is not None:
    with _named(directory):
      config_lib.check_vae(stored.config, beside.config)
  return Model(
    config=stored.config if config is None else config,
    params=_to_device(_load_params(directory, stored)),
    vae_config=beside.config if beside is not None else None,
    vae_params=_to_device(_load_params(directory, beside)) if beside is not None else None,
    sample_config=stored.sample,
  )


@overload
def load_part(directory: PathLike, kind: Literal["mar"]) -> tuple[ModelConfig, Params]: ...
@overload
def load_part(directory: PathLike, kind: Literal["vae"]) -> tuple[VAEConfig, Params]: ...
def load_part(directory: PathLike, kind: str) -> tuple[PartConfig, Params]:
  """One kind of a checkpoint: its configuration and its float32 parameters as numpy arrays.

  Raises:
    ValueError: as `load_model`.
  """
  _check_kind(kind)
  directory = user_path(directory, "directory")
  stored = _read_config(directory, kind, KINDS[kind])
  return stored.config, _load_params(directory, stored)


# ---- writing


def _save_params(path: pathlib.Path, params: Params, dtype: str) -> None:
  context = ocp.Context()
  # Float parameters hardly compress, and compressing or cutting them into chunks copies them:
  # peak memory 3.0x of the weights with Orbax's defaults (MAR-B), 1.1x with these.
  context.array.saving.use_compression = False
  context.memory.deepcopy_host_arrays = False
  arrays = jax.tree_util.tree_map_with_path(lambda p, leaf: _as_stored(p, leaf, dtype), params)
  try:
    with context:
      ocp.save(path, arrays)
  except Exception as error:  # tensorstore says all in a ValueError, of some thousand letters
    code = re.search(r"os_error_code='(\d+)'", str(error))
    reason = os.strerror(int(code[1])) if code else str(error)
    raise ValueError(f"{path.parents[1]}: cannot be written ({reason})") from error
  # Orbax writes the absolute path of the checkpoint here; only the file's presence counts.
  (path / "commit_success.txt").write_text("committed\n")


def _as_stored(path: KeyPath, leaf: Leaf, dtype: str) -> np.ndarray:
  array = np.asarray(leaf)
  if array.dtype == jnp.dtype(dtype):
    return np.ascontiguousarray(array)
  with np.errstate(over="ignore"):
    cast = array.astype(jnp.dtype(dtype))
  if not np.isfinite(cast).all():
    raise ValueError(f"{_path_name(path)}: not finite once cast from {array.dtype} to {dtype}")
  return cast


@contextlib.contextmanager
def _written_aside(
  root: pathlib.Path, kind: str, params: Params, dtype: str
) -> Iterator[pathlib.Path]:
  """Gives a temporary directory that becomes `root / kind` if the body succeeds."""
  target = root / kind
  missing = [p for p in (root, *root.parents) if not p.exists()]
  aside = None
  try:
    try:
      root.mkdir(parents=True, exist_ok=True)
      aside = root / f".{target.name}.{uuid.uuid4().hex}"
      aside.mkdir()
      size = jnp.dtype(dtype).itemsize * sum(leaf.size for leaf in jax.tree.leaves(params))
      if size > (free := shutil.disk_usage(root).free):
        raise ValueError(f"{root}: {size / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")
      _reserve(aside / "space", size)
    except OSError as error:
      reason = error.strerror or error
      raise ValueError(f"{root}: cannot be written ({reason})") from error
    yield aside
    if os.path.lexists(target):
      old = aside.with_name(aside.name + ".old")
      target.rename(old)
      try:
        aside.rename(target)
      except BaseException:
        old.rename(target)
        raise
      shutil.rmtree(old, ignore_errors=True)
    else:
      aside.rename(target)
  except BaseException:
    if aside is not None:
      shutil.rmtree(aside, ignore_errors=True)
    for path in missing:  # innermost first; only what this call made, and only while empty
      with contextlib.suppress(OSError):
        path.rmdir()
    raise


def _reserve(path: pathlib.Path, size: int) -> None:
  """Raises OSError where a file of this size cannot be had: a quota, a limit, a full disk.

  Better asked of a file that is removed again than of Orbax, whose threads end in pages of
  tracebacks. File systems that cannot reserve are not asked, and slow ones for two seconds.
  """
  if not hasattr(os, "posix_fallocate"):  # macOS
    return
  deadline = time.monotonic() + 2
  try:
    with path.open("wb") as file:
      for start in range(0, size, _RESERVED):
        if time.monotonic() < deadline:
          os.posix_fallocate(file.fileno(), start, min(_RESERVED, size - start))
  except OSError as error:
    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV, errno.ENOSYS):
      raise
  finally:
    path.unlink(missing_ok=True)


def sealed(body: dict[str, object]) -> str:
  """The text of config.json: the body and, last, the SHA-256 of the body alone."""
  text = json.dumps(body, indent=1)
  digest = hashlib.sha256(text.encode()).hexdigest()
  return json.dumps({**body, "sha256": digest}, indent=1) + "\n"


# ---- reading


def _has_kind(directory: PathLike, kind: str) -> bool:
  return os.path.lexists(pathlib.Path(directory) / kind)


class _File(TypedDict):
  """What config.json says of a file."""

  bytes: int
  sha256: str


@dataclasses.dataclass(frozen=True)
class _Stored(Generic[C]):
  """A verified config.json, with its configurations built."""

  kind: str
  dtype: str
  config: C
  sample: SampleConfig | None
  files: dict[str, _File]  # by their paths


def _read_config(directory: PathLike, kind: str, cls: type[C]) -> _Stored[C]:
  """The verified config.json of a kind, whose configuration is a `cls`."""
  root = pathlib.Path(directory)
  path = root / kind / "config.json"
  if not root.is_dir():
    raise ValueError(f"checkpoint {directory}: no such directory")
  if not path.is_file():
    raise ValueError(
      f"checkpoint {directory}: not a {kind!r} checkpoint, {kind}/config.json is missing"
    )
  try:
    text = path.read_bytes().decode()
    body = json.loads(text)
    found = isinstance(body, dict) and body.pop("sha256", None)
    # The text must be the one that was written, to the byte.
    intact = bool(found) and sealed(body) == text
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f"checkpoint {directory}: {kind}/config.json is damaged ({error})") from error
  if not intact:
    raise ValueError(f"checkpoint {directory}: {kind}/config.json is damaged or was edited")
  with _named(f"{directory}: {kind}/config.json"):
    _check_body(body, kind)
    return _Stored(
      kind,
      body["dtype"],
      _build(cls, body["config"]),
      None if body["sample"] is None else _build(SampleConfig, body["sample"]),
      body["files"],
    )


def _check_body(body: dict[str, object], kind: str) -> None:
  """Raises ValueError, naming the field, where a config.json is not as `save_model` writes it."""
  if body.get("format") != FORMAT:  # first: a later one may have other fields
    raise ValueError(f"format={body.get('format')!r}: expected {FORMAT}")
  expected = {"format", "kind", "dtype", "config", "sample", "files"}
  if missing := expected - body.keys():
    raise ValueError(f"missing field {min(missing)}")
  if unknown := body.keys() - expected:
    raise ValueError(f"unknown field {min(unknown)}")
  if body["kind"] != kind:
    raise ValueError(f"kind={body['kind']!r}: expected {kind!r}")
  if body["dtype"] not in DTYPES:
    raise ValueError(f"dtype={body['dtype']!r}: expected one of {', '.join(DTYPES)}")
  for field in ("config", "sample"):
    if not isinstance(body[field], dict) and (field, body[field]) != ("sample", None):
      raise ValueError(f"{field}={body[field]!r}: expected fields and their values")
  files = body["files"]
  if not isinstance(files, dict) or not files:
    raise ValueError(f"files={files!r}: expected every file in params/, with its size and SHA-256")
  for name, file in files.items():
    parts = pathlib.PurePosixPath(name).parts
    if parts[:1] != ("params",) or ".." in parts or "\\" in name or "\0" in name:
      raise ValueError(f"files: {name!r}: expected a path below params/")
    if not (
      isinstance(file, dict)
      and file.keys() == {"bytes", "sha256"}
      and type(file["bytes"]) is int
      and isinstance(file["sha256"], str)
      and re.fullmatch("[0-9a-f]{64}", file["sha256"])
    ):
      raise ValueError(f"files: {name}: expected bytes and sha256, found {file!r}")


def _build(cls: type[C], values: dict[str, object]) -> C:
  """A configuration; fields that are younger than the checkpoint take their defaults."""
  return config_lib.from_dict(cls, {**dataclasses.asdict(cls()), **values})


def _load_params(directory: PathLike, stored: _Stored[PartConfig]) -> Params:
  """Verifies every file, then restores: nested dict of float32 numpy arrays."""
  kind = stored.kind
  base = pathlib.Path(directory) / kind
  _check_listed(directory, base, stored.files)
  for name, expected in stored.files.items():
    path = base / name
    if not path.resolve().is_relative_to(base.resolve()):
      raise ValueError(f"checkpoint {directory}: {kind}/{name} is a link out of {kind}/")
    if not path.is_file():
      raise ValueError(f"checkpoint {directory}: {kind}/{name} is missing")
    if (size := path.stat().st_size) != expected["bytes"]:
      raise ValueError(
        f"checkpoint {directory}: {kind}/{name} has {size} bytes, expected {expected['bytes']}"
      )
    if _sha256(path) != expected["sha256"]:
      raise ValueError(f"checkpoint {directory}: {kind}/{name} is damaged (SHA-256 differs)")
  dtype = jnp.dtype(stored.dtype)
  expected_params = abstract_params(kind, stored.config)
  request = jax.tree.map(lambda leaf: _HostArray(leaf.shape, dtype), expected_params)
  with _named(directory):
    # Orbax takes stored arrays of any shape for the numpy arrays asked for: before it makes them,
    # see that they are the expected ones.
    metadata = ocp.metadata(base.absolute() / "params").metadata
    _check_tree(metadata, expected_params, kind, dtype)
    params = ocp.load(base.absolute() / "params", request)
  leaves, treedef = jax.tree.flatten(params)
  del params
  for i, leaf in enumerate(leaves):
    leaves[i] = leaf.astype(np.float32, copy=False)
  return jax.tree.unflatten(treedef, leaves)


def _check_listed(directory: PathLike, base: pathlib.Path, files: dict[str, _File]) -> None:
  """Refuses what lies in params/ without a digest: Orbax would read it."""
  for root, folders, names in os.walk(base / "params"):
    links = [name for name in folders if (pathlib.Path(root) / name).is_symlink()]
    for name in names + links:
      path = (pathlib.Path(root) / name).relative_to(base).as_posix()
      if path not in files:
        raise ValueError(
          f"checkpoint {directory}: {base.name}/{path} is not listed in {base.name}/config.json: "
          "remove it if it is not of the checkpoint"
        )


@dataclasses.dataclass(frozen=True)
class _HostArray:
  """Asks Orbax for a numpy array (a ShapeDtypeStruct asks for a jax.Array with a sharding)."""

  shape: tuple[int, ...]
  dtype: np.dtype


def _to_device(params: Params) -> Params:
  leaves, treedef = jax.tree.flatten(params)
  del params
  for i, leaf in enumerate(leaves):  # one by one, so that a leaf is held twice, never the tree
    leaves[i] = jnp.asarray(leaf)
  return jax.tree.unflatten(treedef, leaves)


# ---- checks


def _check_kind(kind: str) -> None:
  if kind not in KINDS:
    raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")


def _check_fits(directory: PathLike, config: ModelConfig, stored: ModelConfig) -> None:
  differing = [
    f"model.{f.name}={getattr(config, f.name)!r}, stored {getattr(stored, f.name)!r}"
    for f in dataclasses.fields(ModelConfig)
    if f.name not in config_lib.TRAINING_FIELDS
    and getattr(config, f.name) != getattr(stored, f.name)
  ]
  if differing:
    raise ValueError(f"checkpoint {directory} does not fit the config: {'; '.join(differing)}")


def _check_beside(root: PathLike, config: PartConfig) -> None:
  """A transformer and an autoencoder in one directory must fit each other."""
  if not _has_kind(root, "vae" if isinstance(config, ModelConfig) else "mar"):
    return
  if isinstance(config, ModelConfig):
    pair = config, _read_config(root, "vae", VAEConfig).config
  else:
    pair = _read_config(root, "mar", ModelConfig).config, config
  with _named(root):
    config_lib.check_vae(*pair)


def _check_tree(params: Params, expected: Params, name: str, dtype: np.dtype | None = None) -> None:
  """Refuses parameters whose names or shapes are not the expected ones, or that are no floats.

  Args:
    params: arrays, or Orbax's descriptions of stored ones.
    expected: as `abstract_params` gives them.
    name: of the whole, for messages.
    dtype: that all of them must have; None: any float.
  """
  found = {_path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(params)}
  wanted = {_path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(expected)}
  for path in sorted(set(found) | set(wanted)):
    if path not in wanted:
      raise ValueError(f"{name}: unknown parameter {path} of shape {found[path].shape}")
    if path not in found:
      raise ValueError(f"{name}: missing parameter {path} of shape {wanted[path].shape}")
    if tuple(found[path].shape) != tuple(wanted[path].shape):
      raise ValueError(
        f"{name}: {path} has shape {found[path].shape}, expected {wanted[path].shape}"
      )
    if not jnp.issubdtype(found[path].dtype, jnp.floating):
      raise ValueError(f"{name}: {path} has dtype {found[path].dtype}, expected a float")
    if dtype is not None and found[path].dtype != dtype:
      raise ValueError(f"{name}: {path} has dtype {found[path].dtype}, expected {dtype}")


def _path_name(path: KeyPath) -> str:
  return "/".join(str(getattr(key, "key", key)) for key in path)


@contextlib.contextmanager
def _named(place: PathLike) -> Iterator[None]:
  """Turns what goes wrong inside into a ValueError that names the checkpoint, or a file of it."""
  try:
    yield
  except Exception as error:
    raise ValueError(f"checkpoint {place}: {error}") from error


def _sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
