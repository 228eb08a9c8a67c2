"""What only real weights can show: a few measurements of a model on this machine, each with a verdict and a remedy."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import matplotlib.cbook
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from capo.backbones import Backbone
from capo.backbones.sampling import SamplerSettings, candidate_generators, sample
from capo.data.importing.images import pixels
from capo.runtime.files import write_whole

Known = Sequence[
    tuple[Image.Image, str]
]  # pictures of the kind that the model was trained on, and what they show
PLACES = (0.15, 0.3, 0.5, 0.7, 0.85)  # u of the times at which errors are looked at
DRAWS = 16  # noises a time, shared out over the known pictures
LEAST_PSNR = 22.0  # dB; published autoencoders reach 26-36 on photographs
DEVIATION = (0.6, 1.6)  # of scaled latents: the scaling factor is there to make it 1
RATIO = (0.002, 1.0)  # denoising error by that of the best multiple of the network's input
DECLARED = "what its scheduler says"
CLEAR = 2.0  # standard errors by which a caption must help


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, whether it is as it should be, what was found, what to do otherwise."""

    name: str
    passed: bool
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Denoising:
    """Errors of the base at one time.

    Attributes:
        time: u.
        ratio: error by that of the best multiple of the noisy latent, which a network that has learned anything beats.
        gains: (DRAWS,) error without caption minus error with it, same noise.
        nearest: of the things that a network may predict, the one that its output comes closest to; None where it is far from all.
    """

    time: float
    ratio: float
    gains: Tensor
    nearest: str | None


def photograph() -> Known:
    """A photograph in the public domain that matplotlib ships (Grace Hopper, United States Navy, 1984)."""
    path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    return [
        (
            Image.open(path).convert("RGB"),
            "a portrait photograph of an elderly woman in a navy uniform with glasses and a white cap",
        )
    ]


def pixels_of(known: Known, size: tuple[int, int]) -> Tensor:
    """Pictures, cut to the middle and resized to (height, width) -> (B, 3, H, W) in [-1, 1].

    The cut has fractions of a pixel, so that the shape is exact; that of an import (`capo.data.importing.images.picture`) has whole ones.
    """
    height, width = size
    parts = []
    for picture, _ in known:
        short = min(picture.width / width, picture.height / height)
        box = ((picture.width - short * width) / 2, (picture.height - short * height) / 2)
        part = picture.resize(
            (width, height), Image.Resampling.LANCZOS, (*box, box[0] + short * width, box[1] + short * height)
        )
        parts.append(part)
    return pixels(parts)


def check_vae(backbone: Backbone, known: Known) -> tuple[Check, Tensor]:
    """Known pictures there and back, and the size of their latents; also the latents (B, C, h, w)."""
    factor = backbone.pipeline.vae_scale_factor
    shown = pixels_of(known, tuple(factor * side for side in backbone.latent_shape[1:]))
    latents = torch.cat([backbone.encode_images(part) for part in shown.split(1)]).float().cpu()
    pictures = [(picture, "") for picture in backbone.decode(latents, batch=1)]
    error = (pixels_of(pictures, shown.shape[2:]) - shown).square().mean().item()
    psnr, deviation = 10 * math.log10(4 / max(error, 1e-9)), latents.std().item()
    passed = bool(psnr >= LEAST_PSNR and DEVIATION[0] <= deviation <= DEVIATION[1])  # NaN passes neither
    remedy = (
        "the VAE's files are not those of the model: get vae/ again, or name another model.backbone.vae"
        if not psnr >= LEAST_PSNR
        else "scaling_factor or shift_factor in vae/config.json is not this VAE's: latents should have a deviation of about 1"
    )
    found = f"{psnr:.1f} dB (at least {LEAST_PSNR:g}), latents' deviation {deviation:.2f} ({DEVIATION[0]:g}-{DEVIATION[1]:g})"
    return Check("VAE round trip", passed, found, "" if passed else remedy), latents


