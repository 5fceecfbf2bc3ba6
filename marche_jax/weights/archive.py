"""Torch's zip archives, read once against their checksums before their tensors are mapped.

torch.load looks at no CRC-32 of a tensor that it maps, so a file with one bit flipped gives a
weight that is off by up to 1e38. The pickle of an archive says which tensor lies in which record.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterator

_BLOCK = 1 << 20  # bytes read at a time
_LISTED = 3  # damaged records that a message names


def is_archive(path: str | os.PathLike[str]) -> bool:
  """Whether a torch file is a zip archive; older ones have no checksums."""
  with open(path, "rb") as file:
    return file.read(4) == b"PK\x03\x04"


def check_archive(path: str | os.PathLike[str]) -> None:
  """Reads every record of an archive once, in blocks, and compares it with its checksum.

  Raises:
    ValueError: a record that is damaged, compressed (torch would take its bytes for values) or
      stands there twice; names the tensors in it where the archive's pickle tells.
    zipfile.BadZipFile: no archive.
    OSError: where the file cannot be read.
  """
  damaged: list[str] = []
  with zipfile.ZipFile(path) as archive:
    names = archive.namelist()
    for record in archive.infolist():
      name = record.filename
      if names.count(name) > 1:
        raise ValueError(f"record {name} stands there twice")
      if record.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"record {name} is compressed, as torch.save leaves none")
      try:
        with archive.open(record) as file:
          while file.read(_BLOCK):
            pass
      except OSError:
        raise
      except Exception:  # BadZipFile, EOFError, RuntimeError (the bit of encryption is set), ...
        damaged.append(name)
    if damaged:
      tensors = {} if any(n.endswith("/data.pkl") for n in damaged) else _tensors(archive)
      listed = [f"{name} ({', '.join(tensors.get(name, ['no tensor']))})" if tensors else name
                for name in damaged[:_LISTED]]  # fmt: skip
      more = f" and {len(damaged) - _LISTED} more" if len(damaged) > _LISTED else ""
      raise ValueError(f"its checksums show damage in {'; '.join(listed)}{more}")


def _tensors(archive: zipfile.ZipFile) -> dict[str, list[str]]:
  """Names of the tensors in every record, such as 'model_ema/z_proj.weight'; {} where unknown."""
  found: dict[str, list[str]] = {}
  try:
    (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
    with archive.open(pickled) as file:
      content = _Outline(file).load()
    for path, key in _walk(content, ""):
      found.setdefault(pickled.removesuffix("data.pkl") + f"data/{key}", []).append(path)
  except Exception:  # only names for a message: a pickle of another kind has none
    return {}
  return found


class _Key(str):
  """The number of a tensor's record."""


class _Made:
  """Stands for whatever a pickle makes: nothing of it is looked up, called or executed."""

  def __init__(self, *args: object) -> None:
    self.args = args


class _Outline(pickle.Unpickler):
  """Reads plain containers, with `_Made` for all else and `_Key` for tensors' contents."""

  def find_class(self, module: str, name: str) -> type:
    return dict if (module, name) == ("collections", "OrderedDict") else _Made

  def persistent_load(self, pid: tuple[object, ...]) -> _Key:
    return _Key(pid[2])  # ('storage', type, key, device, size)


def _walk(content: object, path: str) -> Iterator[tuple[str, str]]:
  if isinstance(content, _Key):
    yield path, content
  elif isinstance(content, dict):
    for name, value in content.items():
      yield from _walk(value, f"{path}/{name}" if path else str(name))
  elif isinstance(content, _Made):
    for value in content.args[:1]:  # a tensor's storage, a parameter's tensor
      yield from _walk(value, path)
