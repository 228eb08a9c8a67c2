"""Noise schedules as pure functions: u -> t, log-SNR, noisy latent, target, weight (CaPO, 4.4 and A.3).

There are two schedules: the discrete variance-preserving one (`vp_`: SD1.5, SDXL; networks that predict the
noise, or v) and rectified flow (`flow_`: SD3, Flux; networks that predict the velocity). `lam` is the
log-SNR, `log(alpha_t^2 / sigma_t^2)`.

All functions keep the dtype of their input and compute half precision in float32. `t`, `u` and `alpha_bar`
have the leading dimensions of the latents, (B,) or (B, k).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from capo.errors import ParameterError
from capo.runtime.dtypes import at_least_float32

FLOW_EDGE = 1e-5  # flow times are clamped to [FLOW_EDGE, 1 - FLOW_EDGE], where the log-SNR is finite
LOG_SNR_RANGE = (10.0, -10.0)  # log-SNR at u = 0 and at u = 1 of the draw `logsnr_uniform`
# draws in which the log-SNR is normal -> its mean and standard deviation. The first is the middle of SDXL's
# schedule, whose log-SNR is -1 at t = 500, with little of the times at which all or nothing of the image is
# to be seen; the second the times at which a small model decides what an image shows (docs/shapes.md).
LOG_SNR_NORMAL = {"logsnr_normal": (-0.5, 2.0), "logsnr_normal_late": (-3.5, 1.5)}
VP_DRAWS = ("uniform", *LOG_SNR_NORMAL)
# where the noise of a training sample comes from: a random draw, the noise that its image began with, or
# an inversion of the image by the policy
DRAWN, PRIOR, INVERTED = SOURCES = ("drawn", "prior", "inverted")


def vp_log_snr(alphas_cumprod: Tensor) -> Tensor:
    """Log-SNR `lam = log(abar / (1 - abar))` of cumulative alphas in (0, 1), of any shape; falls with t."""
    abar = at_least_float32(alphas_cumprod)
    return (abar.log() - (-abar).log1p()).to(alphas_cumprod.dtype)


def vp_timestep(u: Tensor, steps: int) -> Tensor:
    """Timestep `t = floor(u T)` with T = steps: u in [0, 1), any shape -> int64 in 0 ... T - 1.

    Raises ValueError for steps < 1.
    """
    if steps < 1:
        raise ValueError(f"a schedule of {steps} steps has no timestep to draw")
    # clamped, since a double just below 1 becomes 1 in float32
    return (at_least_float32(u) * steps).long().clamp(0, steps - 1)


def vp_time(u: Tensor, log_snr: Tensor, draw: str = "uniform") -> Tensor:
    """Timestep of a discrete schedule for a uniform number u; it rises with u.

    Args:
        u: numbers in [0, 1), any shape.
        log_snr: (T,) log-SNR of each timestep, falling; -inf is allowed.
        draw: `uniform`: t = floor(u T); one of LOG_SNR_NORMAL: the timestep whose log-SNR is nearest to
            lam = mu - sigma Phi^-1(v), normal with its (mu, sigma). v rises with u, between the bounds within
            which lam stays inside the schedule: no mass piles up at its ends.

    Returns:
        int64 in 0 ... T - 1, shape of u.

    Raises:
        ParameterError: if the draw is unknown.
    """
    if draw not in VP_DRAWS:
        raise ParameterError("draw", draw, f"must be one of {', '.join(VP_DRAWS)}")
    if draw == "uniform":
        return vp_timestep(u, len(log_snr))
    mean, deviation = LOG_SNR_NORMAL[draw]
    falling = at_least_float32(log_snr).to(u.device)
    z = (mean - falling) / deviation  # rises with t
    low, high = torch.special.ndtr(z[0]), torch.special.ndtr(z[-1])
    normal = torch.special.ndtri(low + (high - low) * at_least_float32(u))
    return torch.bucketize(normal, (z[:-1] + z[1:]) / 2)


def vp_add_noise(x: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Noisy latent `x_t = sqrt(abar) x + sqrt(1 - abar) eps` of a variance-preserving schedule.

    Args:
        x: (B, ..., C, H, W) latents.
        eps: standard normal noise, shape of x.
        alpha_bar: (B, ...) cumulative alpha at the timestep of each latent.

    Returns:
        x_t, shape and dtype of x.
    """
    abar = _per_sample(alpha_bar, x)
    return (abar.sqrt() * x + (1 - abar).sqrt() * eps).to(x.dtype)