def denoising_at(
    backbone: Backbone, latents: Tensor, captions: Sequence[str], place: float, batch: int
) -> Denoising:
    """Errors of the base at the time u = `place`, on latents (B, C, h, w) of known pictures, `batch` at a time."""
    draw = torch.Generator().manual_seed(round(1000 * place))
    rows = torch.arange(DRAWS) % len(latents)
    x = latents[rows]
    noise = torch.randn(x.shape, generator=draw)
    t = backbone.timesteps(torch.full((DRAWS,), place), "uniform")
    noisy, target = backbone.add_noise(x, noise, t), backbone.target(x, noise, t)
    text, empty = backbone.encode_prompts(list(captions)), backbone.unconditional(1)
    told, untold = [], []
    for part in torch.arange(DRAWS).split(batch):
        predict = partial(_predict, backbone, noisy[part], t[part])
        told.append(predict({key: value[rows[part].to(value.device)] for key, value in text.items()}))
        untold.append(
            predict({key: value.expand(len(part), *value.shape[1:]) for key, value in empty.items()})
        )
    told, untold = torch.cat(told), torch.cat(untold)
    scale = (target * noisy).sum() / noisy.square().sum()
    return Denoising(
        place,
        ((told - target).square().mean() / (target - scale * noisy).square().mean()).item(),
        (untold - target).square().mean((1, 2, 3)) - (told - target).square().mean((1, 2, 3)),
        _nearest(told, possible_targets(x, noise, backbone.log_snr(t)) | {DECLARED: target}),
    )


def _nearest(told: Tensor, targets: dict[str, Tensor]) -> str | None:
    """The target that explains more than half of itself, and the most."""
    misses = {
        name: ((told - target).square().mean() / target.square().mean()).item()
        for name, target in targets.items()
    }
    best = min(misses, key=lambda name: misses[name] if misses[name] == misses[name] else math.inf)
    return best if misses[best] < 0.5 else None


@torch.inference_mode()
def _predict(backbone: Backbone, noisy: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
    text = {key: value.to(backbone.device) for key, value in text.items()}
    return (
        backbone.predict(backbone.denoiser, noisy.to(backbone.device), t.to(backbone.device), text)
        .float()
        .cpu()
    )


def possible_targets(x: Tensor, noise: Tensor, log_snr: Tensor) -> dict[str, Tensor]:
    """What networks are trained to predict of x and noise (B, C, H, W): by name, (B, C, H, W)."""
    shape = (-1, 1, 1, 1)
    alpha, sigma = log_snr.sigmoid().sqrt().view(shape), (-log_snr).sigmoid().sqrt().view(shape)
    return {
        "the noise": noise,
        "the image": x,
        "v": alpha * noise - sigma * x,
        "a flow's velocity": noise - x,
    }


def check_denoising(found: Sequence[Denoising]) -> Check:
    """Whether the base denoises known pictures, at every time, and their captions help."""
    told = ", ".join(f"u {at.time:g}: {at.ratio:.2f}" for at in found)
    gains = torch.cat([at.gains for at in found])
    clear = (gains.mean() / (gains.std() / len(gains) ** 0.5)).item()
    told = f"error / best multiple of the input ({RATIO[0]:g}-{RATIO[1]:g}): {told}; the caption helps by {clear:.1f} standard errors (at least {CLEAR:g})"
    remedy = ""
    middle = found[len(found) // 2]
    if not all(RATIO[0] < at.ratio < RATIO[1] for at in found):
        remedy = "the denoiser does not fit these latents or this schedule: compare scaling_factor and the scheduler's config with the model's"
        if middle.nearest not in (DECLARED, None):
            remedy = f"the denoiser predicts {middle.nearest}, not {DECLARED}: use the scheduler config of these weights"
    elif not clear >= CLEAR:
        remedy = "the text that the denoiser gets is not what it was trained with: are text_encoder and text_encoder_2, or the tokenizers, exchanged?"
    return Check("denoising error", not remedy, told, remedy)


def check_sample(backbone: Backbone, prompt: str, settings: SamplerSettings, path: Path) -> Check:
    """One picture of `prompt`, written to `path`."""
    generators = candidate_generators([0])
    noise = torch.randn((1, *backbone.latent_shape), generator=generators[0])
    latent = sample(
        backbone, backbone.denoiser, backbone.encode_prompts([prompt]), noise, settings, generators=generators
    )
    finite = bool(latent.isfinite().all())
    largest = latent.abs().max().item()
    if finite:
        path.parent.mkdir(parents=True, exist_ok=True)
        backbone.decode(latent)[0].save(path)
    found = f'"{prompt}" in {path}, largest latent {largest:.1f}' if finite else "a latent that is not finite"
    return Check(
        "sample", finite, found, "" if finite else "sample in another precision (sampling.precision=32-true)"
    )


def check_table(checks: Sequence[Check]) -> Table:
    """The findings for a console."""
    table = Table("check", "", "found", "what to do", title="check", title_justify="left", show_lines=True)
    for check in checks:
        table.add_row(
            check.name, "[green]passed" if check.passed else "[red]failed", check.found, check.remedy
        )
    return table


def write_checks(checks: Sequence[Check], path: Path) -> None:
    """`check.json`: the findings, to be sent along with a question."""
    write_whole(path, json.dumps([asdict(check) for check in checks], indent=2) + "\n")
