"""Autoencoder of `shapes_mmdit`: 64 x 64 pixels to 8 x 8 x 8 latents, in the form of SD3's.

Its decoder draws the outlines, so the 64 tokens, one for each latent, need to say only what is where. On the
latents of `shapes_unet`, four times as many, a transformer of this size does not learn outlines in the steps
that a UNet needs (docs/shapes.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from capo.backbones.latents import from_denoiser, to_denoiser
from capo.backbones.models import Autoencoder
from capo.shapes.make import autoencoder
from capo.shapes.make.autoencoder import difference, encoded, fit_both, to_tensor, untrained, weight_and_bias
from capo.shapes.make.fitting import fit, generator

CHANNELS = 8
FOLDER = "flow_autoencoder"
SHIPPED = Path(__file__).parents[1] / "weights" / "mmdit" / "vae"
JITTER = 0.03  # noise on the latents, of variance 1, for training the decoder: sampled latents are not exact


def build() -> Autoencoder:
    """Build an untrained autoencoder of diffusers' class: factor 8, no 1 x 1 convolutions."""
    return untrained(
        (16, 24, 48, 96), CHANNELS, use_quant_conv=False, use_post_quant_conv=False, force_upcast=False
    )


def deepened(shallow: Autoencoder) -> Autoencoder:
    """Build an autoencoder of factor 8 with the outer levels of one of factor 4; inner ones are untrained."""
    deep = build()
    state = deep.state_dict()
    for name, tensor in shallow.state_dict().items():
        # upper blocks are counted from the innermost, and the deep autoencoder has one more
        level, block, rest = name.partition(".up_blocks.")
        if block:
            number, _, rest = rest.partition(".")
            name = f"{level}{block}{int(number) + 1}.{rest}"
        inner = ("encoder.mid", "encoder.conv_norm_out", "encoder.conv_out", "decoder.mid", "decoder.conv_in")
        if name in state and state[name].shape == tensor.shape and not name.startswith(inner):
            state[name].copy_(tensor)
    deep.load_state_dict(state)
    return deep


def train(work: Path, steps: int, seed: int = 0) -> None:
    """Train on the scenes in `work` and save the autoencoder there, under FOLDER.

    Two thirds of the steps train both parts; then the latents are scaled and the decoder alone is trained on
    them, with noise.
    """
    torch.manual_seed(seed)
    scenes = np.load(work / "scenes.npy", mmap_mode="r")
    both = fit_both(
        "flow_autoencoder",
        deepened(autoencoder.trained(work)),
        work,
        2 * steps // 3,
        seed + 5,
        divergence=1e-6,
    )
    vae = scaled(both, to_tensor(scenes[:2000]))
    latents = encode_all(work, vae)
    vae.encoder.requires_grad_(False)

    def loss(step: int):
        draw = generator(seed, 9, step)
        rows = torch.randint(len(latents), (16,), generator=draw).numpy()
        z = torch.from_numpy(latents[rows])
        z = z + JITTER * torch.randn(z.shape, generator=draw)
        return difference(vae.decode(from_denoiser(vae, z)).sample, to_tensor(scenes[rows]))

    vae = vae.to(memory_format=torch.channels_last)
    fit("flow_decoder", vae, loss, work, steps // 3, lr=7e-4).to(
        memory_format=torch.contiguous_format
    ).save_pretrained(work / FOLDER)


def load(work: Path) -> Autoencoder:
    """Load the autoencoder trained in `work`, or else the shipped one, in eval mode.

    Its config has no trace of the folder.
    """
    own = work / FOLDER
    return autoencoder.from_folder(own if own.exists() else SHIPPED)


@torch.no_grad()
def scaled(vae: Autoencoder, pictures: Tensor) -> Autoencoder:
    """Equalize the latent channels of an autoencoder, in place, as measured on pictures (B, 3, 64, 64).

    The channels' common mean and deviation become `shift_factor` and `scaling_factor` in the config.
    Differences between channels are folded into the convolutions before and after the latents, which is
    exact except for the bias at the picture's border.
    """
    means = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(100)])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    middle, spread = mean.mean(), std.mean()
    grown = spread / std
    weight, bias = weight_and_bias(cast(Any, vae.encoder).conv_out)
    weight[:CHANNELS] *= grown[:, None, None, None]
    bias[:CHANNELS] = (bias[:CHANNELS] - mean) * grown + middle
    bias[CHANNELS:] += 2 * grown.log()  # the posterior's log variances
    weight, bias = weight_and_bias(cast(Any, vae.decoder).conv_in)
    bias += torch.einsum("oihw,i->o", weight, mean - middle / grown)
    weight /= grown[None, :, None, None]
    vae.register_to_config(scaling_factor=1 / spread.item(), shift_factor=middle.item())
    return vae


def encode_all(work: Path, vae: Autoencoder) -> np.ndarray:
    """Return latents (count, 8, 8, 8) float32 of all scenes in `work`, scaled for the denoiser, cached."""
    raw = torch.from_numpy(encoded(work, "flow_latents", lambda: vae).astype(np.float32))
    return to_denoiser(vae, raw).numpy()
