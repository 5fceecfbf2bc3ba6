"""The diffusion process of the head: schedules on the host, arithmetic on the device.

Schedules are float64 numpy, computed before anything is traced. Device arithmetic is float32
whatever the dtype of the network, and works on the last axis C of [..., C] tokens. A step is a
diffusion step everywhere in this file.

Reference: `diffusion/gaussian_diffusion.py`, `diffusion/respace.py` and `models/diffloss.py` of
MAR; the process is that of Improved DDPM (arXiv 2102.09672) with a cosine schedule, a model that
predicts eps and the interpolation coefficient of a learned-range log variance.
"""

from __future__ import annotations

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from marche_jax.config import NUM_TRAIN_TIMESTEPS

MAX_BETA = 0.999


def cosine_betas(num_timesteps: int = NUM_TRAIN_TIMESTEPS) -> np.ndarray:
  """Cosine betas, float64 [num_timesteps] (arXiv 2102.09672, equation 17)."""
  time = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
  alpha_bar = np.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
  return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], MAX_BETA)


def respaced_timesteps(num_steps: int, max_timestep: int = NUM_TRAIN_TIMESTEPS - 1) -> np.ndarray:
  """The training timesteps that a sampler of `num_steps` steps keeps, ascending int64 [T].

  The stride is accumulated in floating point and rounded half to even, as the reference does.
  With `max_timestep` the kept steps are clipped and deduplicated (DiSA, arXiv 2505.20297), so T
  may be smaller than `num_steps`. A single step is, as in the reference, timestep 0, from which no
  sample can be drawn.
  """
  stride = (NUM_TRAIN_TIMESTEPS - 1) / (num_steps - 1) if num_steps > 1 else 1.0
  kept, position = [], 0.0
  for _ in range(num_steps):
    kept.append(min(round(position), max_timestep))
    position += stride
  return np.unique(np.asarray(kept, np.int64))


def log_snr_timesteps(num_steps: int, max_timestep: int = NUM_TRAIN_TIMESTEPS - 1) -> np.ndarray:
  """Training timesteps evenly spaced in log(alpha / sigma), ascending int64 [T].

  From 0 to `max_timestep`, as solvers of higher order want them (arXiv 2206.00927, section 3.4);
  duplicates are dropped, so T may be smaller than `num_steps`.
  """
  alphas_cumprod = np.cumprod(1 - cosine_betas())[: max_timestep + 1]
  log_snr = 0.5 * np.log(alphas_cumprod / (1 - alphas_cumprod))  # descending
  wanted = np.linspace(log_snr[0], log_snr[-1], num_steps)
  return np.unique(np.abs(log_snr[None] - wanted[:, None]).argmin(axis=1))


@dataclasses.dataclass(frozen=True, eq=False)
class Process:
  """A (respaced) diffusion process; every array is float64 [T] unless said otherwise."""

  timesteps: np.ndarray  # int64: the training timestep of each step, ascending
  betas: np.ndarray
  alphas_cumprod: np.ndarray
  alphas_cumprod_prev: np.ndarray
  posterior_log_variance: np.ndarray  # clipped: the first entry repeats the second

  def coefficients(self) -> Coefficients:
    """What the device needs of every step, float32 [T]."""
    ac, prev, betas = self.alphas_cumprod, self.alphas_cumprod_prev, self.betas
    values = {
      "timestep": self.timesteps.astype(np.int32),
      "sqrt_alpha": np.sqrt(ac),
      "sqrt_one_minus_alpha": np.sqrt(1 - ac),
      "sqrt_recip_alpha": np.sqrt(1 / ac),
      "sqrt_recip_alpha_minus_one": np.sqrt(1 / ac - 1),
      "mean_x0": betas * np.sqrt(prev) / (1 - ac),
      "mean_xt": (1 - prev) * np.sqrt(1 - betas) / (1 - ac),
      "min_log_variance": self.posterior_log_variance,
      "max_log_variance": np.log(betas),
      "noise": (np.arange(len(betas)) > 0).astype(np.float64),
    } | self._dpm_coefficients()
    narrow = lambda v: v if v.dtype == np.int32 else v.astype(np.float32)
    return Coefficients(**jax.tree.map(narrow, values))

  def _dpm_coefficients(self) -> dict[str, np.ndarray]:
    """Scalars of `dpm_step`; the last executed step (index 0) goes to x_0, where sigma is 0."""
    alpha, sigma = np.sqrt(self.alphas_cumprod), np.sqrt(1 - self.alphas_cumprod)
    to_alpha, to_sigma = np.append(1.0, alpha[:-1]), np.append(0.0, sigma[:-1])
    decay = alpha * to_sigma / (sigma * to_alpha)  # exp(-h), h the step of log(alpha / sigma)
    h = -np.log(np.where(decay > 0, decay, 1.0))
    before = np.append(h[1:], np.inf)  # of the step executed before; none before the first
    return {
      "dpm_xt": to_sigma / sigma * decay,
      "dpm_x0": to_alpha * (1 - decay**2),
      "dpm_noise": to_sigma * np.sqrt(1 - decay**2),
      "dpm_slope": 0.5 * h / before,
    }


