"""Progress bars: in images and updates, and sparing in logs."""

from __future__ import annotations

import io
import sys
import time

import pytest

from marche_jax import progress


class Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


@pytest.mark.parametrize(("stream", "floods"), [(io.StringIO, False), (Terminal, True)])
def test_a_log_is_not_flooded(monkeypatch: pytest.MonkeyPatch, stream: type, floods: bool) -> None:
  monkeypatch.setattr(sys, "stderr", shown := stream())
  for _ in progress.update_bar(range(10), "train", 0, 10):
    time.sleep(0.11)
  with progress.image_bar(10, "sampling") as bar:
    for _ in range(10):
      time.sleep(0.11)
      bar.update(1)
  assert (len(shown.getvalue().split("\r")) > 10) == floods


def test_images_are_counted_and_those_of_an_earlier_run_are_no_speed(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
  with progress.image_bar(5000, "sampling", done=4000) as bar:
    bar.start_t -= 100  # seconds ago
    bar.update(500.5)
    bar.refresh()
  last = shown.getvalue().split("\r")[-1]
  assert "4500/5000" in last and last.rstrip().endswith("image/s]")
  assert float(last.split(", ")[-1].split("image")[0]) == pytest.approx(5, abs=0.5)
