"""The decoding loop: a plan's rows folded over a pytree of state by one `jax.lax.scan`.

Read `sampler.py` first (the algorithm), then `state.py` (what it carries), `transformer.py`
(encoder and decoder of one iteration), `stack.py` and `cache.py` (which tokens are recomputed, the
KV cache), `head_sampler.py` (the diffusion loop). Around the loop: `plan_runner.py` (runs a plan in
chunks of iterations), `generation.py` (labels in, latents out; `given.py` checks what it is given),
`pixels.py` (latents to images), `calibration.py` (where the cache drifts), `recording.py` and
`activity.py` (what an iteration did).
"""
