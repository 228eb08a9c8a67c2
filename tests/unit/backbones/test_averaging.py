"""Averages of the weights: what validation, checkpoints and export, or the reference, make of them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from capo.backbones import averaging
from capo.backbones.averaging import AVERAGE, REFERENCE, MovingReference, WeightAverage, decay_at
from capo.errors import InputError


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


# ---- a reference that follows the policy


def reference_after(reference, weights):
    """The weight of the reference beside a policy that takes one of `weights` after each optimizer step."""
    trained = nn.ModuleDict({"policy": module(1.0)})
    reference.on_train_start(SimpleNamespace(global_step=0), trained)
    for step, weight in enumerate(weights, start=1):
        nn.init.constant_(trained["policy"].weight, weight)
        for _ in range(2):  # two micro-batches
            reference.on_train_batch_end(SimpleNamespace(global_step=step), trained, None, None, 0)
    (told,) = reference.network(trained, "policy")(torch.eye(2)).unique().tolist()
    assert trained["policy"].weight.unique().tolist() == [weights[-1]]
    return told


def test_the_reference_follows_with_the_same_decay_at_all_steps():
    expected = 1.0
    for weight in (2.0, 3.0, 5.0):
        expected = 0.9 * expected + 0.1 * weight
    assert reference_after(MovingReference(0.9), [2.0, 3.0, 5.0]) == pytest.approx(expected)


def test_the_reference_follows_every_so_many_steps():
    assert reference_after(MovingReference(0.9, interval=2), [2.0]) == 1.0
    assert reference_after(MovingReference(0.9, interval=2), [2.0, 3.0, 5.0]) == pytest.approx(0.9 + 0.3)


def test_without_a_decay_the_reference_is_renewed_as_a_copy():
    assert reference_after(MovingReference(0.0, interval=3), [2.0, 3.0]) == 1.0
    assert reference_after(MovingReference(0.0, interval=3), [2.0, 3.0, 0.1, 7.0]) == torch.tensor(0.1).item()


def test_a_resumed_reference_goes_on_bit_for_bit():
    trained, checkpoint = nn.ModuleDict({"policy": module(1.0)}), {}
    first, second = MovingReference(0.9), MovingReference(0.9)
    first.on_train_start(SimpleNamespace(global_step=0), trained)
    nn.init.constant_(trained["policy"].weight, 3.3)
    first.on_train_batch_end(SimpleNamespace(global_step=1), trained, None, None, 0)
    first.on_save_checkpoint(None, trained, checkpoint)
    assert list(checkpoint) == [REFERENCE] and not checkpoint[REFERENCE]["policy.weight"].requires_grad
    second.on_load_checkpoint(None, trained, checkpoint)
    second.on_train_start(SimpleNamespace(global_step=1), trained)
    for reference in (first, second):
        reference.on_train_batch_end(SimpleNamespace(global_step=2), trained, None, None, 0)
    one, other = (found.network(trained, "policy")(torch.eye(2)) for found in (first, second))
    assert torch.equal(one, other) and not one.equal(trained["policy"](torch.eye(2)))
    with pytest.raises(InputError, match="holds no moving reference"):
        MovingReference(0.9).on_load_checkpoint(None, trained, {AVERAGE: checkpoint[REFERENCE]})


def test_a_moving_reference_refuses_what_it_cannot_do(monkeypatch):
    for decay in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match="decay must be a number from 0 to less than 1"):
            MovingReference(decay)
    with pytest.raises(InputError, match="interval must be at least 1"):
        MovingReference(0.9, interval=0)
    monkeypatch.setattr(averaging, "DTensor", nn.Parameter)  # as if the weights were sharded
    with pytest.raises(InputError, match="cannot stand in for sharded weights"):
        MovingReference(0.9).on_train_start(SimpleNamespace(global_step=0), module())


class Noting(nn.Linear):
    """Notes whether gradients are on, its weight asks for them, and autocast keeps its casts."""

    def forward(self, inputs):
        self.found = torch.is_grad_enabled(), self.weight.requires_grad, torch.is_autocast_cache_enabled()
        return super().forward(inputs)


def test_the_references_weights_are_marked_as_trained_and_leave_no_casts():
    trained = nn.ModuleDict({"policy": Noting(2, 2)})
    MovingReference(0.9).network(trained, "policy")(torch.eye(2))
    assert trained["policy"].found == (False, True, False)
    trained["policy"](torch.eye(2))
    assert trained["policy"].found == (True, True, True)