def vp_velocity(x: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Velocity `v = sqrt(abar) eps - sqrt(1 - abar) x` of a variance-preserving schedule.

    Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022, appendix D.
    Shapes as in `vp_add_noise`.
    """
    abar = _per_sample(alpha_bar, x)
    return (abar.sqrt() * eps - (1 - abar).sqrt() * x).to(x.dtype)


def vp_noise_within(x: Tensor, noisy: Tensor, alpha_bar: Tensor) -> Tensor:
    """Noise with which `vp_add_noise` makes `noisy` of x: `(x_t - sqrt(abar) x) / sqrt(1 - abar)`.

    Shapes as in `vp_add_noise`; 0 / 0 where abar is 1.
    """
    abar = _per_sample(alpha_bar, x)
    return ((noisy - abar.sqrt() * x) / (1 - abar).sqrt()).to(x.dtype)


def vp_ddim_step(noisy: Tensor, eps: Tensor, alpha_bar: Tensor, other: Tensor) -> Tensor:
    """Noisy latent at another time, with the same noise and the clean latent that it implies (DDIM, eta 0).

    Args:
        noisy: (B, ..., C, H, W) latents x_t.
        eps: the noise in them, shape of noisy.
        alpha_bar: (B, ...) cumulative alpha at their time, above 0.
        other: (B, ...) cumulative alpha at the other time.

    Returns:
        `sqrt(abar') (x_t - sqrt(1 - abar) eps) / sqrt(abar) + sqrt(1 - abar') eps`, dtype of noisy.
    """
    abar = _per_sample(alpha_bar, noisy)
    clean = (noisy - (1 - abar).sqrt() * eps) / abar.sqrt()
    return vp_add_noise(clean, eps, other).to(noisy.dtype)


def vp_posterior_deviation(alpha_bar: Tensor, later: Tensor) -> Tensor:
    """Standard deviation of x_t given x at a later time and the clean latent; cumulative alphas of any shape.

    `sigma^2 = (1 - abar) / (1 - abar') (1 - abar' / abar)`, of which DDIM takes the share eta; 0 where the
    times are equal.
    """
    variance = (1 - alpha_bar) / (1 - later) * (1 - later / alpha_bar)
    return torch.where(alpha_bar > later, variance, 0).sqrt()


def flow_log_snr(t: Tensor) -> Tensor:
    """Log-SNR `lam = 2 log((1 - t) / t)` of flow times t in (0, 1), of any shape; falls with t."""
    time = at_least_float32(t)
    return (2 * ((-time).log1p() - time.log())).to(t.dtype)


def flow_time(u: Tensor, draw: str = "logsnr_uniform") -> Tensor:
    """Flow time t of a uniform number u; it rises with u and is clamped to [1e-5, 1 - 1e-5].

    The draws are not interchangeable at equal beta, because the weight is inside the objective: at bias -1
    the mean weight is 0.156 for `logsnr_uniform` and 0.277 for `uniform`.

    Args:
        u: numbers in [0, 1), any shape.
        draw: `logsnr_uniform`: lam = 10 - 20 u (the paper's text); `uniform`: t = u (the result of the
            paper's derivation); `logit_normal`: t = sigmoid(Phi^-1(u)).

    Returns:
        t, shape and dtype of u.

    Raises:
        ParameterError: if the draw is unknown.
    """
    if draw not in FLOW_DRAWS:
        raise ParameterError("draw", draw, f"must be one of {', '.join(FLOW_DRAWS)}")
    return FLOW_DRAWS[draw](at_least_float32(u)).clamp(FLOW_EDGE, 1 - FLOW_EDGE).to(u.dtype)


def _logsnr_uniform(u: Tensor) -> Tensor:
    first, last = LOG_SNR_RANGE
    return torch.sigmoid(-(first + (last - first) * u) / 2)  # the inverse of flow_log_snr


def _uniform(u: Tensor) -> Tensor:
    return u


def _logit_normal(u: Tensor) -> Tensor:
    return torch.special.ndtri(u).sigmoid()


FLOW_DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "logsnr_uniform": _logsnr_uniform,
    "uniform": _uniform,
    "logit_normal": _logit_normal,
}


def flow_add_noise(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Noisy latent `x_t = (1 - t) x + t eps` of a rectified flow.

    Args:
        x: (B, ..., C, H, W) latents.
        eps: standard normal noise, shape of x.
        t: (B, ...) flow time of each latent.

    Returns:
        x_t, shape and dtype of x.
    """
    time = _per_sample(t, x)
    return ((1 - time) * x + time * eps).to(x.dtype)


def flow_target(x: Tensor, eps: Tensor) -> Tensor:
    """Velocity `v = eps - x`, the derivative of `flow_add_noise` with respect to t; shape and dtype of x."""
    return eps - x


def sigmoid_weight(log_snr: Tensor, bias: float) -> Tensor:
    """Weight `w(lam) = sigmoid(b - lam)` on the squared error of the noise; shape and dtype of log_snr.

    It falls with lam, as section 4.4 and eq. 26 require (eq. 24 as printed, 1 / (1 + exp(b - lam)), rises).
    """
    return (bias - at_least_float32(log_snr)).sigmoid().to(log_snr.dtype)


def velocity_weight(log_snr: Tensor, bias: float) -> Tensor:
    """Weight `w(lam) = 1 / (e^{(lam-b)/2} + e^{-(lam-b)/2})` on the squared error of the velocity (A.3).

    Shape and dtype of log_snr; the maximum is 1/2, at lam = b. Up to a constant factor, an integral over t of
    the velocity's error with this weight equals an integral over the log-SNR of the noise's error with
    `sigmoid_weight`.
    """
    return (0.5 / ((at_least_float32(log_snr) - bias) / 2).cosh()).to(log_snr.dtype)


def constant_weight(log_snr: Tensor, bias: float | None = None) -> Tensor:
    """Weight `w = 1` on either error (control); the bias is ignored, it completes the common signature."""
    return torch.ones_like(log_snr)


def _per_sample(values: Tensor, latents: Tensor) -> Tensor:
    """Reshape one number per latent, (B, ...), to broadcast against latents (B, ..., C, H, W)."""
    return at_least_float32(values).reshape(values.shape + (1,) * (latents.ndim - values.ndim))
