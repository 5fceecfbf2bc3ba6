"""What decoding will do, decided on the host in numpy before anything is compiled.

Read `draft.py` first (the schedule of MAR, exact numbers that a policy edits), then `policies/`
(how MARché and the others edit it), `plan.py` (the rows that the sampler folds over), `shapes.py`
and `grouping.py` (the few static step shapes that rows share), `cost.py` (floating point
operations), `head_schedule.py` (which diffusion steps a cached head computes) and `plan_file.py`
(plans on disk).
"""
