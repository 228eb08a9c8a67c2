"""Training of the three rewards of the shapes world, on line-ups labeled by construction.

The oracle is not used: labels come from what was drawn. `looks` is trained on noisy ratings by the rating
rule, `preference` on choices of the simulated annotators.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from capo.runtime.files import whole_file
from capo.shapes.make import PLACE
from capo.shapes.make.annotators import majority, tastes, worths
from capo.shapes.make.autoencoder import to_tensor
from capo.shapes.make.fitting import fit, generator
from capo.shapes.make.lineups import OWN, SIZE
from capo.shapes.reward_networks import CELLS, Judge, Rater, Verifier
from capo.shapes.rewards import take_weights
from capo.shapes.scenes import COLORS, SHAPES, SIDE, TEXTURES

HELD_OUT = 300  # last line-ups, not used in training
Tables = Mapping[str, np.ndarray]
Part = TypeVar("Part", bound=nn.Module)


def _rows(tables: Tables, batch: int, draw: torch.Generator) -> np.ndarray:
    return torch.randint(len(tables["words"]) - HELD_OUT, (batch,), generator=draw).sort().values.numpy()


def inventory_loss(told: Tensor, things: Tensor) -> Tensor:
    """Return the loss of naming the content of each cell; an object counts in the cell of its center.

    Args:
        told: (B, 64, 22) presence, shape or none, color, texture, radius.
        things: (B, n, 6) objects as `lineups.recorded` encodes them.
    """
    image, slot = (things[..., 0] >= 0).nonzero(as_tuple=True)
    thing = things[image, slot]
    column, row = ((thing[:, axis] / SIDE * CELLS).long().clamp(0, CELLS - 1) for axis in (0, 1))
    cell = row * CELLS + column
    presence = torch.zeros(told.shape[:2])
    presence[image, cell] = 1.0
    here = told[image, cell]
    shape, color, texture = here[:, 1:-1].split([len(SHAPES) + 1, len(COLORS), 1 + len(TEXTURES)], dim=1)
    named = sum(
        F.cross_entropy(part, thing[:, 3 + i].long()) for i, part in enumerate((shape, color, texture))
    )
    return (
        F.binary_cross_entropy_with_logits(told[..., 0], presence) * 4
        + named
        + F.l1_loss(here[:, -1], thing[:, 2] / 8)
    )


def words_loss(logits: Tensor, wrong: Tensor) -> Tensor:
    """Return the binary cross-entropy of logits (B, LENGTH) that each word is right.

    Only words with `wrong` 0 or 1 count, and finite logits: padding has infinite ones.
    """
    known = (wrong >= 0) & logits.isfinite()
    return F.binary_cross_entropy_with_logits(logits[known], 1 - wrong[known].float())


def holds_loss(logits: Tensor, holds: Tensor) -> Tensor:
    """Return the binary cross-entropy (B,) of the product of n probabilities, as logits (B, n)."""
    log_p = F.logsigmoid(logits).sum(1).clamp(max=-1e-5)
    return -torch.where(holds > 0, log_p, torch.log(-torch.expm1(log_p)))


def begun(module: Part, start: Path | None) -> Part:
    """Load the weights of the file `start`, if given, into the module and return it."""
    if start:
        take_weights(module, start, "--start", start.stem)
    return module


def train_alignment(
    work: Path, tables: Tables, steps: int, seed: int = 0, batch: int = 12, start: Path | None = None
) -> Verifier:
    """Train the verifier: each picture with its own caption and with another of its line-up.

    Args:
        start: initial weights (`alignment.safetensors`), which are then trained at a third of the rate.
    """
    torch.manual_seed(seed)
    module = begun(Verifier(), start)

    def loss(step: int):
        """Loss of a batch of captions, right and wrong, and what is logged of it."""
        draw = generator(seed, 4, step)
        rows = _rows(tables, batch, draw)
        other = torch.randint(1, SIZE, (batch, SIZE), generator=draw)
        said = torch.stack(
            [torch.tensor(OWN).expand(batch, SIZE), (torch.tensor(OWN) + other) % SIZE], dim=-1
        ).numpy()
        at = rows[:, None, None], np.arange(SIZE)[None, :, None], said
        cells = module.eye(to_tensor(tables["pictures"][rows].reshape(-1, SIDE, SIDE, 3)))
        words = torch.from_numpy(tables["words"][rows[:, None, None], said]).flatten(0, 2)
        logits = module.words_right(cells, words)
        holds = torch.from_numpy(tables["share"][at] == 1).flatten()
        kept = torch.from_numpy(tables["kept"][at[:2]]).expand(at[2].shape).flatten()
        whole = holds_loss(logits, holds)[kept].mean()
        word = words_loss(logits[kept, 1:], torch.from_numpy(tables["wrong"][at]).flatten(0, 2)[kept])
        seen = inventory_loss(
            module.eye.inventory(cells), torch.from_numpy(tables["things"][rows]).flatten(0, 1)
        )
        right = ((F.logsigmoid(logits).sum(1) > np.log(0.5)) == holds).float().mean().item()
        parts = {"whole": whole.item(), "words": word.item(), "inventory": seen.item(), "accuracy": right}
        return whole + 2 * word + 0.3 * seen, parts

    return fit("reward_alignment", module, loss, work, steps, lr=5e-4 if start else 1.5e-3)


def train_looks(
    work: Path, tables: Tables, steps: int, seed: int = 0, batch: int = 32, start: Path | None = None
) -> Rater:
    """Fit the rater to single raters' ratings: the rule, plus noise of 1.2 points, rounded.

    `start` as the verifier's.
    """
    torch.manual_seed(seed + 1)
    module = begun(Rater(), start)

    def loss(step: int):
        draw = generator(seed, 5, step)
        rows = _rows(tables, batch, draw)
        rule = torch.from_numpy(tables["ratings"][rows]).flatten()
        given = (rule + 1.2 * torch.randn(rule.shape, generator=draw)).round().clamp(1, 10)
        told = module(to_tensor(tables["pictures"][rows].reshape(-1, SIDE, SIDE, 3)))
        return F.mse_loss(told, given), {"off_rule": (told - rule).abs().mean().item()}

    return fit("reward_looks", module, loss, work, steps, lr=1e-3 if start else 3e-3)


def train_preference(
    work: Path,
    tables: Tables,
    steps: int,
    seed: int,
    verifier: Verifier,
    batch: int = 12,
    start: Path | None = None,
) -> Judge:
    """Train the judge on choices between a line-up's pictures for one caption.

    Its image encoder and first layers start from the verifier's, or all of it from the weights `start`.
    """
    torch.manual_seed(seed + 2)
    module = begun(Judge(), start)
    if not start:
        known = module.state_dict()
        module.load_state_dict({**known, **{k: v for k, v in verifier.state_dict().items() if k in known}})
    people = tastes(seed)

    def loss(step: int):
        """Loss of a batch of the annotators' choices, and what is logged of it."""
        draw = generator(seed, 6, step)
        rows = _rows(tables, batch, draw)
        said = torch.randint(SIZE, (batch,), generator=draw).numpy()
        cells = module.eye(to_tensor(tables["pictures"][rows].reshape(-1, SIDE, SIDE, 3)))
        words = torch.from_numpy(tables["words"][rows, said]).repeat_interleave(SIZE, dim=0)
        told = module.weigh(cells, words).view(batch, SIZE)
        chooser = people[int(torch.randint(len(people), (1,), generator=draw))]
        share = tables["share"][rows[:, None], np.arange(SIZE)[None], said[:, None]]
        worth = torch.from_numpy(
            worths(chooser, share, tables["ratings"][rows], tables["things"][rows])
        ).float()
        first, second = torch.triu_indices(SIZE, SIZE, 1)
        odds = worth[:, first] - worth[:, second]
        chosen = (torch.rand(odds.shape, generator=draw) < odds.sigmoid()).float()
        told = told[:, first] - told[:, second]
        agrees = ((told > 0) == (chosen > 0)).float().mean().item()
        return F.binary_cross_entropy_with_logits(told, chosen), {"agrees": agrees}

    return fit("reward_preference", module, loss, work, steps, lr=7e-4)


