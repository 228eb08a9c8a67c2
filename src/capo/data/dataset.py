"""Dataset of selected pairs: the random draw of one visit of a prompt, the order of visits, and collation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from capo.backbones.sampling import candidate_noise
from capo.data.batch import PreferenceBatch
from capo.data.prompts import Prompt, candidate_seed
from capo.data.selection import Selection
from capo.errors import InputError, ParameterError
from capo.noise import PRIOR

INDEPENDENT, STRATIFIED = "independent", "stratified"
TIMES = (INDEPENDENT, STRATIFIED)
GOLDEN = 0x9E3779B97F4A7C15  # (sqrt 5 - 1) / 2 of 2^64, rounded down
POOL, ENCODE = "pool", "encode"  # source of a batch's text: stored embeddings, or encoding in each step
Encode = Callable[[list[str]], dict[str, Tensor]]  # B prompts -> text inputs of `Backbone.predict`, leading B


def visit_generator(seed: int, prompt_id: str, visit: int) -> np.random.Generator:
    """Random generator for one visit of a prompt; its state is a function of the arguments alone."""
    key = hashlib.blake2b(f"{seed}/{prompt_id}/{visit}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big")))


def stratified_u(seed: int, place: int) -> float:
    """U in [0, 1) of element n = `place` of the stream of visits: frac(u0(seed) + n (sqrt 5 - 1) / 2).

    Each is uniform over the seeds, and any run of consecutive ones covers [0, 1) evenly. It is computed in
    integers, so that it is as exact late in the stream as at its start.
    """
    first = int.from_bytes(hashlib.blake2b(f"{seed}/times".encode(), digest_size=8).digest(), "big")
    return ((first + place * GOLDEN) % 2**64 >> 11) * 2.0**-53


@dataclass(frozen=True)
class Times:
    """At which times a visit of a pair is evaluated.

    Attributes:
        kind: `independent`: each u is drawn by itself; `stratified`: by `stratified_u`, the T times of a pair
            1/T apart.
        per_pair: number of times T, each with noise of its own.
    """

    kind: str = INDEPENDENT
    per_pair: int = 1

    def __post_init__(self) -> None:
        if self.kind not in TIMES:
            raise ParameterError("times", self.kind, f"must be one of {', '.join(TIMES)}")
        if self.per_pair < 1:
            raise ParameterError("times_per_pair", self.per_pair, "must be at least 1")


class Reader(Protocol):
    """What the dataset reads candidates and text from: a `PoolReader`, or other storage with its methods."""

    def latents(self, position: int, candidates: Sequence[int]) -> Tensor:
        """Latents (len(candidates), C, H, W) of these candidates of the prompt at `position` in the pool."""
        ...

    def text(self, position: int) -> dict[str, Tensor]:
        """Text embeddings of that prompt, by name, without a batch dimension."""
        ...


class PairDataset(Dataset):
    """Dataset with one pair per key (row, visit, place).

    These are the row of the selection, the number of the visit of its prompt, and the place of the visit in
    the stream of `VisitSampler`, which only stratified times need. Pair, u and noise of a visit are functions
    of (seed, prompt_id, visit), stratified times of (seed, place). They depend neither on the order in which
    visits are asked for nor on the number of loader workers. Pair and noise do not depend on `times`.

    Args:
        reader: storage of latents and text.
        positions: place of each row in that storage.
        prompts: prompt of each row.
        selection: pairs that can be drawn.
        seed: seed of the draws.
        shared_noise: whether winner and loser share their noise.
        group: number of candidates k in a visit. With more than two, others of the same prompt, drawn without
            replacement, stand between winner and loser.
        prior_seed: seed of a pool that was sampled here: each candidate has the noise that it was sampled
            from, at every visit and time. None: the noise of a visit is drawn. u does not depend on it.
        swap: whether winner and loser are exchanged, each with its noise, and every reward R_ca is 1 - R_ca,
            what it would be for negated scores. The draws are the same, dR stays positive.
    """

    def __init__(
        self,
        reader: Reader,
        positions: Sequence[int],
        prompts: Sequence[Prompt],
        selection: Selection,
        seed: int,
        shared_noise: bool = False,
        group: int = 2,
        prior_seed: int | None = None,
        swap: bool = False,
    ):
        if not len(positions) == len(prompts) == len(selection.pairs):
            raise ValueError(
                f"{len(positions)} positions, {len(prompts)} prompts and {len(selection.pairs)} selected "
                "rows must be equal in number"
            )
        check_group(group, selection.rewards.shape[1])
        check_shared_prior(shared_noise, prior_seed is not None)
        self.group, self.prior_seed, self.swap = group, prior_seed, swap
        self.reader, self.positions, self.prompts = reader, list(positions), list(prompts)
        self.selection, self.seed, self.shared_noise = selection, seed, shared_noise
        self.stored_text = True  # whether to read the pool's text embeddings
        self.times = Times()

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, key: tuple[int, int] | tuple[int, int, int]) -> dict:
        """Draw and read the pair of a visit, as one element of a `PreferenceBatch` for `collate`."""
        row, visit, *place = key
        draw = visit_generator(self.seed, self.prompts[row].id, visit)
        drawn = self._candidates(row, draw)
        latents = self.reader.latents(self.positions[row], drawn).float()
        kinds = 1 if self.shared_noise else len(drawn)
        prior = self._prior(row, drawn, latents.shape[1:])

        def at_a_time() -> tuple[float, Tensor]:
            u = draw.random()
            noise = torch.from_numpy(draw.standard_normal((kinds, *latents.shape[1:]), dtype=np.float32))
            return u, noise.expand_as(latents) if prior is None else prior

        u, noise = at_a_time()
        later = [at_a_time() for _ in range(self.times.per_pair - 1)]
        if self.times.kind == STRATIFIED:
            u = stratified_u(self.seed, *place)
            later = [((u + n / (1 + len(later))) % 1, other) for n, (_, other) in enumerate(later, 1)]
        rewards = self.selection.rewards[row, drawn]
        if self.swap:
            order = [len(drawn) - 1, *range(1, len(drawn) - 1), 0]
            latents, rewards, noise = latents[order], 1 - rewards[order], noise[order]
            later = [(time, other[order]) for time, other in later]
        return {
            "latents": latents,
            "noise": noise,
            "u": u,
            "later": later,
            "calibrated_rewards": rewards,
            "text": self.reader.text(self.positions[row]) if self.stored_text else {},
            "prompt": self.prompts[row].text,
            "prompt_id": self.prompts[row].id,
        }

    def _candidates(self, row: int, draw: np.random.Generator) -> list[int]:
        """Draw the candidates of a visit: the winner, the others of a larger group, and the loser."""
        winner, loser = self.selection.draw(row, draw.integers)
        if self.group == 2:  # asks for no further random number
            return [winner, loser]
        rest = [i for i in range(self.selection.rewards.shape[1]) if i not in (winner, loser)]
        others = draw.choice(rest, self.group - 2, replace=False, shuffle=False)
        return [winner, *map(int, others), loser]

    def _prior(self, row: int, candidates: Sequence[int], shape: Sequence[int]) -> Tensor | None:
        """Noise (k, C, H, W) that the sampler began these candidates with; None if noise is drawn."""
        if self.prior_seed is None:
            return None
        prompt = self.prompts[row].id
        return candidate_noise([candidate_seed(self.prior_seed, prompt, i) for i in candidates], shape)


def check_group(group: int, candidates: int) -> None:
    """Raise ParameterError unless a visit can have `group` of a prompt's candidates."""
    if not 2 <= group <= candidates:
        raise ParameterError(
            "group", group, f"must be from 2 to {candidates}, the number of candidates of a prompt"
        )


