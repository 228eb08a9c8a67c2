"""Inversion: the noise from which a policy would draw a given image, up to the time of a training sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from capo.backbones.base import Backbone
from capo.backbones.family import Text
from capo.backbones.sampling import candidate_noise
from capo.errors import InputError, ParameterError

NO_INVERSION = (
    "inversion is defined for discrete schedules (UNets) only; for a flow its authors replace it by the "
    "noise that the candidate was sampled from, noise.source=prior"
)


@dataclass(frozen=True)
class Inversion:
    """How latents are inverted: `steps * (1 + renoise)` forward passes of each.

    Attributes:
        steps: number of steps from the image to the time of the sample.
        renoise: how often each step is corrected: the prediction at its end, made for the time of its start,
            enters the mean of the predictions that the step is taken with (SmPO: 1; 0: never).
        eta: fresh noise after each step, in units of the standard deviation of the schedule's posterior
            between its two times (InPO: 0.1; 0: none).
    """

    steps: int = 10
    renoise: int = 0
    eta: float = 0.0

    def __post_init__(self) -> None:
        for name, least in {"steps": 1, "renoise": 0, "eta": 0}.items():
            if not getattr(self, name) >= least:
                raise ParameterError(name, getattr(self, name), f"must be at least {least}")

    @property
    def passes(self) -> int:
        """Number of forward passes of each latent."""
        return self.steps * (1 + self.renoise)


class Invertible(ABC):
    """What a family with an inversion adds to a `Backbone`; times (B,) are those of `rising_times`."""

    @abstractmethod
    def rising_times(self, t: Tensor, steps: int) -> Tensor:
        """Return times (steps + 1, B) that rise evenly from the clean latent to t (B,), for each sample."""

    @abstractmethod
    def predicted_noise(self, prediction: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """Return the noise (B, C, H, W) that a prediction for x_t implies."""

    @abstractmethod
    def ddim_step(self, noisy: Tensor, noise: Tensor, t: Tensor, later: Tensor) -> Tensor:
        """Take x_t (B, C, H, W) to the times `later` (B,) by a step of DDIM with this noise."""

    @abstractmethod
    def deviation_between(self, t: Tensor, later: Tensor) -> Tensor:
        """Return the standard deviation (B,) of the schedule's posterior at t, given x at `later`."""

    @abstractmethod
    def noise_within(self, latents: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """Return the noise (B, C, H, W) with which `Backbone.add_noise` makes x_t of clean latents."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """Return the time (B,) that the network is given for x_t; the clean latent has the first one."""


@torch.no_grad()
def invert(
    backbone: Backbone,
    denoiser: nn.Module,
    latents: Tensor,
    t: Tensor,
    text: Text,
    *,
    steps: int,
    renoise: int = 0,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Invert latents to the times t by DDIM backwards, without guidance; exactly at t for each sample.

    Every sample has a grid of times of its own. So a sample's result does not depend on its batch, and with
    y the noise that the target implies, `add_noise(latents, y, t)` is the noisy latent. The step from the
    clean latent is made at the first time of the schedule.

    Args:
        backbone: a family that is `Invertible`.
        denoiser: the network that inverts: the policy.
        latents: (B, C, H, W) clean latents.
        t: (B,) times.
        text: conditioning of the B prompts.
        steps: see `Inversion`.
        renoise: see `Inversion`.
        eta: see `Inversion`.
        noise: (B, C, H, W) random numbers; the fresh noise of a sample is a function of its own ones, so
            samples that share them share it. Needed where eta is above 0, else not read.

    Returns:
        Noisy latents and targets of `predict`, (B, C, H, W) each, without gradients.

    Raises:
        InputError: inversion is not defined for this family.
        ValueError: eta is above 0 and there is no noise.
    """
    settings = Inversion(steps, renoise, eta)
    if not isinstance(backbone, Invertible):
        raise InputError(f"{type(backbone).__name__}: {NO_INVERSION}")
    if eta and noise is None:
        raise ValueError("fresh noise (eta above 0) needs the random numbers `noise`")
    fresh = _fresh(noise, latents) if eta and noise is not None else None
    grid = backbone.rising_times(t, settings.steps)
    noisy = latents
    for now, later in pairwise(grid):
        predict = _predictor(backbone, backbone, denoiser, now, text)
        mean = predict(noisy)
        for count in range(1, renoise + 1):
            further = predict(backbone.ddim_step(noisy, mean, now, later))
            mean = mean + (further - mean) / (count + 1)
        noisy = backbone.ddim_step(noisy, mean, now, later)
        if fresh is not None:
            noisy = noisy + eta * _column(backbone.deviation_between(now, later), noisy) * next(fresh)
    return noisy, backbone.target(latents, backbone.noise_within(latents, noisy, t), t)


def _predictor(
    backbone: Backbone, family: Invertible, denoiser: nn.Module, now: Tensor, text: Text
) -> Callable[[Tensor], Tensor]:
    """Function from noisy latents at the times `now` to the noise that the network sees in them, float32."""

    def predict(noisy: Tensor) -> Tensor:
        prediction = backbone.predict(denoiser, noisy, family.network_time(now), text).float()
        return family.predicted_noise(prediction, noisy, now)

    return predict


def _column(values: Tensor, latents: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (latents.ndim - 1))


def _fresh(noise: Tensor, latents: Tensor) -> Iterator[Tensor]:
    """Yield standard normal noise for each step, each sample's from a generator seeded by its `noise`."""
    bits = noise.flatten(1)[:, :2].float().cpu().contiguous().view(torch.int64)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in bits.flatten().tolist()]
    while True:
        yield candidate_noise(generators, latents.shape[1:]).to(latents.device)