@torch.inference_mode()
def figures(
    tables: Tables, alignment: Verifier, looks: Rater, preference: Judge, seed: int = 0
) -> dict[str, float]:
    """Measure the rewards on held-out line-ups, against labels known by construction."""
    held = {name: np.asarray(table[-HELD_OUT:]) for name, table in tables.items()}
    pixels = to_tensor(held["pictures"].reshape(-1, SIDE, SIDE, 3))
    words = torch.from_numpy(held["words"]).repeat_interleave(SIZE, dim=0)  # (pictures, captions, words)
    p, worth = (
        torch.stack([net(pixels, words[:, j]) for j in range(SIZE)], 1).unflatten(0, (-1, SIZE))
        for net in (alignment, preference)
    )
    told, holds = looks(pixels).numpy(), held["share"] == 1
    pair = np.stack(np.triu_indices(SIZE, 1), axis=1)  # (pairs, 2)
    things = held["things"][:, pair].reshape(-1, 2, *held["things"].shape[2:])
    ratings = held["ratings"][:, pair].reshape(-1, 2)
    agrees = []
    for j in range(SIZE):
        votes = majority(held["share"][:, pair, j].reshape(-1, 2), ratings, things, seed)
        first, second = worth[:, pair[:, 0], j], worth[:, pair[:, 1], j]
        agrees.append(((first > second).flatten().numpy() == (votes > 0.5))[votes != 0.5])
    own = np.arange(HELD_OUT)[:, None], np.arange(SIZE), np.array(OWN)
    return {
        "alignment_accuracy": float(((p.numpy() > 0.5) == holds).mean()),
        "alignment_own_mean": float(p.numpy()[own].mean()),
        "alignment_own_holds": float(holds[own].mean()),
        "looks_rank_correlation": float(cast(Any, spearmanr(told, held["ratings"].ravel())).statistic),
        "preference_agrees": float(np.concatenate(agrees).mean()),
    }


def ship(module: nn.Module, path: Path) -> None:
    """Save a reward in float16."""
    state = module.state_dict().items()
    with whole_file(path, PLACE) as part:
        save_file({k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state}, part)
        part.chmod(0o644)  # safetensors makes it readable by its owner only
