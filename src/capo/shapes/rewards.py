"""Learned rewards of the shapes world: small networks that score a picture and err as real reward models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from capo.errors import InputError
from capo.rewards.weights import read_state, taking_weights
from capo.shapes.captions import WORDS
from capo.shapes.reward_networks import LENGTH, PAD, Judge, Rater, Reader, Verifier
from capo.shapes.scenes import SIDE

_IDS = {word: index + 1 for index, word in enumerate(WORDS)}


def tokens(prompts: Sequence[str]) -> Tensor:
    """Convert prompts to word ids (B, LENGTH), 0 after the last word.

    Raises InputError for a word outside the vocabulary and for a prompt with too many words.
    """
    ids = torch.full((len(prompts), LENGTH), PAD)
    for row, prompt in zip(ids, prompts, strict=True):
        words = re.findall(r"[^\s,]+|,", prompt)
        if foreign := [word for word in words if word not in _IDS]:
            raise InputError(
                f"prompt {prompt!r}: the rewards of the shapes world know no word {foreign[0]!r}; use the "
                "grammar of docs/shapes.md, or rewards that go with other prompts"
            )
        if len(words) > LENGTH:
            raise InputError(
                f"prompt {prompt!r}: {len(words)} words; the rewards of the shapes world read {LENGTH}"
            )
        row[: len(words)] = torch.tensor([_IDS[word] for word in words], dtype=torch.long)
    return ids


def to_pixels(images: Sequence[Image]) -> Tensor:
    """Convert images to (B, 3, 64, 64) float32 in [-1, 1]; raise InputError for another size."""
    for index, image in enumerate(images):
        if image.size != (SIDE, SIDE):
            raise InputError(
                f"image {index} has {image.size} pixels; the rewards of the shapes world judge {SIDE} x "
                f"{SIDE}: choose rewards that go with the model"
            )
    stack = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    return stack.permute(0, 3, 1, 2).float() / 127.5 - 1


def fused(module: nn.Module) -> nn.Module:
    """Fold batch normalizations into the convolutions before them; return the frozen network in eval mode."""
    module.eval()
    for sequence in [part for part in module.modules() if isinstance(part, nn.Sequential)]:
        for index, part in enumerate(sequence):
            if isinstance(part, nn.BatchNorm2d):
                sequence[index - 1] = fuse_conv_bn_eval(cast(nn.Conv2d, sequence[index - 1]), part)
                sequence[index] = nn.Identity()
    module.requires_grad_(False)
    return cast(Any, module).to(memory_format=torch.channels_last)  # an argument without annotations in torch


def take_weights(network: nn.Module, weights: str | Path, setting: str, name: str) -> None:
    """Load the weights of a reward's file, which are stored in float16, into its network in float32.

    Args:
        network: the network.
        weights: the file.
        setting: configuration key, or option, that gave the file.
        name: name of the reward.

    Raises:
        InputError: the file is damaged, or holds the weights of another network.
    """
    stored = read_state(Path(weights), setting)
    state = {name: value.float() if value.is_floating_point() else value for name, value in stored.items()}
    with taking_weights(weights, setting, f"{name}.safetensors, which comes with the package"):
        network.load_state_dict(state)


class _Scorer:
    """Network with weights from a safetensors file, stored in float16 and run in float32."""

    network: type[nn.Module]
    name: str  # of the reward
    side = SIDE  # pixels per side of the images

    def __init__(self, weights: str | Path):
        setting = f"rewards.{self.name}.weights"
        if not Path(weights).is_file():
            raise InputError(
                f"{setting}={weights}: no such file; leave it out for those that come with the package, or "
                "make some with `python -m capo.shapes.make rewards`"
            )
        network = self.network()
        take_weights(network, weights, setting, self.name)
        self.module = fused(network)
        self.device = torch.device("cpu")

    def to(self, device: str | torch.device) -> _Scorer:
        """Move the network to `device`."""
        self.device = torch.device(device)
        self.module.to(self.device)
        return self

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Return raw scores (B,) float32 on the CPU; each depends on its own image and prompt only."""
        return self.module(to_pixels(images).to(self.device), *self._read(prompts)).float().cpu()

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise InputError for a prompt that the network cannot read."""
        self._read(prompts)

    def _read(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """What the network gets beside the pixels: word ids."""
        return (tokens(prompts).to(self.device),)


class _Reading(_Scorer):
    @torch.inference_mode()
    def features(self, images: Sequence[Image]) -> Tensor:
        """Return vectors (B, 2 WIDTH): mean and maximum over the cells of the network's image encoder."""
        eye = cast(Reader, self.module).eye
        cells = eye(to_pixels(images).to(self.device))
        return torch.cat([cells.mean(1), cells.amax(1)], dim=1).cpu()


class AlignmentScorer(_Reading):
    """Probability that the picture shows what the prompt says, like VQAScore."""

    network, name = Verifier, "alignment"


class PreferenceScorer(_Reading):
    """Preference of the simulated annotators, like MPS: unbounded; differences are log-odds."""

    network, name = Judge, "preference"


class LooksScorer(_Scorer):
    """Looks of the picture from 1 to 10, independent of the prompt, like VILA."""

    network, name = Rater, "looks"

    def _read(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        return ()
