"""Sampling as a job: many images drawn batch by batch into a directory, whatever interrupts it.

Read `loading.py` (the model and how to sample it, from `--checkpoint` and `--config`), then
`job.py` (the batches that are missing, drawn and kept; samples.npz, grid.png and report.json made
of them). The command line is `marche_jax/sample.py`.
"""
