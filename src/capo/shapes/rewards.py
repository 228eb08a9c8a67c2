"""The learned rewards of the shapes world: small networks that judge a picture, and err as real reward models
err.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from capo.errors import InputError
from capo.shapes.captions import WORDS
from capo.shapes.scenes import COLOURS, SHAPES, SIDE, TEXTURES

LENGTH = 17  # words of a prompt that are read; the longest sentence of the grammar has 16 with its commas
_PAD = 0
_IDS = {word: index + 1 for index, word in enumerate(WORDS)}
WIDTH = 80
CELLS = 8  # the eye sees a grid of 8 x 8 cells


def tokens(prompts: Sequence[str]) -> Tensor:
    """(B, LENGTH) word numbers, 0 after the last word. InputError for a word that is none of the shapes
    world's.
    """
    ids = torch.full((len(prompts), LENGTH), _PAD)
    for row, prompt in zip(ids, prompts):
        words = re.findall(r"[^\s,]+|,", prompt)
        if foreign := [word for word in words if word not in _IDS]:
            raise InputError(
                f"prompt {prompt!r}: the rewards of the shapes world know no word {foreign[0]!r}; use the grammar of "
                "docs/shapes.md, or rewards that go with other prompts"
            )
        if len(words) > LENGTH:
            raise InputError(
                f"prompt {prompt!r}: {len(words)} words; the rewards of the shapes world read {LENGTH}"
            )
        row[: len(words)] = torch.tensor([_IDS[word] for word in words], dtype=torch.long)
    return ids


def to_pixels(images: Sequence[Image]) -> Tensor:
    """(B, 3, 64, 64) float32 in [-1, 1]. InputError for an image of another size."""
    for index, image in enumerate(images):
        if image.size != (SIDE, SIDE):
            raise InputError(
                f"image {index} has {image.size} pixels; the rewards of the shapes world judge {SIDE} x {SIDE}: "
                "choose rewards that go with the model"
            )
    stack = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    return stack.permute(0, 3, 1, 2).float() / 127.5 - 1


def _convolution(inward: int, outward: int, side: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inward, outward, side, stride, side // 2, bias=False), nn.BatchNorm2d(outward), nn.ReLU()
    )


class Residual(nn.Module):
    """Two convolutions beside an identity."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            _convolution(width, width), nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class Eye(nn.Module):
    """(B, 3, 64, 64) -> a token for each of 8 x 8 cells, (B, 64, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(3, 24, 5, 2),
            _convolution(24, 48, 3, 2),
            Residual(48),
            _convolution(48, WIDTH, 3, 2),
            Residual(WIDTH),
        )
        self.place = nn.Parameter(0.02 * torch.randn(CELLS**2, WIDTH))
        # what stands in each cell (presence, shape or none of them, colour, texture, radius); read in
        # training only
        self.inventory = nn.Linear(WIDTH, 1 + len(SHAPES) + 1 + len(COLOURS) + 1 + len(TEXTURES) + 1)

    def forward(self, pixels: Tensor) -> Tensor:
        cells = self.body(pixels.contiguous(memory_format=torch.channels_last))
        return cells.flatten(2).transpose(1, 2) + self.place


class Attention(nn.Module):
    """Four heads of attention from `x` (B, n, WIDTH) to `seen` (B, m, WIDTH); `mask` (B, 1, 1, m) says what
    may be seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, seen: Tensor, mask: Tensor | None = None) -> Tensor:
        heads = [
            part.unflatten(-1, (4, -1)).transpose(1, 2)
            for part in (self.query(x), *self.value(seen).chunk(2, dim=-1))
        ]
        return self.out(F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Words look at each other, then at the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.words, self.picture = Attention(), Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, seen: Tensor, mask: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.words(y, y, mask)
        rows = self.norms[1](x).reshape(
            len(seen), -1, WIDTH
        )  # all the sentences about a picture look at it at once
        x = x + self.picture(rows, seen).reshape(x.shape)
        return x + self.mlp(self.norms[2](x))


class Reader(nn.Module):
    """A sentence read in sight of a picture."""

    def __init__(self, layers: int = 3):
        super().__init__()
        self.eye = Eye()
        self.words = nn.Embedding(len(WORDS) + 1, WIDTH)
        self.order = nn.Parameter(0.02 * torch.randn(LENGTH + 1, WIDTH))
        self.whole = nn.Parameter(0.02 * torch.randn(WIDTH))  # the token that stands for the whole sentence
        self.nothing = nn.Parameter(
            0.02 * torch.randn(1, 1, WIDTH)
        )  # beside the cells: gives attention a measure to count by
        self.look = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)

    def read(self, cells: Tensor, words: Tensor) -> Tensor:
        """States (B M, 1 + LENGTH, WIDTH) of whole sentences and each of their words (B M, LENGTH), M about
        each of B pictures.
        """
        seen = self.look(torch.cat([cells, self.nothing.expand(len(cells), 1, WIDTH)], dim=1))
        x = torch.cat([self.whole.expand(len(words), 1, WIDTH), self.words(words)], dim=1) + self.order
        mask = F.pad(words != _PAD, (1, 0), value=True)[:, None, None]
        for layer in self.layers:
            x = layer(x, seen, mask)
        return self.norm(x)


