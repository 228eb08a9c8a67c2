"""Check a reward here: score three bundled images with two prompts each, and compare with records."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from capo.errors import DamagedFile, InputError
from capo.rewards import Reward
from capo.runtime.files import write_json
from capo.runtime.reading import read_json

SIDE = 512  # pixels to which the bundled images, of 64 pixels, are enlarged for a reward
PROMPTS = {  # bundled image -> its prompt
    "star": "a yellow star on a black background",
    "hearts": "two red hearts on a white background",
    "circles": "three blue circles on a white background",
}
# Absolute for scores up to 1, relative above; in float32 another batch size or device changes scores by less.
TOLERANCE = 1e-3
SCHEMA = 1  # version of the golden files' format
LIBRARIES = ("torch", "transformers", "pillow", "capo")
PASSED, WARNING, FAILED = "passed", "warning", "failed"
SHORTEST = 1.0  # least seconds over which speed is measured


@dataclass(frozen=True)
class Finding:
    """Result of one check: its name, PASSED, WARNING or FAILED, what was found, and the remedy."""

    name: str
    outcome: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Measured:
    """Scores and costs of a reward.

    Attributes:
        scores: (3, 2) scores of each image with its own prompt and with another image's, in one batch.
        alone: (3, 2) the same, each image in its own batch.
        turned: (3, 2) the same, in one batch in reverse order.
        speed: images per second.
        memory: peak memory in words.
    """

    scores: Tensor
    alone: Tensor
    turned: Tensor
    speed: float
    memory: str


def pairs(side: int = SIDE) -> tuple[list[Image.Image], list[str]]:
    """Return six images of `side` pixels and prompts: each image with its own prompt, then the next one's."""
    names = list(PROMPTS)
    images, prompts = [], []
    for number, name in enumerate(names):
        with (
            files("capo.rewards").joinpath("pictures", f"{name}.png").open("rb") as file,
            Image.open(file) as picture,
        ):
            image = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        images += [image, image]
        prompts += [PROMPTS[name], PROMPTS[names[(number + 1) % len(names)]]]
    return images, prompts


