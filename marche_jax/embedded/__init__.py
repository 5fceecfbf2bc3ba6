"""What is shipped inside the package: a Fashion-MNIST model and the classifier that judges it."""

from __future__ import annotations

import pathlib

DIRECTORY = pathlib.Path(__file__).parent
CHECKPOINT = DIRECTORY / "fashion_mnist"
CONFIG = DIRECTORY / "config.py"