@flax.struct.dataclass
class Coefficients:
  """Per-step scalars of a process, each [T] (or [] once indexed); float32 but for `timestep`.

  They are numpy arrays until a program takes them.
  """

  timestep: jax.Array  # int32: of the training process
  sqrt_alpha: jax.Array  # sqrt of the cumulative alpha
  sqrt_one_minus_alpha: jax.Array
  sqrt_recip_alpha: jax.Array
  sqrt_recip_alpha_minus_one: jax.Array
  mean_x0: jax.Array  # weight of x_0 in the posterior mean
  mean_xt: jax.Array  # weight of x_t in the posterior mean
  min_log_variance: jax.Array
  max_log_variance: jax.Array
  noise: jax.Array  # 0 at the last executed step (index 0), else 1
  dpm_xt: jax.Array  # of `dpm_step`: weight of x_t,
  dpm_x0: jax.Array  # of x_0,
  dpm_noise: jax.Array  # of the noise,
  dpm_slope: jax.Array  # and of the change of x_0 since the step before

  def at(self, index: jax.Array) -> Coefficients:
    """The scalars of one step, or one per token where `index` is an array."""
    return jax.tree.map(lambda x: jnp.asarray(x)[index], self)


def make_process(timesteps: np.ndarray | None = None) -> Process:
  """The training process, or the one respaced to the given ascending training timesteps."""
  train_alphas_cumprod = np.cumprod(1 - cosine_betas())
  if timesteps is None:
    timesteps = np.arange(NUM_TRAIN_TIMESTEPS)
  kept = train_alphas_cumprod[timesteps]
  betas = 1 - kept / np.append(1.0, kept[:-1])
  alphas_cumprod = np.cumprod(1 - betas)
  prev = np.append(1.0, alphas_cumprod[:-1])
  variance = betas * (1 - prev) / (1 - alphas_cumprod)
  # The first variance is 0; a process of one step has no second and never draws noise.
  variance[0] = variance[1] if len(variance) > 1 else betas[0]
  return Process(np.asarray(timesteps), betas, alphas_cumprod, prev, np.log(variance))


