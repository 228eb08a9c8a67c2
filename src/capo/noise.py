"""Noise schedules as pure functions: u -> t, log-SNR, noisy latent, target, weight (CaPO, 4.4 and A.3).

Two schedules: discrete variance-preserving (`vp_`: SD1.5, SDXL; networks that predict the noise) and
    rectified flow (`flow_`: SD3, Flux; networks that predict the velocity). `lam` is the log-SNR,
    `log(alpha_t^2 / sigma_t^2)`.
Everywhere: dtype kept, half precision computed in float32. `t`, `u` and `alpha_bar` have the leading
    dimensions of the latents, (B,) or (B, k).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from capo.errors import InputError

FLOW_EDGE = 1e-5  # flow times stay inside [FLOW_EDGE, 1 - FLOW_EDGE], where the log-SNR is finite
LOG_SNR_RANGE = (10.0, -10.0)  # of the draw `logsnr_uniform`, from u = 0 to u = 1


def vp_log_snr(alphas_cumprod: Tensor) -> Tensor:
    """Lam = log(abar / (1 - abar)): cumulative alphas in (0, 1), any shape -> same shape; falls with t."""
    abar = _at_least_float32(alphas_cumprod)
    return (abar.log() - (-abar).log1p()).to(alphas_cumprod.dtype)


def vp_timestep(u: Tensor, steps: int) -> Tensor:
    """T = floor(u T): u in [0, 1), any shape -> int64 in 0 ... T - 1, T = steps. ValueError for steps < 1."""
    if steps < 1:
        raise ValueError(f"a schedule of {steps} steps has no timestep to draw")
    # a double just below 1 is 1 in float32
    return (_at_least_float32(u) * steps).long().clamp(0, steps - 1)


def vp_add_noise(x: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = sqrt(abar) x + sqrt(1 - abar) eps.

    x, eps: (B, ..., C, H, W) latents and unit noise; alpha_bar: (B, ...) cumulative alpha of each one's
        timestep. Returns x_t in the shape and dtype of x.
    """
    abar = _per_sample(alpha_bar, x)
    return (abar.sqrt() * x + (1 - abar).sqrt() * eps).to(x.dtype)


def flow_log_snr(t: Tensor) -> Tensor:
    """Lam = 2 log((1 - t) / t) of flow times t in (0, 1); any shape, shape kept, falling with t."""
    time = _at_least_float32(t)
    return (2 * ((-time).log1p() - time.log())).to(t.dtype)


def flow_time(u: Tensor, draw: str = "logsnr_uniform") -> Tensor:
    """Flow time of a uniform number, rising with u and kept inside [1e-5, 1 - 1e-5].

    The draws are not interchangeable at equal beta, because the weight sits inside the objective: its mean at
    bias -1 is 0.156 for `logsnr_uniform` and 0.277 for `uniform`.

    Args:
        u: in [0, 1), any shape.
        draw: `logsnr_uniform`: lam = 10 - 20 u (the paper's text); `uniform`: t = u (what its derivation
            gives); `logit_normal`: t = sigmoid(Phi^-1(u)).

    Returns:
        t, shape and dtype of u.

    Raises:
        InputError: an unknown draw.
    """
    if draw not in FLOW_DRAWS:
        raise InputError(f"noise.draw={draw!r} is unknown; choose one of {', '.join(FLOW_DRAWS)}")
    return FLOW_DRAWS[draw](_at_least_float32(u)).clamp(FLOW_EDGE, 1 - FLOW_EDGE).to(u.dtype)


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
    """x_t = (1 - t) x + t eps.

    x, eps: (B, ..., C, H, W) latents and unit noise; t: (B, ...) flow time of each. Returns x_t in the shape
        and dtype of x.
    """
    time = _per_sample(t, x)
    return ((1 - time) * x + time * eps).to(x.dtype)


def flow_target(x: Tensor, eps: Tensor) -> Tensor:
    """Velocity v = eps - x, the time derivative of `flow_add_noise`; shape and dtype of x."""
    return eps - x


def sigmoid_weight(log_snr: Tensor, bias: float) -> Tensor:
    """w(lam) = sigmoid(b - lam), the weight on the squared error of the noise; any shape, shape kept.

    Falls with lam, as section 4.4 and eq. 26 want it (eq. 24 as printed, 1 / (1 + exp(b - lam)), rises).
    """
    return (bias - _at_least_float32(log_snr)).sigmoid().to(log_snr.dtype)


def velocity_weight(log_snr: Tensor, bias: float) -> Tensor:
    """w(lam) = 1 / (e^{(lam-b)/2} + e^{-(lam-b)/2}), the weight on the squared error of the velocity (A.3).

    Any shape, shape kept; at most 1/2, at lam = b. It is what `sigmoid_weight` on the noise's error, summed
    over the log-SNR, becomes on the velocity's error, summed over t (up to a constant factor).
    """
    return (0.5 / ((_at_least_float32(log_snr) - bias) / 2).cosh()).to(log_snr.dtype)


def constant_weight(log_snr: Tensor, bias: float | None = None) -> Tensor:
    """W = 1 (control), on either error; the bias is there for the signature that the weights share."""
    return torch.ones_like(log_snr)


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _per_sample(values: Tensor, latents: Tensor) -> Tensor:
    """(B, ...) numbers, shaped so that they multiply (B, ..., C, H, W) latents one by one."""
    return _at_least_float32(values).reshape(values.shape + (1,) * (latents.ndim - values.ndim))
