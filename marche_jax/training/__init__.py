"""Training a MAR.

Read `trainer.py` first (one update and the loop around it), then `losses.py` (the masked diffusion
loss), `data.py` (batches, in an order that survives a restart) and `sources.py` (files on disk).
"""
