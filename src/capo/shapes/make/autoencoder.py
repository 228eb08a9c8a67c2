"""Autoencoder of `shapes_unet`: 64 x 64 pixels to 8 x 16 x 16 latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from capo.backbones.models import Autoencoder
from capo.shapes.make.fitting import fit, generator

SHIPPED = Path(__file__).parents[1] / "weights" / "unet" / "vae"


def build(channels: int = 8) -> Autoencoder:
    """Build an untrained autoencoder of diffusers' class."""
    return untrained((16, 24, 48), channels)


def untrained(widths: tuple[int, ...], channels: int, **options: Any) -> Autoencoder:
    """Build an autoencoder for 64 x 64 pixels: one block of each width, `channels` latent channels.

    `options` are more arguments of diffusers' class.
    """
    kind = cast(Any, AutoencoderKL)  # diffusers annotates the tuples as having one entry each
    return kind(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        **options,
    )


def weight_and_bias(convolution: Any) -> tuple[Tensor, Tensor]:
    """Return the parameters of a convolution with a bias.

    Attributes of a module and biases in general have wider types, which are narrowed here.
    """
    return convolution.weight, convolution.bias


def to_tensor(pictures: np.ndarray) -> Tensor:
    """Convert pictures (B, H, W, 3) uint8 to (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pictures.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1


def difference(y: Tensor, x: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of pictures `y` against `x`, both (B, 3, H, W) in [-1, 1], and the PSNR in dB.

    The loss adds the squared error, the absolute error, and the absolute error of the image gradients.
    """
    squared = F.mse_loss(y, x)
    value = squared + 0.05 * F.l1_loss(y, x) + 0.05 * (_edges(y) - _edges(x)).abs().mean()
    return value, {"psnr": 10 * np.log10(4 / squared.item())}


def _edges(x: Tensor) -> Tensor:
    return torch.cat([x.diff(dim=-1).flatten(1), x.diff(dim=-2).flatten(1)], dim=1)


def train(work: Path, steps: int, seed: int = 0) -> Autoencoder:
    """Train on the scenes in `work`: two thirds of the steps with 4 latent channels, the rest widened to 8.

    With 4 channels and this KL weight, one channel stays unused and fine textures are lost. Eight channels
    initialized from these four train faster than from random weights.
    """
    torch.manual_seed(seed)
    narrow = fit_both("autoencoder4", build(4), work, 2 * steps // 3, seed, divergence=1e-6)
    return fit_both("autoencoder", widened(narrow), work, steps // 3, seed + 1, divergence=2e-8)


def widened(narrow: Autoencoder) -> Autoencoder:
    """Widen an autoencoder from 4 to 8 latent channels: old weights are kept, new ones small and random."""
    wide = build(8)
    state = wide.state_dict()
    for name, old in narrow.state_dict().items():
        new = state[name]
        if new.shape == old.shape:
            new.copy_(old)
            continue
        new.mul_(0.3)
        moments = new.shape[0] == 16  # means of 8 channels, then their log variances
        rows = (
            [*range(4), *range(8, 12)]
            if moments
            else list(range(4))
            if new.shape[0] == 8
            else list(range(new.shape[0]))
        )
        if new.ndim == 1:
            new[rows] = old
        else:
            columns = {16: [*range(4), *range(8, 12)], 8: list(range(4))}.get(
                new.shape[1], list(range(new.shape[1]))
            )
            new[torch.tensor(rows)[:, None], torch.tensor(columns)[None]] = old
    wide.load_state_dict(state)
    return wide


def fit_both(
    name: str, module: Autoencoder, work: Path, steps: int, seed: int, divergence: float, batch: int = 8
) -> Autoencoder:
    """Train encoder and decoder on the scenes in `work`: `difference`, plus the posterior's KL divergence.

    `divergence` is the weight of the latter; state and log are saved under `name`, as `fit` does.
    """
    scenes = np.load(work / "scenes.npy", mmap_mode="r")
    module = module.to(memory_format=torch.channels_last)

    def loss(step: int):
        draw = generator(seed, 1, step)
        x = to_tensor(scenes[torch.randint(len(scenes), (batch,), generator=draw).numpy()])
        x = x.contiguous(memory_format=torch.channels_last)
        posterior = module.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=draw)
        y = module.decode(z).sample
        value, figures = difference(y, x)
        return value + divergence * posterior.kl().mean(), figures

    return fit(name, module, loss, work, steps, lr=1e-3)


@torch.no_grad()
def whitened(vae: Autoencoder, pictures: Tensor) -> Autoencoder:
    """Normalize the latents of an autoencoder, in place, to mean 0 and variance 1 in each channel.

    They are measured on pictures (B, 3, 64, 64). Trained channels differ in scale by a factor of eight,
    which a single scaling factor cannot correct, so the affine map is folded into the two 1 x 1
    convolutions at the bottleneck.
    """
    means = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(100)])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    channels = len(mean)
    weight, bias = weight_and_bias(vae.quant_conv)
    weight[:channels] /= std[:, None, None, None]
    bias[:channels] = (bias[:channels] - mean) / std
    bias[channels:] -= 2 * std.log()  # the posterior's log variances
    weight, bias = weight_and_bias(vae.post_quant_conv)
    bias += weight[:, :, 0, 0] @ mean
    weight *= std[None, :, None, None]
    return vae


def trained(work: Path) -> Autoencoder:
    """Load the trained autoencoder from `work`, not whitened, in eval mode."""
    vae = build()
    vae.load_state_dict(torch.load(work / "autoencoder.pt", weights_only=True)["module"])
    return vae.eval()


def load(work: Path) -> Autoencoder:
    """Load the autoencoder trained in `work`, whitened on the first 2000 scenes, or else the shipped one."""
    if not (work / "autoencoder.pt").exists():
        return from_folder(SHIPPED)
    scenes = np.load(work / "scenes.npy", mmap_mode="r")
    return whitened(trained(work), to_tensor(scenes[:2000]))


def from_folder(folder: Path) -> Autoencoder:
    """Load the autoencoder of a folder, in eval mode, with no trace of the folder in its config."""
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    plain = cast(Autoencoder, AutoencoderKL.from_config(config))
    plain.load_state_dict(vae.state_dict())
    return plain.eval()


def encode_all(work: Path) -> np.ndarray:
    """Return latents (count, 8, 16, 16) float16 of all scenes in `work`, which are encoded only once."""
    return encoded(work, "latents", lambda: load(work))


@torch.inference_mode()
def encoded(work: Path, name: str, load_vae: Callable[[], Autoencoder], batch: int = 100) -> np.ndarray:
    """Return posterior means (count, C, h, w) float16 of all scenes in `work`, cached there under `name`.

    `load_vae` is called only if they are not cached yet.
    """
    path = work / f"{name}.npy"
    if not path.exists():
        vae, scenes = load_vae(), np.load(work / "scenes.npy", mmap_mode="r")
        starts = tqdm(range(0, len(scenes), batch), name, mininterval=5)
        parts = [vae.encode(to_tensor(scenes[i : i + batch])).latent_dist.mean.half().numpy() for i in starts]
        np.save(work / f"{name}.part.npy", np.concatenate(parts))
        (work / f"{name}.part.npy").rename(path)
    return np.load(path, mmap_mode="r")
