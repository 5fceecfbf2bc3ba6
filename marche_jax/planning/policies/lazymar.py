"""LazyMAR: token cache with pruning by V similarity, and condition cache (arXiv 2503.12450)."""

from __future__ import annotations

import math

from marche_jax.planning.draft import Draft, Refresh

FIRST_FULL, INTERVAL = 5, 9
LAYER = 4
"""Decoder layer, from 1, after whose attention tokens are pruned; a third of shallower stacks."""

MARGIN = 15
"""Tokens that are kept besides the forced ones, at least."""

# (iteration of 64 up to which it holds, share of all tokens that is kept)
KEPT = ((20, 1.0), (21, 0.6), (25, 0.5), (30, 0.4), (35, 0.15), (40, 0.12), (64, 0.05))


def kept_share(iteration: int, num_iter: int) -> float:
  """The share of tokens that the decoder keeps, by the relative progress of decoding."""
  of_64 = iteration * 64 / num_iter
  return next(share for end, share in KEPT if of_64 < end)


def lazymar(draft: Draft) -> None:
  """Full iterations 0 to 5 and every 9th after; the others lazy.

  A lazy iteration computes the conditional half alone (the unconditional output is that plus the
  difference stored in the last full iteration); its encoder recomputes the buffer tokens and those
  just decoded; its decoder all tokens up to the attention of layer 4, and then those whose values
  changed most.
  """
  config, iterations = draft.config, draft.iterations
  if config.decoder_depth == 1:
    raise ValueError(
      "model.decoder_depth=1: expected at least 2, of which lazymar prunes after one"
    )
  layer = min(LAYER, math.ceil(config.decoder_depth / 3))
  if draft.sample.head_cache and len({iteration.timesteps for iteration in iterations}) > 1:
    raise ValueError(
      f"sample.head_cache=True: expected the same diffusion steps in every iteration, which "
      f"{draft.sample.policy} does not have"
    )
  for k, iteration in enumerate(iterations):
    iteration.head_cached = draft.sample.head_cache
    since = k - FIRST_FULL
    if since <= 0 or since % INTERVAL == 0:
      continue
    forced = iteration.num_previous + iteration.num_predict
    kept = int(kept_share(k, len(iterations)) * draft.config.num_tokens)
    iteration.halves = 1
    iteration.encoder = Refresh(config.buffer_size + iteration.num_previous, buffer=True)
    iteration.decoder = Refresh(max(kept, forced + MARGIN), "lower", "value", layer)
