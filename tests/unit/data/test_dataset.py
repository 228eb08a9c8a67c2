"""Visits, their order, and the batches made of them."""

import numpy as np
import pytest
import torch

from capo.data.dataset import PairDataset, VisitSampler, collate, visit_generator
from capo.data.prompts import make_prompt
from capo.data.selection import select
from capo.errors import InputError
from capo.pairs import frs
from capo.training.loader import PreferenceData


class Shelf:
    """Stands for a PoolReader: latent c of position p is filled with 10 p + c, its text with p."""

    def latents(self, position, candidates):
        return torch.stack([torch.full((4, 2, 2), 10.0 * position + c) for c in candidates]).half()

    def text(self, position):
        return {"prompt_embeds": torch.full((3, 5), float(position))}


def dataset(seed=0, shared_noise=False) -> PairDataset:
    # prompt 0: candidate 0 best, 3 worst; prompt 1: all equal, so without a pair; prompt 2: 3 best, 0 worst
    scores = torch.tensor([[3.0, 2, 1, 0], [1, 1, 1, 1], [0, 1, 2, 3]])[..., None]
    selection = select(frs, scores, scores / 4)
    return PairDataset(
        Shelf(), [5, 6, 7], [make_prompt(text) for text in "abc"], selection, seed, shared_noise
    )


def test_a_visit_draws_winner_first_with_its_rewards():
    item = dataset()[0, 0]
    assert item["latents"][:, 0, 0, 0].tolist() == [50.0, 53.0]  # position 5, candidates 0 and 3
    assert item["calibrated_rewards"].tolist() == [0.75, 0.0]  # 3/4 and 0/4
    assert item["text"]["prompt_embeds"].eq(5).all()


def test_a_visit_is_a_function_of_seed_prompt_and_visit():
    first, again = dataset()[0, 3], dataset()[0, 3]
    assert torch.equal(first["noise"], again["noise"]) and first["u"] == again["u"]
    for other in (dataset(seed=1)[0, 3], dataset()[0, 4], dataset()[2, 3]):
        assert not torch.equal(first["noise"], other["noise"]) and first["u"] != other["u"]


def test_noise_is_independent_or_shared():
    independent, shared = dataset()[0, 0]["noise"], dataset(shared_noise=True)[0, 0]["noise"]
    assert not torch.equal(independent[0], independent[1])
    assert torch.equal(shared[0], shared[1]) and shared.std() > 0


def test_noise_and_times_have_the_right_distribution():
    drawn = [visit_generator(0, "p", visit) for visit in range(4000)]
    u = np.array([generator.random() for generator in drawn])
    # mean 1/2 with a standard error of sqrt(1/12/4000) = 0.0046; four of them are 0.018
    assert abs(u.mean() - 0.5) < 0.018 and u.min() >= 0 and u.max() < 1


def test_u_stays_below_one_in_float32():
    item = dataset()[0, 0] | {"u": 1 - 1e-12}
    assert collate([item]).u.item() < 1


def test_every_epoch_visits_every_usable_row_once():
    rows = [0, 2, 5, 7, 9]
    stream = iter(VisitSampler(rows, seed=3, batch=2))
    visits = [visit for _ in range(10) for visit in next(stream)]  # 20 visits: four epochs of five
    for epoch in range(4):
        part = visits[5 * epoch : 5 * epoch + 5]
        assert sorted(row for row, _ in part) == rows and {visit for _, visit in part} == {epoch}
    assert visits[:5] != visits[5:10]


def test_the_stream_can_be_entered_anywhere():
    whole = iter(VisitSampler([0, 1, 2], seed=0, batch=2))
    late = iter(VisitSampler([0, 1, 2], seed=0, batch=2, start=3))
    assert [next(whole) for _ in range(5)][3:] == [next(late) for _ in range(2)]


def test_ranks_share_the_stream():
    alone = iter(VisitSampler(range(7), seed=0, batch=4))
    ranks = [iter(VisitSampler(range(7), seed=0, batch=2, rank=rank, world=2)) for rank in (0, 1)]
    for _ in range(5):
        assert next(alone) == next(ranks[0]) + next(ranks[1])


def test_no_usable_row_is_an_error():
    with pytest.raises(InputError, match="usable pair"):
        VisitSampler([], seed=0, batch=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers(workers):
    loader = iter(PreferenceData(dataset(), batch=3, workers=workers).train_dataloader())
    batches = [next(loader) for _ in range(3)]
    alone = iter(VisitSampler([0, 2], seed=0, batch=3))
    for batch in batches:
        expected = collate([dataset()[key] for key in next(alone)])
        assert batch.prompt_ids == expected.prompt_ids and torch.equal(batch.noise, expected.noise)
        assert torch.equal(batch.latents, expected.latents) and torch.equal(batch.u, expected.u)
        assert batch.latents.shape == (3, 2, 4, 2, 2) and batch.calibrated_rewards.shape == (3, 2)
