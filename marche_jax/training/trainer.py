"""Training: the optimizer, one update, and the loop around it.

A run is a function of its configuration alone: random draws are keyed by (seed, update), the data
iterator's position is part of every checkpoint, and so a run that was killed ends with the same
parameters as one that was not.

Reference: `main_mar.py`, `engine_mar.py` and `util/misc.py` of MAR.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias, Union

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from marche_jax.config import Config, ModelConfig, TrainConfig
from marche_jax.files import atomic_write, check_writable
from marche_jax.lock import only_run
from marche_jax.models import mar, vae
from marche_jax.models.params import Leaf, Params
from marche_jax.progress import update_bar
from marche_jax.training import data as data_lib
from marche_jax.training import losses, sources

STACKED = ("encoder_blocks", "decoder_blocks")
METRICS = ("step", "epoch", "loss", "mse", "vb", "grad_norm", "lr", "images_per_second")


Mask: TypeAlias = Mapping[str, Union[bool, "Mask"]]
"""Whether something acts on a parameter, with the structure of the parameters."""


@flax.struct.dataclass
class TrainState:
  """What one update maps to the next."""

  step: jax.Array  # int32: updates done
  params: Params  # float32
  ema: Params  # float32, like params
  opt_state: optax.OptState


class NonFiniteLossError(ValueError):
  """The loss or its gradient became NaN or infinite."""


def decay_mask(params: Params) -> Mask:
  """True where weight decay acts: not on biases, 1-D parameters and the head.

  Stacked layers count by the rank of one layer's parameter (reference: `add_weight_decay`).
  """

  def decays(path: tuple[jax.tree_util.DictKey, ...], leaf: Leaf) -> bool:
    names = [entry.key for entry in path]
    rank = leaf.ndim - (names[0] in STACKED)
    return rank > 1 and names[-1] != "bias" and names[0] != "head"

  return jax.tree_util.tree_map_with_path(decays, params)


def learning_rate(config: TrainConfig, updates_per_epoch: int) -> optax.Schedule:
  """Linear warm-up, then constant (the reference's) or a cosine to zero at the last epoch."""
  peak = config.blr * config.batch_size / 256
  warmup = config.warmup_epochs * updates_per_epoch
  total = config.epochs * updates_per_epoch
  after = (
    optax.cosine_decay_schedule(peak, max(total - warmup, 1))
    if config.lr_schedule == "cosine"
    else optax.constant_schedule(peak)
  )
  return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])


