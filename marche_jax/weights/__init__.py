"""Weights on disk.

`checkpoint.py` has our own format (Orbax, with the configuration beside it), `convert.py` the way
from and to the files of the PyTorch reference, none of which is unpickled.
"""
