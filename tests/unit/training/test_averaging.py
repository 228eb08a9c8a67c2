"""The average of the weights, and what validation, checkpoints and export make of it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from capo.training.averaging import AVERAGE, WeightAverage, decay_at


def fitted(average, module, weights):
    """Let `average` see a module whose weight takes one of `weights` after each optimizer step."""
    average.on_train_start(SimpleNamespace(global_step=0), module)
    for step, weight in enumerate(weights, start=1):
        nn.init.constant_(module.weight, weight)
        for _ in range(2):  # two micro-batches: the second does not follow another optimizer step
            average.on_train_batch_end(SimpleNamespace(global_step=step), module, None, None, 0)


def module(weight=1.0):
    made = nn.Linear(2, 2, bias=False)
    nn.init.constant_(made.weight, weight)
    return made


def test_the_decay_begins_low():
    assert [decay_at(step, 0.9) for step in (1, 2, 1000)] == [2 / 11, 3 / 12, 0.9]


def test_the_average_follows_the_formula():
    average, expected = WeightAverage(0.9), 1.0
    fitted(average, made := module(1.0), [2.0, 3.0, 5.0])
    for step, weight in enumerate([2.0, 3.0, 5.0], start=1):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    with average.applied(made):
        assert made.weight.tolist() == [pytest.approx([expected] * 2)] * 2
    assert made.weight.unique().tolist() == [5.0]


def test_constant_weights_stay():
    average = WeightAverage(0.5)
    fitted(average, made := module(0.1), [0.1] * 5)
    before = made.weight.clone()
    with average.applied(made):
        assert torch.equal(made.weight, before)


def test_the_weights_come_back_after_an_error():
    average = WeightAverage(0.5)
    fitted(average, made := module(1.0), [2.0])
    with pytest.raises(RuntimeError, match="in the block"), average.applied(made):
        raise RuntimeError("in the block")
    assert made.weight.unique().tolist() == [2.0]


def test_a_resumed_average_goes_on_and_frozen_weights_have_none():
    first, made = WeightAverage(0.9), nn.Sequential(module(1.0), module(1.0).requires_grad_(False))
    first.on_train_start(SimpleNamespace(global_step=0), made)
    nn.init.constant_(made[0].weight, 3.0)
    first.on_train_batch_end(SimpleNamespace(global_step=1), made, None, None, 0)
    checkpoint = {}
    first.on_save_checkpoint(None, made, checkpoint)
    assert list(checkpoint[AVERAGE]) == ["0.weight"]
    second = WeightAverage(0.9)
    second.on_load_checkpoint(None, made, checkpoint)
    second.on_train_start(SimpleNamespace(global_step=1), made)
    with second.applied(made):
        assert torch.equal(made[0].weight, checkpoint[AVERAGE]["0.weight"])
        assert made[0].weight.unique().item() == pytest.approx(1 + 2 * 9 / 11)


def test_without_a_decay_nothing_is_averaged_or_saved():
    average, checkpoint = WeightAverage(None), {}
    fitted(average, made := module(1.0), [2.0])
    average.on_save_checkpoint(None, made, checkpoint)
    with average.applied(made):
        assert made.weight.unique().tolist() == [2.0] and checkpoint == {}
