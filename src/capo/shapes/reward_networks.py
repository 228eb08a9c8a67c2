"""Networks of the shapes world's learned rewards: what a picture shows, and what a sentence says of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capo.shapes.captions import WORDS
from capo.shapes.scenes import COLORS, SHAPES, TEXTURES

LENGTH = 17  # words of a prompt; the longest that `prompts` draws has 14, commas included
PAD = 0
WIDTH = 80
CELLS = 8  # cells per side of the image encoder's grid


def _convolution(inward: int, outward: int, side: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inward, outward, side, stride, side // 2, bias=False), nn.BatchNorm2d(outward), nn.ReLU()
    )


class Residual(nn.Module):
    """Residual block of two convolutions."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            _convolution(width, width), nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class Eye(nn.Module):
    """Image encoder: (B, 3, 64, 64) to one token for each of 8 x 8 cells, (B, 64, WIDTH)."""

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
        # content of each cell (presence, shape or none of them, color, texture, radius); used in training
        # only
        self.inventory = nn.Linear(WIDTH, 1 + len(SHAPES) + 1 + len(COLORS) + 1 + len(TEXTURES) + 1)

    def forward(self, pixels: Tensor) -> Tensor:
        cells = self.body(pixels.contiguous(memory_format=torch.channels_last))
        return cells.flatten(2).transpose(1, 2) + self.place


class Attention(nn.Module):
    """Attention with four heads from `x` (B, n, WIDTH) to `seen` (B, m, WIDTH).

    `mask` (B, 1, 1, m) is true for the tokens of `seen` that may be attended to.
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
    """Transformer layer: self-attention of the words, cross-attention to the picture, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.words, self.picture = Attention(), Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, seen: Tensor, mask: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.words(y, y, mask)
        rows = self.norms[1](x).reshape(len(seen), -1, WIDTH)  # all sentences about a picture attend at once
        x = x + self.picture(rows, seen).reshape(x.shape)
        return x + self.mlp(self.norms[2](x))


class Reader(nn.Module):
    """Encoder of sentences with cross-attention to a picture."""

    def __init__(self, layers: int = 3):
        super().__init__()
        self.eye = Eye()
        self.words = nn.Embedding(len(WORDS) + 1, WIDTH)
        self.order = nn.Parameter(0.02 * torch.randn(LENGTH + 1, WIDTH))
        self.whole = nn.Parameter(0.02 * torch.randn(WIDTH))  # token of the whole sentence
        # an extra cell, the same for all pictures: a reference by which attention can count
        self.nothing = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.look = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)

    def read(self, cells: Tensor, words: Tensor) -> Tensor:
        """Encode M sentences about each of B pictures, with words (B M, LENGTH) and cells (B, 64, WIDTH).

        Returns:
            States (B M, 1 + LENGTH, WIDTH): of the whole sentence, then of each word.
        """
        seen = self.look(torch.cat([cells, self.nothing.expand(len(cells), 1, WIDTH)], dim=1))
        x = torch.cat([self.whole.expand(len(words), 1, WIDTH), self.words(words)], dim=1) + self.order
        mask = F.pad(words != PAD, (1, 0), value=True)[:, None, None]
        for layer in self.layers:
            x = layer(x, seen, mask)
        return self.norm(x)


class Verifier(Reader):
    """Probability that a caption holds for a picture.

    It is the product of the probabilities that each word and the sentence as a whole are right.
    """

    def __init__(self) -> None:
        super().__init__()
        self.right = nn.Linear(WIDTH, 1)
        nn.init.constant_(self.right.bias, 3.0)

    def words_right(self, cells: Tensor, words: Tensor) -> Tensor:
        """Return logits (B M, 1 + LENGTH) that the sentence and each word are right; +inf for padding."""
        logits = self.right(self.read(cells, words)).squeeze(-1)
        return logits.masked_fill(F.pad(words == PAD, (1, 0)), torch.inf)

    def forward(self, pixels: Tensor, words: Tensor) -> Tensor:
        return F.logsigmoid(self.words_right(self.eye(pixels), words)).sum(1).exp()


class Judge(Reader):
    """Preference score of a picture for a caption; differences of scores are log-odds."""

    def __init__(self) -> None:
        super().__init__(layers=2)
        self.worth = nn.Sequential(nn.Linear(3 * WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))

    def weigh(self, cells: Tensor, words: Tensor) -> Tensor:
        """Score pictures, given as cells (B, 64, WIDTH), for one sentence each (B, LENGTH); returns (B,)."""
        whole = self.read(cells, words)[:, 0]
        return self.worth(torch.cat([whole, cells.mean(1), cells.amax(1)], dim=-1)).squeeze(-1)

    def forward(self, pixels: Tensor, words: Tensor) -> Tensor:
        return self.weigh(self.eye(pixels), words)


class Rater(nn.Module):
    """Rating between 1 and 10 from the pixels alone."""

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
