"""Pictures of what decoding did.

`trace.py` decodes some images once more and looks on, `frames.py` draws an iteration of it, and
`plots.py` draws the charts of the benchmark.
"""
