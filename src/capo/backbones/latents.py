"""Conversion between a VAE's raw latents and the denoiser's scale, in diffusers' order of operations."""

import torch
from torch import Tensor

from capo.backbones.models import Autoencoder


def from_denoiser(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Convert latents (B, C, h, w) from the denoiser's scale to raw ones, which the VAE decodes."""
    config = vae.config
    if statistics := _statistics(vae, latents):
        return latents * statistics[1] / config.scaling_factor + statistics[0]
    latents = latents / config.scaling_factor
    shift = config.get("shift_factor")
    return latents + shift if shift else latents


def to_denoiser(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Convert raw latents (B, C, h, w), as the VAE encodes them, to the denoiser's scale."""
    config = vae.config
    if statistics := _statistics(vae, latents):
        return (latents - statistics[0]) * config.scaling_factor / statistics[1]
    return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor


def _statistics(vae: Autoencoder, latents: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return mean and standard deviation per channel, (1, C, 1, 1) each, or None if the config has none."""
    mean, std = (vae.config.get(key) for key in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return None
    first, second = (torch.tensor(values, device=latents.device).view(1, -1, 1, 1) for values in (mean, std))
    return first, second