def check_shared_prior(shared: bool, prior: bool) -> None:
    """Raise ParameterError if winner and loser would share the noise that each was sampled from."""
    if shared and prior:
        raise ParameterError(
            "shared", shared, f"must be false, since with source={PRIOR} each candidate has noise of its own"
        )


def sample_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash of the tensors of a sample, 32 hex digits: their bits, dtypes, shapes and names."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def collate(items: list[dict], encode: Encode | None = None, digests: bool = False) -> PreferenceBatch:
    """Stack items of `PairDataset` to a batch; with `encode`, compute its text embeddings from the prompts.

    With `digests`, the batch has a digest of each of its samples.

    With T times per pair the batch has T consecutive entries per item, which differ in u and noise.
    Rounding in the text encoders depends on the batch, so computed embeddings can differ from those stored in
    the pool in their last bits.
    """
    times = 1 + len(items[0]["later"])
    drawn = [part for item in items for part in ((item["u"], item["noise"]), *item["later"])]
    stacked: dict[str, Any] = {
        name: torch.stack([item[name] for item in items]) for name in ("latents", "calibrated_rewards")
    }
    stacked["noise"] = torch.stack([noise for _, noise in drawn])
    text = (
        {name: torch.stack([item["text"][name] for item in items]) for name in items[0]["text"]}
        if encode is None
        else encode([item["prompt"] for item in items])
    )
    if times > 1:
        for name in ("latents", "calibrated_rewards"):
            stacked[name] = stacked[name].repeat_interleave(times, dim=0)
        text = {name: value.repeat_interleave(times, dim=0) for name, value in text.items()}
    # clamped, since float32 would round a u just below 1 to 1
    u = torch.tensor([u for u, _ in drawn], dtype=torch.float64).clamp(max=1 - 2**-24).float()
    ids = [item["prompt_id"] for item in items for _ in range(times)]
    batch = PreferenceBatch(u=u, text=text, prompt_ids=ids, times=times, **stacked)
    if digests:
        for n in range(len(ids)):
            own = {"latents": batch.latents[n], "noise": batch.noise[n], "u": u[n : n + 1]}
            words = {f"text {name}": value[n] for name, value in text.items()}
            batch.digests.append(sample_digest(own | words))
    return batch


class VisitSampler(Sampler):
    """Endless sampler of batches of keys (row, visit, place) for `PairDataset`; place counts all visits.

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

    def _visit(self, count: int) -> tuple[int, int, int]:
        """Row, visit number and place of element `count` of the stream; its place is `count` itself."""
        epoch, place = divmod(count, len(self.rows))
        if epoch != self._epoch:
            order = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, epoch]))
            self._epoch, self._order = epoch, order.permutation(self.rows)
        return int(self._order[place]), epoch, count

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        step = self.start
        while True:
            first = (step * self.world + self.rank) * self.batch
            yield [self._visit(first + i) for i in range(self.batch)]
            step += 1