def _split(out: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Head output [..., 2C] -> eps and variance coefficient, both float32 [..., C]."""
  eps, coefficient = jnp.split(out.astype(jnp.float32), 2, axis=-1)
  return eps, coefficient


def _mean_and_log_variance(
  c: Coefficients, x: jax.Array, eps: jax.Array, coefficient: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Mean and log variance of p(x_{t-1} | x_t), [..., C]."""
  x0 = c.sqrt_recip_alpha * x - c.sqrt_recip_alpha_minus_one * eps
  fraction = (coefficient + 1) / 2
  log_variance = fraction * c.max_log_variance + (1 - fraction) * c.min_log_variance
  return c.mean_x0 * x0 + c.mean_xt * x, log_variance


def guide(cond: jax.Array, uncond: jax.Array, scale: jax.Array) -> jax.Array:
  """Guided head output [..., 2C]: guidance acts on eps, the variance is the conditional one's."""
  eps, coefficient = _split(cond)
  eps_uncond, _ = _split(uncond)
  return jnp.concatenate([eps_uncond + scale * (eps - eps_uncond), coefficient], axis=-1)


def ancestral_step(
  c: Coefficients, x: jax.Array, out: jax.Array, noise: jax.Array, temperature: jax.Array
) -> jax.Array:
  """One step of ancestral sampling, x_t -> x_{t-1}, float32 [..., C].

  Args:
    c: the step's scalars.
    x: x_t, float32 [..., C].
    out: head output [..., 2C] at x_t, after guidance.
    noise: standard normal [..., C]; unused at the last step.
    temperature: factor on the noise.
  """
  mean, log_variance = _mean_and_log_variance(c, x, *_split(out))
  return mean + c.noise * temperature * jnp.exp(0.5 * log_variance) * noise


def dpm_step(
  c: Coefficients,
  x: jax.Array,
  out: jax.Array,
  before: jax.Array,
  noise: jax.Array,
  temperature: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """One step of SDE-DPM-Solver++(2M) (arXiv 2211.01095, section 4 and appendix D).

  A multistep solver of second order for the reverse SDE in terms of the predicted x_0, which it
  extrapolates linearly in log(alpha / sigma); the learned variance is not used. The first step,
  with nothing before it, and the last, which ends at x_0, are of first order.

  Args:
    c: the step's scalars.
    x: x_t, float32 [..., C].
    out: head output [..., 2C] at x_t, after guidance.
    before: x_0 predicted in the step before [..., C]; unused in the first step.
    noise: standard normal [..., C]; unused at the last step.
    temperature: factor on the noise.

  Returns:
    x at the next timestep, and the x_0 predicted now, both float32 [..., C].
  """
  eps, _ = _split(out)
  x0 = c.sqrt_recip_alpha * x - c.sqrt_recip_alpha_minus_one * eps
  extrapolated = x0 + c.dpm_slope * (x0 - before)
  return c.dpm_xt * x + c.dpm_x0 * extrapolated + c.dpm_noise * temperature * noise, x0


def add_noise(c: Coefficients, x0: jax.Array, noise: jax.Array) -> jax.Array:
  """x_t given x_0, float32 [n, C]; `c` holds one scalar per row."""
  return c.sqrt_alpha[:, None] * x0 + c.sqrt_one_minus_alpha[:, None] * noise


def training_terms(
  c: Coefficients, x0: jax.Array, xt: jax.Array, noise: jax.Array, out: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The two loss terms per token: mean squared error of eps, and the variational bound in bits.

  The bound trains the variance only: the gradient of its mean is stopped
  (arXiv 2102.09672, section 3.1).

  Args:
    c: scalars of each row's step, [n].
    x0: clean tokens, float32 [n, C].
    xt: noised tokens, float32 [n, C].
    noise: the noise added, float32 [n, C].
    out: head output [n, 2C].

  Returns:
    (mse, vb), each float32 [n].
  """
  column = jax.tree.map(lambda v: v[:, None], c)
  eps, coefficient = _split(out)
  mse = jnp.mean((noise - eps) ** 2, axis=-1)

  mean, log_variance = _mean_and_log_variance(column, xt, jax.lax.stop_gradient(eps), coefficient)
  true_mean = column.mean_x0 * x0 + column.mean_xt * xt
  true_log_variance = column.min_log_variance
  kl = 0.5 * (
    log_variance
    - true_log_variance
    - 1.0
    + jnp.exp(true_log_variance - log_variance)
    + (true_mean - mean) ** 2 * jnp.exp(-log_variance)
  )
  nll = -_discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_variance)
  vb = jnp.where(c.timestep == 0, jnp.mean(nll, axis=-1), jnp.mean(kl, axis=-1))
  return mse, vb / math.log(2.0)


def _discretized_gaussian_log_likelihood(
  x: jax.Array, mean: jax.Array, log_scale: jax.Array
) -> jax.Array:
  """Log likelihood of x in bins of +-1/255, open-ended outside +-0.999, [n, C]."""

  def cdf(v: jax.Array) -> jax.Array:  # tanh approximation of the standard normal's
    return 0.5 * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (v + 0.044715 * v**3)))

  inverse = jnp.exp(-log_scale)
  upper = cdf(inverse * (x - mean + 1.0 / 255.0))
  lower = cdf(inverse * (x - mean - 1.0 / 255.0))

  def log(v: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(v, 1e-12))

  inside = log(upper - lower)
  return jnp.where(x < -0.999, log(upper), jnp.where(x > 0.999, log(1.0 - lower), inside))
