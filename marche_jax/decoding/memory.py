"""Whether a batch fits: the bytes that its program needs, against those that its device has left.

A kernel kills a process that takes more than there is, without a word. What a compiled program
takes is known before it runs: its arguments, its outputs where they are not in the arguments'
place, and its temporary memory.
"""

from __future__ import annotations

import contextlib
import os
import pathlib

import jax


def check_fits(needed: int, batch_size: int, devices: list[jax.Device]) -> None:
  """Raises ValueError where a batch needs more bytes than are left.

  Args:
    needed: bytes on every device, beside what lies there already.
    batch_size: images, over all devices.
    devices: of this process that share the batch.
  """
  there = available_bytes(devices[0])
  if devices[0].platform == "cpu":  # they share the machine's memory
    needed *= len(devices)
  if there is None or needed <= there:
    return
  fits = batch_size * max(0, there) // needed // len(devices) * len(devices)
  advice = f"the largest batch that fits has about {fits}" if fits else "not even fewer fit"
  raise ValueError(
    f"a batch of {batch_size} images needs {_size(needed)} of memory, {_size(there)} are there: "
    f"{advice}"
  )


def program_bytes(program: jax.stages.Compiled) -> dict[str, int] | None:
  """Bytes on every device: peak = arguments + outputs - aliased (they are both) + temporary.

  None where the backend does not know them.
  """
  found = program.memory_analysis()
  if found is None:
    return None
  sizes = {
    "arguments": found.argument_size_in_bytes,
    "outputs": found.output_size_in_bytes,
    "aliased": found.alias_size_in_bytes,
    "temporary": found.temp_size_in_bytes,
  }
  peak = sizes["arguments"] + sizes["outputs"] - sizes["aliased"] + sizes["temporary"]
  return sizes | {"peak": peak}


def tree_bytes(tree: object) -> int:
  """Bytes of all arrays of a tree, or of what they would take by their shapes."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def available_bytes(device: jax.Device) -> int | None:
  """Bytes that are left on a device; of a CPU, what this process may still take of the machine's.

  None where nobody says.
  """
  if device.platform == "cpu":
    return host_bytes()
  stats = device.memory_stats() or {}
  if "bytes_limit" not in stats:
    return None
  return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def host_bytes(root: pathlib.Path = pathlib.Path("/")) -> int | None:
  """Bytes that this process may still take: of the machine, and of its control groups.

  Swap space counts for the machine's. Without Linux's files: all memory that there is.

  Args:
    root: where proc/ and sys/ are.
  """
  left = _cgroup_bytes(root)
  meminfo = _numbers(root / "proc/meminfo")
  if "MemAvailable:" in meminfo:
    left.append(1024 * (meminfo["MemAvailable:"] + meminfo.get("SwapFree:", 0)))
  else:
    with contextlib.suppress(AttributeError, OSError, ValueError):
      left.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
  return min(left, default=None)


def _cgroup_bytes(root: pathlib.Path) -> list[int]:
  """Bytes left of every limit of the control groups that this process is in, of version 1 and 2.

  Pages of files that were not used lately are given back before a limit is reached.
  """
  left = []
  for line in _lines(root / "proc/self/cgroup"):
    _, controllers, path = line.split(":", 2)
    if controllers == "":
      top, files = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
    elif "memory" in controllers.split(","):
      top = root / "sys/fs/cgroup/memory"
      files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    else:
      continue
    group = top / path.lstrip("/")  # inside of a container it may not be there, its top is
    for directory in (group, *group.parents):
      limit, used = (_lines(directory / name) for name in files[:2])
      if limit and used and limit[0].isdigit():
        unused = _numbers(directory / "memory.stat").get(files[2], 0)
        left.append(int(limit[0]) - int(used[0]) + unused)
      if directory == top:
        break
  return left


def _lines(path: pathlib.Path) -> list[str]:
  try:
    return path.read_text().splitlines()
  except OSError:
    return []


def _numbers(path: pathlib.Path) -> dict[str, int]:
  """The second word of every line, by the first."""
  words = (line.split() for line in _lines(path))
  return {w[0]: int(w[1]) for w in words if len(w) > 1 and w[1].isdigit()}


def _size(count: int) -> str:
  for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
    if abs(count) >= size:
      return f"{count / size:.1f} {unit}"
  return f"{count} bytes"
