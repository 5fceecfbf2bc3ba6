"""MARché: cache-aware attention and selective KV refresh (arXiv 2506.12035).

Public: active tokens are those generated now and before and, up to 64, the cached ones to which the
new ones pay most attention at the 2nd layer; every 3rd iteration recomputes everything. What is not
public is our choice: the encoder is cached as well, with an active set half as large (its forced
tokens are half as many); buffer tokens are candidates like any other; each guidance half has a
cache and an active set of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from absl import logging

from marche_jax.config import SampleConfig
from marche_jax.planning.draft import Draft, Iteration, Refresh
from marche_jax.planning.plan import Row

ACTIVE_SHARE = 0.2
"""Of all tokens: 64 of 256 image tokens and 64 buffer tokens."""


def marche(draft: Draft) -> None:
  """Full iterations at intervals, or at `refresh_iterations`; the others selective."""
  sample, iterations = draft.sample, draft.iterations
  full = set(sample.refresh_iterations) | {0}
  if sample.refresh_iterations:
    if draft.num_known:  # they count iterations without known tokens, and fewer may be left
      full = {k for k in full if k < len(iterations)}
    if max(full) >= len(iterations):
      raise ValueError(
        f"sample.refresh_iterations: found {max(full)}, expected iterations 0 to "
        f"{len(iterations) - 1}"
      )
  else:
    full = set(range(0, len(iterations), sample.refresh_interval))
  selective = [k for k in range(len(iterations)) if k not in full]
  _check_layer(draft)
  config = draft.config
  decoder = _sizes(
    draft, "active_size", ACTIVE_SHARE, selective, lambda i: i.num_previous + i.num_predict
  )
  # Who asks for all tokens means both stacks.
  share = 1.0 if sample.active_size >= config.num_tokens else ACTIVE_SHARE / 2
  encoder = _sizes(draft, "encoder_active_size", share, selective, lambda i: i.num_previous)
  for k in selective:
    iteration = iterations[k]
    everything = encoder[k] >= config.buffer_size + iteration.num_known
    if everything and decoder[k] >= config.num_tokens and sample.selection != "lower":
      continue  # nothing is left to be cached
    iteration.decoder = Refresh(decoder[k], sample.selection, layer=sample.select_layer)
    iteration.encoder = Refresh(encoder[k], sample.selection, layer=sample.select_layer)
    if sample.condition_cache and draft.guided:
      iteration.halves = 1


def too_large(sample: SampleConfig, iterations: Sequence[Iteration | Row]) -> list[int]:
  """The iterations that force more tokens than an active size that was given holds.

  They can be full ones only.
  """
  return [
    k
    for k, i in enumerate(iterations)
    if 0 < sample.active_size < i.num_previous + i.num_predict
    or 0 < sample.encoder_active_size < i.num_previous
  ]


def _check_layer(draft: Draft) -> None:
  """Raises ValueError where a stack has no layer to select at."""
  depth = min(draft.config.encoder_depth, draft.config.decoder_depth)
  # The last layer of the decoder runs for the tokens to predict alone: a scout pass may end there,
  # but no attention of all tokens is to be had.
  last = depth if draft.sample.selection == "scout" else min(depth, draft.config.decoder_depth - 1)
  if not draft.sample.select_layer <= last:
    raise ValueError(
      f"sample.select_layer={draft.sample.select_layer}: expected 1 to {last} with selection "
      f"{draft.sample.selection} in stacks of {draft.config.encoder_depth} and "
      f"{draft.config.decoder_depth} layers"
    )


def _sizes(
  draft: Draft, field: str, share: float, selective: list[int], forced: Callable[[Iteration], int]
) -> dict[int, int]:
  """The active size of every selective iteration: that of a field, or a share of all tokens.

  A size that was given must hold the forced tokens of every iteration; the share is raised.
  """
  given, num_tokens = getattr(draft.sample, field), draft.config.num_tokens
  if given > num_tokens:
    logging.warning("sample.%s=%d: clipped to all %d tokens", field, given, num_tokens)
  size = min(given, num_tokens) if given else max(1, round(share * num_tokens))
  sizes = {}
  for k in selective:
    need = forced(draft.iterations[k])
    if given and need > given:
      most = max(forced(draft.iterations[i]) for i in selective)
      raise ValueError(
        f"sample.{field}={given}: iteration {k} forces {need} tokens; the smallest size that works "
        f"is {most} (0 chooses one)"
      )
    sizes[k] = max(size, need)
  return sizes
