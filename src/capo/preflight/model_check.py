"""Measure a model with its real weights on this machine; each check has a verdict and a remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import matplotlib.cbook
import torch
from PIL import Image
from rich.table import Table
from rich.text import Text
from torch import Tensor

from capo.backbones import Backbone
from capo.backbones.sampling import SamplerSettings, autocast, candidate_generators, sample
from capo.data.importing.images import pixels
from capo.errors import InputError
from capo.runtime.files import write_json

# Images like those that the model was trained on, with their captions.
Known = Sequence[tuple[Image.Image, str]]
PLACES = (0.15, 0.3, 0.5, 0.7, 0.85)  # u of the times at which errors are measured
DRAWS = 16  # noise samples per time, distributed over the known images
LEAST_PSNR = 22.0  # dB; published autoencoders reach 26-36 on photographs
DEVIATION = (0.6, 1.6)  # standard deviation of scaled latents; the scaling factor should make it 1
RATIO = (0.002, 1.0)  # denoising error relative to that of the best multiple of the network's input
DECLARED = "what its scheduler says"
CLEAR = 2.0  # standard errors by which a caption must reduce the error


@dataclass(frozen=True)
class Check:
    """Result of one check: its name, whether it passed, what was found, and the remedy if it failed."""

    name: str
    passed: bool
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Denoising:
    """Denoising errors of the base at one time.

    Attributes:
        time: the time as u in [0, 1).
        ratio: error divided by that of the best multiple of the noisy latent, which any trained network
            beats.
        gains: (DRAWS,) error without caption minus error with it, at the same noise.
        nearest: the possible target (noise, image, v, velocity) closest to the output; None if all are far.
    """

    time: float
    ratio: float
    gains: Tensor
    nearest: str | None


def check_known(source: str, known: object) -> None:
    """Raise InputError, beginning with `source`, unless it returned pictures with their captions."""
    pairs = list(known) if isinstance(known, Sequence) and not isinstance(known, str) else []
    kinds = [tuple(map(type, pair)) if isinstance(pair, Sequence) else () for pair in pairs]
    fine = [len(kind) == 2 and issubclass(kind[0], Image.Image) and kind[1] is str for kind in kinds]
    if not fine or not all(fine):
        raise InputError(
            f"{source} returned {' '.join(repr(known).split())[:200]}; it must return a list of one or more "
            "pairs (PIL image, caption)"
        )


def photograph() -> Known:
    """Return a photograph in the public domain, from matplotlib (Grace Hopper, United States Navy, 1984)."""
    path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    return [
        (
            Image.open(path).convert("RGB"),
            "a portrait photograph of an elderly woman in a navy uniform with glasses and a white cap",
        )
    ]


def pixels_of(known: Known, size: tuple[int, int]) -> Tensor:
    """Center-crop and resize images to (height, width), as pixels (B, 3, H, W) in [-1, 1].

    The crop box has fractions of a pixel, so that the aspect ratio is exact; imported images
    (`capo.data.importing.images.picture`) are cropped at whole pixels.
    """
    height, width = size
    parts = []
    for picture, _ in known:
        short = min(picture.width / width, picture.height / height)
        box = ((picture.width - short * width) / 2, (picture.height - short * height) / 2)
        part = picture.convert("RGB").resize(
            (width, height), Image.Resampling.LANCZOS, (*box, box[0] + short * width, box[1] + short * height)
        )
        parts.append(part)
    return pixels(parts)


def check_vae(backbone: Backbone, known: Known) -> tuple[Check, Tensor]:
    """Encode and decode known images, and check the PSNR and the scale of the latents.

    Returns the check and the latents (B, C, h, w), float32 on the CPU, in the denoiser's scale.
    """
    factor = backbone.pipeline.vae_scale_factor
    shown = pixels_of(known, tuple(factor * side for side in backbone.latent_shape[1:]))
    latents = torch.cat([backbone.encode_images(part) for part in shown.split(1)]).float().cpu()
    pictures = [(picture, "") for picture in backbone.decode(latents, batch=1)]
    height, width = shown.shape[2:]
    error = (pixels_of(pictures, (height, width)) - shown).square().mean().item()
    psnr, deviation = 10 * math.log10(4 / max(error, 1e-9)), latents.std().item()
    passed = bool(psnr >= LEAST_PSNR and DEVIATION[0] <= deviation <= DEVIATION[1])  # NaN passes neither
    remedy = (
        "the VAE's files are not those of the model: get vae/ again, or set another model.backbone.vae"
        if not psnr >= LEAST_PSNR
        else "scaling_factor or shift_factor in vae/config.json is not this VAE's: "
        "latents should have a deviation of about 1"
    )
    found = (
        f"{psnr:.1f} dB (at least {LEAST_PSNR:g}), latents' deviation {deviation:.2f} "
        f"({DEVIATION[0]:g}-{DEVIATION[1]:g})"
    )
    return Check("VAE round trip", passed, found, "" if passed else remedy), latents


def denoising_at(
    backbone: Backbone,
    latents: Tensor,
    captions: Sequence[str],
    place: float,
    batch: int,
    precision: str = "32-true",
) -> Denoising:
    """Measure the base's errors at the time u = `place` on latents (B, C, h, w) of known images.

    The noise is seeded by `place`; at most `batch` latents go through the denoiser at once, in `precision`,
    as when it draws.
    """
    draw = torch.Generator().manual_seed(round(1000 * place))
    rows = torch.arange(DRAWS) % len(latents)
    x = latents[rows]
    noise = torch.randn(x.shape, generator=draw)
    t = backbone.timesteps(torch.full((DRAWS,), place), "uniform")
    noisy, target = backbone.add_noise(x, noise, t), backbone.target(x, noise, t)
    text, empty = backbone.encode_prompts(list(captions)), backbone.unconditional(1)
    told, untold = [], []
    with backbone.placed(backbone.denoiser), autocast(precision, backbone.device):
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
    """Return the target with the smallest relative squared error, or None if that is 0.5 or more."""
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
    """Return {name: target (B, C, H, W)} for what networks may predict, from x and noise (B, C, H, W)."""
    shape = (-1, 1, 1, 1)
    alpha, sigma = log_snr.sigmoid().sqrt().view(shape), (-log_snr).sigmoid().sqrt().view(shape)
    return {
        "the noise": noise,
        "the image": x,
        "v": alpha * noise - sigma * x,
        "a flow's velocity": noise - x,
    }


def check_denoising(found: Sequence[Denoising]) -> Check:
    """Check that the base denoises known images at every time, and that their captions reduce the error."""
    told = ", ".join(f"u {at.time:g}: {at.ratio:.2f}" for at in found)
    gains = torch.cat([at.gains for at in found])
    clear = (gains.mean() / (gains.std() / len(gains) ** 0.5)).item()
    told = (
        f"error / best multiple of the input ({RATIO[0]:g}-{RATIO[1]:g}): {told}; "
        f"the caption helps by {clear:.1f} standard errors (at least {CLEAR:g})"
    )
    remedy = ""
    middle = found[len(found) // 2]
    if not all(RATIO[0] < at.ratio < RATIO[1] for at in found):
        remedy = (
            "the denoiser does not fit these latents or this schedule: "
            "compare scaling_factor and the scheduler's config with the model's"
        )
        if middle.nearest not in (DECLARED, None):
            remedy = (
                f"the denoiser predicts {middle.nearest}, not {DECLARED}: "
                "use the scheduler config of these weights"
            )
    elif not clear >= CLEAR:
        remedy = (
            "the text conditioning is not what the denoiser was trained with: "
            "are text_encoder and text_encoder_2, or the tokenizers, exchanged?"
        )
    return Check("denoising error", not remedy, told, remedy)


def check_sample(backbone: Backbone, prompt: str, settings: SamplerSettings, path: Path) -> Check:
    """Generate one image of `prompt`, write it to `path`, and check that its latent is finite."""
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
    """Lay out the results of checks as a table for the console."""
    table = Table("check", "", "found", "what to do", title="check", title_justify="left", show_lines=True)
    for check in checks:
        outcome = Text("passed", "green") if check.passed else Text("failed", "red")
        table.add_row(check.name, outcome, check.found, check.remedy)
    return table


def write_checks(checks: Sequence[Check], path: Path) -> None:
    """Write the results of checks as JSON (`check.json`), which can be attached to a bug report."""
    write_json(path, [asdict(check) for check in checks])