def make_optimizer(
  config: TrainConfig, rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
  """Global-norm clipping, then AdamW with the reference's exceptions from weight decay."""
  return optax.chain(
    optax.clip_by_global_norm(config.grad_clip),
    optax.adamw(
      rate,
      b1=config.beta1,
      b2=config.beta2,
      eps=1e-8,
      weight_decay=config.weight_decay,
      mask=decay_mask,
    ),
  )


def init_state(
  config: ModelConfig, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
  """Fresh parameters, their EMA and the optimizer's moments."""
  params = mar.init_params(config, jax.random.key(seed))
  return TrainState(jnp.zeros((), jnp.int32), params, params, optimizer.init(params))


def update(
  state: TrainState,
  batch: dict[str, jax.Array],
  *,
  config: Config,
  optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update on {'images' [B, C, H, W] or 'moments' [B, 2C, h, w], 'labels' [B]}."""
  key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
  draw_key, dropout_key, posterior_key = jax.random.split(key, 3)
  if "moments" in batch:  # sample the autoencoder's posterior
    latents = vae.Posterior(batch["moments"]).sample(posterior_key)
  else:
    latents = batch["images"]
  tokens = mar.patchify(latents * config.model.latent_scale, config.model)
  draws = losses.draw(draw_key, config.model, tokens.shape[0])
  dropout = config.model.attn_dropout > 0 or config.model.proj_dropout > 0

  loss = functools.partial(
    losses.training_loss,
    dropout_key=dropout_key if dropout else None,
    dtype=jnp.dtype(config.train.dtype),
    remat=config.train.remat,
  )
  (value, terms), grads = jax.value_and_grad(loss, has_aux=True)(
    state.params, config.model, tokens, batch["labels"], draws
  )
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  rate = config.train.ema_rate
  ema = jax.tree.map(lambda e, p: rate * e + (1 - rate) * p, state.ema, params)
  metrics = {"loss": value, **terms, "grad_norm": optax.tree.norm(grads)}
  return TrainState(state.step + 1, params, ema, opt_state), metrics


class MetricsWriter:
  """Appends metrics to `metrics.csv` and, where tensorboardX is installed, to TensorBoard."""

  def __init__(self, workdir: pathlib.Path, first_update: int) -> None:
    self._path = workdir / "metrics.csv"
    rows = []
    if self._path.exists():  # drop what a killed run logged after its last checkpoint
      with self._path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) <= first_update]
    with atomic_write(self._path) as aside, aside.open("w", newline="") as file:
      writer = csv.DictWriter(file, METRICS)
      writer.writeheader()
      writer.writerows(rows)
    try:
      from tensorboardX import SummaryWriter
    except ImportError:
      logging.warning("no TensorBoard events: pip install 'marche_jax[train]' brings tensorboardX")
      self._board = None
    else:
      self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_update + 1)

  def write(self, row: dict[str, float]) -> None:
    """Writes one row of `METRICS`."""
    with self._path.open("a", newline="") as file:  # a row that a killed run cut is dropped above
      csv.DictWriter(file, METRICS).writerow(row)
    if self._board is not None:
      for name, value in row.items():
        if name != "step":
          self._board.add_scalar(name, value, int(row["step"]))
      self._board.flush()

  def close(self) -> None:
    """Flushes what TensorBoard still holds."""
    if self._board is not None:
      self._board.close()


def train(
  config: Config,
  workdir: str | os.PathLike[str],
  on_sample: Callable[[Params, int], None] | None = None,
) -> TrainState:
  """Trains from the last checkpoint in `workdir`, or from the start, to the last epoch.

  Args:
    config: of the run.
    workdir: takes `checkpoints/`, `metrics.csv` and `tensorboard/`.
    on_sample: called with (EMA parameters, updates done) every `train.sample_every` updates.

  Where it is interrupted, the exception's note says what is kept.

  Returns:
    The final state.

  Raises:
    NonFiniteLossError: names the update and the last good checkpoint, where there is one.
    ValueError: where the data does not fit the configuration, or `workdir` cannot be written, is
      being written by another run, or holds a run of another model or other data.
  """
  workdir = pathlib.Path(workdir).absolute()
  t = config.train
  devices = jax.devices()
  if t.batch_size % len(devices):
    raise ValueError(
      f"train.batch_size={t.batch_size}: expected a multiple of the {len(devices)} devices"
    )
  source = sources.open_source(config.data, config.model)
  batches = data_lib.make_iterator(
    source, t.batch_size, t.seed, config.data.flip, config.data.num_workers, config.model
  )
  per_epoch = len(source) // t.batch_size
  total = t.epochs * per_epoch
  schedule = learning_rate(t, per_epoch)
  optimizer = make_optimizer(t, schedule)

  mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  replicated = NamedSharding(mesh, PartitionSpec())
  sharded = NamedSharding(mesh, PartitionSpec("data"))
  make_state = functools.partial(init_state, config.model, optimizer, t.seed)
  options = ocp.CheckpointManagerOptions(
    max_to_keep=t.keep_checkpoints, enable_async_checkpointing=False
  )
  with contextlib.ExitStack() as stack:
    stack.enter_context(contextlib.closing(batches))
    stack.enter_context(only_run(check_writable(workdir)))
    manager = stack.enter_context(ocp.CheckpointManager(workdir / "checkpoints", options=options))
    stack.enter_context(_noting_what_is_kept(workdir, manager))
    latest = manager.latest_step()
    if latest is None:
      state = jax.device_put(jax.jit(make_state)(), replicated)
    else:
      target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
        jax.eval_shape(make_state),
      )
      _check_model(workdir / "checkpoints" / str(latest), config.model)
      restored = manager.restore(
        latest,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore()
        ),
      )
      state = restored["state"]
      try:
        batches.set_state(restored["data"])
      except ValueError as error:
        raise ValueError(f"{workdir}: {error}") from error
      logging.info("resumed from update %d", latest)
    run_update = jax.jit(
      functools.partial(update, config=config, optimizer=optimizer),
      donate_argnums=0,
      out_shardings=(replicated, replicated),
    )
    start = latest or 0
    writer = stack.enter_context(contextlib.closing(MetricsWriter(workdir, start)))
    pending: list[tuple[int, dict[str, jax.Array]]] = []

    def check() -> dict[str, float]:
      """Reads the oldest metrics that were not read yet."""
      number, metrics = pending.pop(0)
      values = {k: float(v) for k, v in jax.device_get(metrics).items()}
      if not all(math.isfinite(v) for v in values.values()):
        good = manager.latest_step()
        kept = (
          "there is no checkpoint yet"
          if good is None
          else f"the last good checkpoint is {workdir / 'checkpoints' / str(good)}"
        )
        raise NonFiniteLossError(
          f"non-finite loss at update {number}: {values}; {kept}. Lower train.blr, or set "
          "train.dtype=float32."
        )
      return values

    clock, clocked = time.perf_counter(), start
    values: dict[str, float] = {}
    bar = stack.enter_context(contextlib.closing(
      update_bar(range(start, total), "train", start, total)))  # fmt: skip
    for i in bar:
      batch = jax.device_put(next(batches), sharded)
      state, metrics = run_update(state, batch)
      pending.append((i + 1, metrics))
      done = i + 1
      at_checkpoint = done % t.checkpoint_every == 0 or done == total
      while len(pending) > (0 if at_checkpoint or done % t.log_every == 0 else 1):
        values = check()  # one update late, so that the device never waits for the host
      if done % t.log_every == 0 or done == total:
        now = time.perf_counter()
        rate = (done - clocked) * t.batch_size / (now - clock)
        clock, clocked = now, done
        writer.write(
          {"step": done, "epoch": done / per_epoch, **values, "lr": float(schedule(i)),
           "images_per_second": rate}
        )  # fmt: skip
        bar.set_postfix(loss=f"{values['loss']:.4f}", images_per_s=f"{rate:.0f}", refresh=False)
      if at_checkpoint:
        manager.save(
          done,
          args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(batches.get_state())
          ),
        )
      if on_sample is not None and t.sample_every and (done % t.sample_every == 0 or done == total):
        on_sample(state.ema, done)
    return state


@contextlib.contextmanager
def _noting_what_is_kept(workdir: pathlib.Path, manager: ocp.CheckpointManager) -> Iterator[None]:
  """Adds to an interrupt from which update the same command goes on."""
  try:
    yield
  except KeyboardInterrupt as interrupt:
    latest = manager.latest_step()
    interrupt.add_note(
      "no checkpoint was due yet, the same command starts anew"
      if latest is None
      else f"{workdir / 'checkpoints' / str(latest)} is kept, the same command goes on from there"
    )
    raise


def load_ema(workdir: str | os.PathLike[str], config: ModelConfig) -> tuple[Params, int]:
  """The EMA parameters (numpy, float32) of the last checkpoint in `workdir`, and its update.

  Nothing else of the checkpoint is read, and nothing is written.

  Raises:
    ValueError: where `workdir` or a checkpoint in it does not exist, or is of another model.
  """
  directory = pathlib.Path(workdir).absolute() / "checkpoints"
  if not directory.is_dir():
    raise ValueError(f"{workdir}: expected the directory of a training run, with checkpoints/")
  single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  target = {
    "ema": jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=single), mar.abstract_params(config)
    )
  }
  restore = ocp.args.PyTreeRestore(
    item=target,
    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
    partial_restore=True,
  )
  options = ocp.CheckpointManagerOptions(create=False)
  with ocp.CheckpointManager(directory, options=options) as manager:
    latest = manager.latest_step()
    if latest is None:
      raise ValueError(f"{directory}: found no checkpoint, expected one of a training run")
    _check_model(directory / str(latest), config)
    state = manager.restore(latest, args=ocp.args.Composite(state=restore))["state"]
  return jax.tree.map(np.asarray, state["ema"]), latest


def _check_model(directory: pathlib.Path, config: ModelConfig) -> None:
  """Compares the shapes in a checkpoint with a model's, before anything is read.

  Raises:
    ValueError: names the checkpoint and the first parameter that is another, or is not there.
  """
  with ocp.PyTreeCheckpointer() as checkpointer:
    stored = checkpointer.metadata(directory / "state").item_metadata.tree["ema"]
  found, expected = (
    {"/".join(k.key for k in path): list(leaf.shape)
     for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for tree in (stored, mar.abstract_params(config))
  )  # fmt: skip
  for name in sorted(found.keys() | expected.keys()):
    if found.get(name) != expected.get(name):
      raise ValueError(
        f"{directory}: of another model: {name} is {found.get(name, 'not there')}, expected "
        f"{expected.get(name, 'none')}; take its configuration, or another --workdir"
      )
