"""Analytic FLOPs of plans: what their rows, halves and tokens add up to.

`tests/decoding/test_cost_of_decoding.py` has the matrix products that decoding really executes.
"""

from __future__ import annotations

import dataclasses

from tiny import UNEQUAL as CONFIG

from marche_jax.config import ModelConfig, SampleConfig
from marche_jax.planning import cost
from marche_jax.planning.policies import make_plan
from marche_jax.planning.shapes import HeadShape, StackShape, StepShape


def test_a_plan_adds_its_rows_up() -> None:
  """Guidance doubles the transformer; without padding every row costs what its tokens cost."""
  sample = SampleConfig(num_iter=6, num_sampling_steps=10)
  plan = make_plan(CONFIG, sample)
  exact = plan.flops(padded=False)
  every = StackShape(CONFIG.seq_len)
  assert exact.encoder == sum(
    cost.encoder_flops(CONFIG, StackShape(r.num_known), 2) for r in plan.rows
  )
  assert exact.decoder == sum(
    cost.decoder_flops(CONFIG, every, 2, r.num_predict) for r in plan.rows
  )
  assert exact.head == sum(
    cost.head_flops(CONFIG, HeadShape(r.num_predict, 10), True, 10) for r in plan.rows
  )
  assert exact.total == exact.encoder + exact.decoder + exact.head
  unguided = make_plan(CONFIG, dataclasses.replace(sample, cfg=1.0))
  twice = unguided.flops() + unguided.flops()
  # Of the head, both halves share the projection of x_t.
  x_t = sum(plan.step_shapes[r.shape_id].head.slots * 10 for r in plan.rows)
  x_t *= 2 * CONFIG.token_dim * CONFIG.diffloss_w
  assert plan.flops() == dataclasses.replace(twice, head=twice.head - x_t)


def test_selective_rows_cost_what_their_tokens_cost() -> None:
  """Without padding, of marche with a condition cache: whose difference is stored by full rows."""
  sample = SampleConfig(num_iter=6, policy="marche", condition_cache=True, active_size=14)
  plan = make_plan(CONFIG, sample)
  exact = cost.Flops(0.0, 0.0, 0.0)
  for r, full in zip(plan.rows, (True, False, False) * 2):
    forced = r.num_previous + r.num_predict
    chosen = {"source": "scout", "layer": 2}
    encoder = StackShape(r.num_known, r.encoder_active, r.num_previous, **chosen)
    decoder = StackShape(CONFIG.seq_len, r.decoder_active, forced, **chosen)
    assert (r.decoder_active, r.encoder_active) == (
      (CONFIG.num_tokens, CONFIG.buffer_size + r.num_known)
      if full
      else (14, max(3, r.num_previous))
    )
    shape = StepShape(
      encoder=StackShape(r.num_known) if full else encoder,
      decoder=StackShape(CONFIG.seq_len) if full else decoder,
      head=HeadShape(r.num_predict, 100),
      guided=True,
      halves=2 if full else 1,
      difference=plan.step_shapes[r.shape_id].difference,
    )
    exact += cost.iteration_flops(CONFIG, shape, 100)
  assert plan.flops(padded=False) == exact


def test_mar_base() -> None:
  """MAR-B's published shares, counted before the last decoder layer is cut to what is asked."""
  config = ModelConfig()
  plan = make_plan(config, SampleConfig(num_iter=64, cfg=3.0, num_sampling_steps=100))
  exact = plan.flops(padded=False)
  everywhere = cost.decoder_flops(config, StackShape(config.seq_len), 2, config.num_tokens)
  decoder = len(plan.rows) * everywhere
  assert exact.decoder < decoder
  whole = exact.encoder + decoder + exact.head
  for part, low, high in ((exact.encoder, 24, 25), (decoder, 51, 53), (exact.head, 22, 25)):
    assert low - 0.5 <= 100 * part / whole <= high + 0.5
  assert exact.total < plan.flops().total <= 1.25 * exact.total
  assert max(plan.padding()) <= 1.25
