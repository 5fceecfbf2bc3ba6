"""How fast policies are, and what becomes of the images: several measured side by side.

Read `entries.py` first (what is compared), then `speed.py`, `timing.py` and `profiling.py`
(seconds: of whole runs, of single rows, of the parts), `comparison.py` (the same images under every
policy), `reports.py` (what they find) and `tables.py` (that as text).
"""
