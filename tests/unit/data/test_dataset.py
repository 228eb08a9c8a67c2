"""Visits, their order, and the batches made of them."""

import numpy as np
import pytest
import torch

from capo.backbones.sampling import candidate_noise
from capo.data.dataset import PairDataset, Times, VisitSampler, collate, stratified_u, visit_generator
from capo.data.prompts import candidate_seed, make_prompt
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


def dataset(seed=0, shared_noise=False, **options) -> PairDataset:
    # prompt 0: candidate 0 best, 3 worst; prompt 1: all equal, so without a pair; prompt 2: 3 best, 0 worst
    scores = torch.tensor([[3.0, 2, 1, 0], [1, 1, 1, 1], [0, 1, 2, 3]])[..., None]
    selection = select(frs, scores, scores / 4)
    return PairDataset(
        Shelf(), [5, 6, 7], [make_prompt(text) for text in "abc"], selection, seed, shared_noise, **options
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


def test_prior_noise_is_that_of_each_candidate_at_every_visit_and_time():
    drawn, prior = dataset(), dataset(prior_seed=9)
    drawn.times = prior.times = Times(per_pair=2)
    expected = candidate_noise([candidate_seed(9, make_prompt("a").id, index) for index in (0, 3)], (4, 2, 2))
    for visit in (0, 5):
        item, plain = prior[0, visit], drawn[0, visit]
        assert torch.equal(item["noise"], expected) and torch.equal(item["later"][0][1], expected)
        assert (
            item["u"] == plain["u"] and item["later"][0][0] == plain["later"][0][0]
        )  # the noise alone differs
    assert prior[0, 0]["u"] != prior[0, 5]["u"]
    assert not torch.equal(dataset(prior_seed=8)[0, 0]["noise"], expected)
    with pytest.raises(InputError, match="shared must be false, since with source=prior"):
        dataset(shared_noise=True, prior_seed=9)


@pytest.mark.parametrize("options", [{}, {"group": 4}, {"shared_noise": True}, {"prior_seed": 9}])
def test_a_swap_exchanges_winner_and_loser_and_nothing_else(options):
    plain, swapped = dataset(**options), dataset(swap=True, **options)
    plain.times = swapped.times = Times(per_pair=2)
    for key in ((0, 0), (2, 3)):
        item, other = plain[key], swapped[key]
        order = [3, 1, 2, 0] if options.get("group") else [1, 0]
        assert other["latents"].equal(item["latents"][order]) and other["noise"].equal(item["noise"][order])
        assert other["later"][0][1].equal(item["later"][0][1][order])
        assert (other["u"], other["later"][0][0]) == (item["u"], item["later"][0][0])
        # R_ca of negated scores; the rewards here are quarters, so that 1 - R_ca is exact
        assert other["calibrated_rewards"].equal(1 - item["calibrated_rewards"][order])
        gaps = [found["calibrated_rewards"][0] - found["calibrated_rewards"][-1] for found in (item, other)]
        assert gaps[0] == gaps[1] == 0.75
        assert other["text"]["prompt_embeds"].equal(item["text"]["prompt_embeds"])


def test_a_group_holds_its_pair_and_others_of_the_prompt():
    pair, whole = dataset()[0, 0], dataset(group=4)[0, 0]
    assert whole["latents"][[0, 3]].equal(pair["latents"])  # the winner first, the loser last
    assert sorted(whole["latents"][:, 0, 0, 0].tolist()) == [50.0, 51.0, 52.0, 53.0]
    rewards = {50.0: 0.75, 51.0: 0.5, 52.0: 0.25, 53.0: 0.0}
    assert whole["calibrated_rewards"].tolist() == [rewards[x] for x in whole["latents"][:, 0, 0, 0].tolist()]
    assert whole["noise"].shape == (4, 4, 2, 2) and len({part.sum().item() for part in whole["noise"]}) == 4
    middles = [dataset(group=3)[0, visit]["latents"][1, 0, 0, 0].item() for visit in range(40)]
    assert set(middles) == {51.0, 52.0} and 8 < middles.count(51.0) < 32  # either one, about equally often
    assert collate([dataset(group=3)[0, 0], dataset(group=3)[2, 0]]).latents.shape == (2, 3, 4, 2, 2)
    for wrong in (1, 5):
        with pytest.raises(InputError, match="group must be from 2 to 4"):
            dataset(group=wrong)


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
        assert sorted(row for row, _, _ in part) == rows and {visit for _, visit, _ in part} == {epoch}
    assert [row for row, _, _ in visits[:5]] != [row for row, _, _ in visits[5:10]]
    assert [place for _, _, place in visits] == list(range(20))


def test_the_stream_can_be_entered_anywhere():
    whole = iter(VisitSampler([0, 1, 2], seed=0, batch=2))
    late = iter(VisitSampler([0, 1, 2], seed=0, batch=2, start=3))
    assert [next(whole) for _ in range(5)][3:] == [next(late) for _ in range(2)]


def test_ranks_share_the_stream():
    alone = iter(VisitSampler(range(7), seed=0, batch=4))
    ranks = [iter(VisitSampler(range(7), seed=0, batch=2, rank=rank, world=2)) for rank in (0, 1)]
    for _ in range(5):
        assert next(alone) == next(ranks[0]) + next(ranks[1])


def discrepancy(u) -> float:
    """Star discrepancy: largest difference between the share of numbers below x and x."""
    u, n = np.sort(u), len(u)
    return float(np.maximum(np.arange(1, n + 1) / n - u, u - np.arange(n) / n).max())


def test_stratified_times_are_evenly_spread_wherever_one_looks():
    """Any 64 in a row, over the ends of epochs too, are more even than all of 1000 independent draws."""
    start = next(VisitSampler(range(50), seed=5, batch=64, start=100).__iter__())[0][2]
    assert start == 6400
    u = np.array(
        [stratified_u(5, n) for n in range(2000)] + [stratified_u(5, n) for n in range(10**9, 10**9 + 99)]
    )
    worst = max(discrepancy(part) for part in np.lib.stride_tricks.sliding_window_view(u, 64))
    free = np.random.default_rng(0).random((1000, 64))
    assert worst < 0.05 < np.median([discrepancy(part) for part in free]) and u.min() >= 0 and u.max() < 1
    assert worst < min(discrepancy(part) for part in free)


def test_stratified_times_follow_the_golden_ratio_from_a_start_of_the_seed():
    first = [stratified_u(seed, 0) for seed in range(200)]
    assert discrepancy(first) < 0.12  # uniform over seeds: 1.63 / sqrt 200 = 0.115 at 1 %
    step = (5**0.5 - 1) / 2
    for n in (1, 2, 1000):
        assert stratified_u(0, n) == pytest.approx((first[0] + n * step) % 1, abs=1e-9)
    assert stratified_u(0, 10**15) != stratified_u(0, 10**15 + 1)  # as exact as at the start


def test_stratified_times_leave_pairs_and_noise_as_they_are():
    free, even = dataset(), dataset()
    even.times = Times("stratified")
    for key in [(0, 0, 0), (2, 0, 1), (0, 1, 2)]:
        one, other = free[key], even[key]
        for name in ("latents", "noise", "calibrated_rewards"):
            assert torch.equal(one[name], other[name])
        assert other["u"] == stratified_u(0, key[2]) != one["u"]


@pytest.mark.parametrize("kind", ["independent", "stratified"])
def test_stratified_times_are_those_of_the_stream_on_resume_and_with_two_ranks(kind):
    data = dataset()
    data.times = Times(kind)

    def u(**where) -> list[list[float]]:
        stream = iter(VisitSampler([0, 2], seed=0, **where))
        return [[data[key]["u"] for key in next(stream)] for _ in range(6)]

    alone = u(batch=4)
    assert u(batch=4, start=2)[:4] == alone[2:]
    ranks = [u(batch=2, rank=rank, world=2) for rank in (0, 1)]
    assert [one + other for one, other in zip(*ranks, strict=True)] == alone
    assert len({value for batch in alone for value in batch}) == 24


@pytest.mark.parametrize("kind", ["independent", "stratified"])
def test_the_first_of_several_times_is_that_of_one(kind):
    one, several = dataset(), dataset()
    one.times, several.times = Times(kind), Times(kind, 4)
    keys = [(0, 3, 8), (2, 1, 9)]
    single, batch = collate([one[key] for key in keys]), collate([several[key] for key in keys])
    assert single.times == 1 and batch.times == 4
    assert torch.equal(batch.u[::4], single.u) and torch.equal(batch.noise[::4], single.noise)
    assert torch.equal(batch.latents, single.latents.repeat_interleave(4, dim=0))
    assert torch.equal(batch.calibrated_rewards, single.calibrated_rewards.repeat_interleave(4, dim=0))
    assert batch.prompt_ids == [name for name in single.prompt_ids for _ in range(4)]
    assert torch.equal(batch.text["prompt_embeds"][::4], single.text["prompt_embeds"]) and len(batch.u) == 8
    assert len(batch.u.unique()) == 8 and len({part.sum().item() for part in batch.noise}) == 8
    if kind == "stratified":  # a quarter apart
        assert torch.allclose(batch.u.view(2, 4).sort(1).values.diff(dim=1), torch.tensor(0.25))


def test_shared_noise_is_shared_at_every_time():
    data = dataset(shared_noise=True)
    data.times = Times(per_pair=3)
    noise = collate([data[0, 0]]).noise
    assert torch.equal(noise[:, 0], noise[:, 1]) and not torch.equal(noise[0], noise[1])


def test_text_is_encoded_once_for_all_times_of_a_pair():
    data, asked = dataset(), []
    data.times, data.stored_text = Times(per_pair=3), False

    def encode(prompts):
        asked.append(prompts)
        return {"prompt_embeds": torch.arange(len(prompts))[:, None]}

    batch = collate([data[0, 0], data[2, 0]], encode)
    assert asked == [["a", "c"]] and batch.text["prompt_embeds"].flatten().tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "wrong, message", [(("even", 1), "times must be one of"), (("stratified", 0), "at least 1")]
)
def test_impossible_times_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        Times(*wrong)


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
