"""Dataset of selected pairs: the random draw of one visit of a prompt, the order of visits, and collation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from capo.data.batch import PreferenceBatch
from capo.data.prompts import Prompt
from capo.data.selection import Selection
from capo.errors import InputError

POOL, ENCODE = "pool", "encode"  # source of a batch's text: stored embeddings, or encoding in each step
Encode = Callable[[list[str]], dict[str, Tensor]]  # B prompts -> text inputs of `Backbone.predict`, leading B


def visit_generator(seed: int, prompt_id: str, visit: int) -> np.random.Generator:
    """Random generator for one visit of a prompt; its state is a function of the arguments alone."""
    key = hashlib.blake2b(f"{seed}/{prompt_id}/{visit}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big")))


class Reader(Protocol):
    """What the dataset reads candidates and text from: a `PoolReader`, or other storage with its methods."""

    def latents(self, position: int, candidates: Sequence[int]) -> Tensor: ...

    def text(self, position: int) -> dict[str, Tensor]: ...


class PairDataset(Dataset):
    """Dataset with one pair per key (row, visit): row of the selection, number of the visit of its prompt.

    Pair, u and noise of a visit are functions of (seed, prompt_id, visit). They depend neither on the order
    of visits nor on the number of loader workers.
    """

    def __init__(
        self,
        reader: Reader,
        positions: Sequence[int],
        prompts: Sequence[Prompt],
        selection: Selection,
        seed: int,
        shared_noise: bool = False,
    ):
        if not len(positions) == len(prompts) == len(selection.pairs):
            raise ValueError(
                f"{len(positions)} positions, {len(prompts)} prompts and {len(selection.pairs)} selected "
                "rows must be equal in number"
            )
        self.reader, self.positions, self.prompts = reader, list(positions), list(prompts)
        self.selection, self.seed, self.shared_noise = selection, seed, shared_noise
        self.stored_text = True  # whether to read the pool's text embeddings

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Draw and read the pair of a visit, as one element of a `PreferenceBatch` for `collate`."""
        row, visit = key
        draw = visit_generator(self.seed, self.prompts[row].id, visit)
        pair = list(self.selection.draw(row, draw.integers))
        latents = self.reader.latents(self.positions[row], pair).float()
        u = draw.random()
        kinds = 1 if self.shared_noise else len(pair)
        noise = torch.from_numpy(draw.standard_normal((kinds, *latents.shape[1:]), dtype=np.float32))
        return {
            "latents": latents,
            "noise": noise.expand_as(latents),
            "u": u,
            "calibrated_rewards": self.selection.rewards[row, pair],
            "text": self.reader.text(self.positions[row]) if self.stored_text else {},
            "prompt": self.prompts[row].text,
            "prompt_id": self.prompts[row].id,
        }


def collate(items: list[dict], encode: Encode | None = None) -> PreferenceBatch:
    """Stack items of `PairDataset` to a batch; with `encode`, compute its text embeddings from the prompts.

    Rounding in the text encoders depends on the batch, so computed embeddings can differ from those stored in
    the pool in their last bits.
    """
    stacked = {
        name: torch.stack([item[name] for item in items])
        for name in ("latents", "noise", "calibrated_rewards")
    }
    text = (
        {name: torch.stack([item["text"][name] for item in items]) for name in items[0]["text"]}
        if encode is None
        else encode([item["prompt"] for item in items])
    )
    # clamped, since float32 would round a u just below 1 to 1
    u = torch.tensor([item["u"] for item in items], dtype=torch.float64).clamp(max=1 - 2**-24).float()
    return PreferenceBatch(u=u, text=text, prompt_ids=[item["prompt_id"] for item in items], **stacked)


class VisitSampler(Sampler):
    """Endless sampler of batches of keys (row, visit) for `PairDataset`.

    Epoch e visits every usable row once, in a permutation that is a function of (seed, e); a batch may span
    two epochs. Every rank takes its own part of each global batch, so the stream of visits does not depend on
    the number of ranks. Raises InputError if no row is usable.
    """

    def __init__(
        self, rows: Sequence[int], seed: int, batch: int, rank: int = 0, world: int = 1, start: int = 0
    ):
        if len(rows) == 0:
            raise InputError(
                "no prompt has a usable pair; use more candidates (pool.candidates), other rewards "
                "or pairs=sum"
            )
        self.rows, self.seed, self.batch = np.asarray(rows), seed, batch
        self.rank, self.world, self.start = rank, world, start
        self._epoch, self._order = -1, self.rows

    def _visit(self, count: int) -> tuple[int, int]:
        """Row and visit number of element `count` of the stream."""
        epoch, place = divmod(count, len(self.rows))
        if epoch != self._epoch:
            order = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, epoch]))
            self._epoch, self._order = epoch, order.permutation(self.rows)
        return int(self._order[place]), epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start
        while True:
            first = (step * self.world + self.rank) * self.batch
            yield [self._visit(first + i) for i in range(self.batch)]
            step += 1