def measure(reward: Reward, device: torch.device) -> Measured:
    """Build the reward on `device`, score the bundled images, and free the device.

    Raises InputError as `Reward.setup` and `Reward.score` do.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    reward.setup(device)
    try:
        return _measured(reward, device)
    finally:
        reward.offload()  # so that it does not count in the peak memory of the next reward


def _measured(reward: Reward, device: torch.device) -> Measured:
    images, prompts = pairs(reward.side or SIDE)
    scores = reward.score(images, prompts)
    alone = torch.cat(
        [reward.score([image], [prompt]) for image, prompt in zip(images, prompts, strict=True)]
    )
    turned = reward.score(images[::-1], prompts[::-1]).flip(0)
    begun, count = time.perf_counter(), 0
    while not count or time.perf_counter() - begun < SHORTEST:
        reward.score(images, prompts)
        count += len(images)
    speed = count / (time.perf_counter() - begun)
    return Measured(scores.view(-1, 2), alone.view(-1, 2), turned.view(-1, 2), speed, _peak(reward, device))


def _peak(reward: Reward, device: torch.device) -> str:
    if reward.python or reward.isolated:
        return "not known: it runs in another process"
    if device.type == "cuda":
        return (
            f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB of {torch.cuda.get_device_name(device)}"
        )
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return f"{kilobytes * 1024 / 1e9:.2f} GB of this process, Python and libraries included"


def findings(
    reward: Reward, measured: Measured, golden: Mapping | None, tolerance: float = TOLERANCE
) -> list[Finding]:
    """Judge the scores of a reward.

    Args:
        reward: the reward.
        measured: its scores.
        golden: the record of the same fingerprint; None: there is none.
        tolerance: largest difference between equal scores, relative for scores above 1.
    """
    return [
        _range(reward, measured.scores),
        _order(measured.scores) if reward.needs_prompt else _blindness(measured.scores, tolerance),
        _independence(measured, tolerance),
        _recorded(measured.scores, golden, tolerance),
    ]


def _range(reward: Reward, scores: Tensor) -> Finding:
    low, high = scores.min().item(), scores.max().item()
    found = f"{low:.4g} to {high:.4g}"
    if not reward.range:
        return Finding("range", PASSED, f"{found}; no range is declared")
    least, most = reward.range
    if least <= low and high <= most:
        return Finding("range", PASSED, f"{found}, within {least:g} to {most:g}")
    return Finding(
        "range",
        WARNING,
        f"{found}, outside of the usual {least:g} to {most:g}",
        "simple drawings may score unusually; far outside, compare weights, processor and precision with "
        "what was published",
    )


def _order(scores: Tensor) -> Finding:
    wrong = [name for name, (own, other) in zip(PROMPTS, scores.tolist(), strict=True) if not own > other]
    if not wrong:
        return Finding("order", PASSED, "each image's own prompt scores higher than another's")
    return Finding(
        "order",
        FAILED,
        f"{', '.join(wrong)}: another image's prompt scores as high or higher",
        "weights, tokenizer or image processor are not the model's, or the score is better when lower "
        "(negate it)",
    )


def _blindness(scores: Tensor, tolerance: float) -> Finding:
    if _near(scores[:, 0], scores[:, 1], tolerance):
        return Finding("prompt", PASSED, "not read: both prompts give the same score")
    return Finding(
        "prompt",
        FAILED,
        f"scores move with the prompt, by up to {_gap(scores[:, 0], scores[:, 1]):.3g}",
        "set needs_prompt: true in its yaml",
    )


def _independence(measured: Measured, tolerance: float) -> Finding:
    for name, other in {"alone": measured.alone, "in reverse order": measured.turned}.items():
        if not _near(measured.scores, other, tolerance):
            return Finding(
                "batch",
                FAILED,
                f"an image scores differently {name}, by up to {_gap(measured.scores, other):.3g}",
                "a score must be its own image's and prompt's: look for maxima, means or padding over the "
                "batch, and for layers in training mode; half precision may need a larger --tolerance",
            )
    return Finding("batch", PASSED, "each image scores the same alone, in a batch and in reverse order")


def _recorded(scores: Tensor, golden: Mapping | None, tolerance: float) -> Finding:
    if golden is None:
        return Finding(
            "recorded scores",
            PASSED,
            "none for this fingerprint: not compared",
            "if you trust these scores, --record keeps them",
        )
    before = torch.tensor(golden["scores"])
    made = (
        f"recorded on {golden['device']} with "
        f"{', '.join(f'{name} {number}' for name, number in golden['versions'].items())}"
    )
    if _near(scores, before, tolerance):
        return Finding("recorded scores", PASSED, f"the same ({made})")
    row, column = divmod(int((scores - before).abs().argmax()), 2)
    return Finding(
        "recorded scores",
        FAILED,
        f"{list(PROMPTS)[row]}, prompt {column + 1}: {scores[row, column]:.5g}, recorded "
        f"{before[row, column]:.5g} ({made})",
        "weights are the same, so a library's preprocessing or arithmetic is not: compare the versions; "
        "--record replaces them",
    )


def _gap(scores: Tensor, others: Tensor) -> float:
    return (scores - others).abs().max().item()


def _near(scores: Tensor, others: Tensor, tolerance: float) -> bool:
    return bool(((scores - others).abs() <= tolerance * others.abs().clamp(min=1)).all())


def golden_places(name: str, given: Path | None) -> list[Path]:
    """List where records are searched: `given` alone, else `golden/NAME.json` here, then the package's."""
    return (
        [given]
        if given
        else [Path("golden") / f"{name}.json", Path(str(files("capo.rewards"))) / "golden" / f"{name}.json"]
    )


def read_golden(places: Sequence[Path], reward: Reward) -> dict | None:
    """Return the first record of the reward's fingerprint, or None.

    Raises InputError for a place that holds no record, or one of another reward.
    """
    remedy = "remove it, or name another file: --golden FILE"
    for path in places:
        if not path.exists():
            continue
        if not path.is_file():
            raise InputError(f"{path} is no file; {remedy}")
        try:
            found = read_json(path, remedy)
            same, name = found["fingerprint"] == reward.fingerprint, found.get("name", reward.name)
            if not same and name != reward.name:
                raise InputError(f"{path} holds scores of the reward {name}, not of {reward.name}; {remedy}")
            if (
                found["schema"] == SCHEMA
                and same
                and torch.tensor(found["scores"]).shape == (len(PROMPTS), 2)
            ):
                return {key: found[key] for key in ("scores", "device", "versions")}
        except DamagedFile:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} holds no recorded scores ({error!r}); {remedy}") from error
    return None


def write_golden(path: Path, reward: Reward, scores: Tensor, device: torch.device) -> None:
    """Write a record of scores with the reward's fingerprint, prompts, device and library versions."""
    record = {
        "schema": SCHEMA,
        "name": reward.name,
        "fingerprint": reward.fingerprint,
        "device": device_name(device),
        "versions": {name: version(name) for name in LIBRARIES},
        "prompts": PROMPTS,
        "scores": scores.tolist(),
    }
    write_json(path, record)


def device_name(device: torch.device) -> str:
    """Return `cpu`, or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
