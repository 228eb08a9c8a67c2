"""The autoencoder of the shapes world: 64 x 64 pixels to 4 x 16 x 16 latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from capo.shapes.make.fitting import fit, generator


def build() -> AutoencoderKL:
    """A fresh autoencoder in diffusers' own class."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 24, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pictures.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1


def _edges(x: Tensor) -> Tensor:
    return torch.cat([x.diff(dim=-1).flatten(1), x.diff(dim=-2).flatten(1)], dim=1)


def train(work: Path, steps: int, batch: int = 8, seed: int = 0) -> AutoencoderKL:
    """Fit on the scenes in `work`: squared and absolute error, absolute error of the gradients, a little KL."""
    torch.manual_seed(seed)
    scenes = np.load(work / "scenes.npy", mmap_mode="r")
    module = build().to(memory_format=torch.channels_last)

    def loss(step: int):
        draw = generator(seed, 1, step)
        x = to_tensor(scenes[torch.randint(len(scenes), (batch,), generator=draw).numpy()])
        x = x.contiguous(memory_format=torch.channels_last)
        posterior = module.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=draw)
        y = module.decode(z).sample
        squared = F.mse_loss(y, x)
        value = squared + 0.05 * F.l1_loss(y, x) + 0.05 * (_edges(y) - _edges(x)).abs().mean()
        return value + 1e-6 * posterior.kl().mean(), {"psnr": 10 * np.log10(4 / squared.item())}

    return fit("autoencoder", module, loss, work, steps, lr=1e-3)


@torch.inference_mode()
def encode_all(vae: AutoencoderKL, work: Path, batch: int = 100) -> tuple[np.ndarray, float]:
    """Latent means of all scenes, (count, 4, 16, 16) float16, unscaled, and 1 / their standard deviation."""
    path = work / "latents.npy"
    if not path.exists():
        scenes = np.load(work / "scenes.npy", mmap_mode="r")
        parts = [vae.encode(to_tensor(scenes[i : i + batch])).latent_dist.mean.half().numpy() for i in range(0, len(scenes), batch)]
        np.save(work / "latents.part.npy", np.concatenate(parts))
        (work / "latents.part.npy").rename(path)
    latents = np.load(path)
    return latents, float(1 / latents.astype(np.float32).std())