class Verifier(Reader):
    """Probability that a caption holds: the product, over its words and the whole, of the probability that it
    is right.
    """

    def __init__(self) -> None:
        super().__init__()
        self.right = nn.Linear(WIDTH, 1)
        nn.init.constant_(self.right.bias, 3.0)

    def words_right(self, cells: Tensor, words: Tensor) -> Tensor:
        """Logits (B M, 1 + LENGTH) that the whole and each word is right; +inf where there is no word."""
        logits = self.right(self.read(cells, words)).squeeze(-1)
        return logits.masked_fill(F.pad(words == _PAD, (1, 0)), torch.inf)

    def forward(self, pixels: Tensor, words: Tensor) -> Tensor:
        return F.logsigmoid(self.words_right(self.eye(pixels), words)).sum(1).exp()


class Judge(Reader):
    """How much people prefer a picture for a caption; differences are log odds."""

    def __init__(self) -> None:
        super().__init__(layers=2)
        self.worth = nn.Sequential(nn.Linear(3 * WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))

    def weigh(self, cells: Tensor, words: Tensor) -> Tensor:
        """Worth (B,) of pictures, given as cells (B, 64, WIDTH), for one sentence each (B, LENGTH)."""
        whole = self.read(cells, words)[:, 0]
        return self.worth(torch.cat([whole, cells.mean(1), cells.amax(1)], dim=-1)).squeeze(-1)

    def forward(self, pixels: Tensor, words: Tensor) -> Tensor:
        return self.weigh(self.eye(pixels), words)


class Rater(nn.Module):
    """A rating between 1 and 10 from the pixels alone."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.body = nn.Sequential(
            _convolution(3, width, 3, 2),
            _convolution(width, 2 * width, 3, 2),
            _convolution(2 * width, 2 * width, 3, 2),
        )
        self.head = nn.Sequential(nn.Linear(4 * width, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        cells = self.body(pixels.contiguous(memory_format=torch.channels_last)).flatten(2)
        return 1 + 9 * torch.sigmoid(self.head(torch.cat([cells.mean(2), cells.amax(2)], dim=1)).squeeze(-1))


def fused(module: nn.Module) -> nn.Module:
    """The network in evaluation mode with its batch normalisations folded into the convolutions before them."""
    module.eval()
    for sequence in [part for part in module.modules() if isinstance(part, nn.Sequential)]:
        for index, part in enumerate(sequence):
            if isinstance(part, nn.BatchNorm2d):
                sequence[index - 1] = fuse_conv_bn_eval(sequence[index - 1], part)
                sequence[index] = nn.Identity()
    return module.requires_grad_(False).to(memory_format=torch.channels_last)


class _Scorer:
    """A network with weights from a safetensors file, stored in float16, run in float32."""

    network: type[nn.Module]
    side = SIDE  # of the images, which have no other size

    def __init__(self, weights: str | Path):
        if not Path(weights).is_file():
            raise InputError(
                f"no reward weights at {weights}; they come with the package, or make them with "
                "`python -m capo.shapes.make rewards`"
            )
        state = {
            name: value.float() if value.is_floating_point() else value
            for name, value in load_file(weights).items()
        }
        network = self.network()
        network.load_state_dict(state)
        self.module = fused(network)
        self.device = torch.device("cpu")

    def to(self, device: str | torch.device) -> _Scorer:
        """Moves the network to `device`."""
        self.device = torch.device(device)
        self.module.to(self.device)
        return self

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Raw scores (B,) float32 on the CPU; each a function of its own image and prompt."""
        return self._judge(to_pixels(images).to(self.device), tokens(prompts).to(self.device)).float().cpu()

    def _judge(self, pixels: Tensor, words: Tensor) -> Tensor:
        return self.module(pixels, words)


class AlignmentScorer(_Scorer):
    """Whether the picture shows what the prompt says: a probability, as VQAScore gives."""

    network = Verifier


class PreferenceScorer(_Scorer):
    """How much the simulated annotators prefer the picture: unbounded, differences are log odds, as MPS
    gives.
    """

    network = Judge


class LooksScorer(_Scorer):
    """How good the picture looks, from 1 to 10, whatever the prompt: as VILA gives."""

    network = Rater

    def _judge(self, pixels: Tensor, words: Tensor) -> Tensor:
        return self.module(pixels)
