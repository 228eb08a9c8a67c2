"""The signal in the gradient, and that measuring it leaves the training as it is."""

import csv
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from capo import objectives
from capo.cli import train as train_script
from capo.data import PreferenceBatch
from capo.errors import InputError
from capo.module import PreferenceModule, Weighting
from capo.training.signal import EVERY, GradientSignal, gradient_signal, pairs_for_balance
from fixtures.configuration import THREE_STEPS as RUN


def test_signal_by_hand():
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])
    # <g1, g2> = 1 * 2 + 2 * 0 + 3 * 1 = 5; |g1|^2 = 14, |g2|^2 = 5: 2 * 5 / 19
    found = gradient_signal([(one, torch.tensor([2.0, 0.0])), (other, torch.tensor([[1.0]]))])
    assert found == pytest.approx(10 / 19)
    assert gradient_signal([(one, one), (other, other)]) == 1
    assert gradient_signal([(one, torch.tensor([-2.0, 1.0]))]) == 0
    assert math.isnan(gradient_signal([(0 * one, 0 * one)]))


def test_balance_is_where_signal_and_noise_are_equal():
    """Gradients of single pairs: mean 0.5 in each of 4000 directions, standard deviation 2."""
    draw = torch.Generator().manual_seed(0)
    halves = [0.5 + 2 * torch.randn(4000, generator=draw) / 8**0.5 for _ in range(2)]
    signal = gradient_signal([(halves[0], halves[1])])
    assert signal == pytest.approx(0.25 / (0.25 + 4 / 8), abs=0.05)  # a third
    assert pairs_for_balance(1 / 3, 8) == pytest.approx(16) == pytest.approx(4 / 0.25)  # sigma^2 / mu^2
    assert pairs_for_balance(0.0, 8) == pairs_for_balance(-0.1, 8) == math.inf


def batch_of_three(backbone) -> PreferenceBatch:
    draw = torch.Generator().manual_seed(0)
    shape = (3, 2, *backbone.latent_shape)
    text = backbone.encode_prompts(["a red cat", "a blue dog", "a red dog"])
    return PreferenceBatch(
        torch.randn(shape, generator=draw),
        torch.randn(shape, generator=draw),
        torch.tensor([0.1, 0.5, 0.9]),
        torch.tensor([[0.8, 0.3], [0.7, 0.4], [0.6, 0.5]]),
        {name: value.clone() for name, value in text.items()},
        list("abc"),
    )


def test_a_batch_in_halves_has_the_gradient_and_the_figures_of_the_whole(tiny_backbone):
    """Of three pairs the first is one half; its gradient is added after the backward pass."""
    weighting = Weighting("sigmoid", 1.5)
    objective = partial(objectives.capo, beta=100.0)
    module = PreferenceModule(tiny_backbone, objective, lr=1e-3, warm_up=2, weighting=weighting)
    module.log = lambda *args, **kwargs: None  # it needs a trainer
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.mul_(1.02)
    batch, parameters = batch_of_three(tiny_backbone), list(module.policy.parameters())

    def gradient(part: PreferenceBatch) -> list[torch.Tensor]:
        loss = module.training_step(part, 0)
        return list(torch.autograd.grad(loss, parameters))

    whole, halves = gradient(batch), [gradient(part) for part in batch.halves()]
    assert [part.prompt_ids for part in batch.halves()] == [["a"], ["b", "c"]]
    expected = gradient_signal(zip(*halves, strict=True))
    module.take_figures()
    module.training_step(batch, 0)
    told = module.take_figures()

    signal = GradientSignal(1)
    trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=1, global_step=0, precision_plugin=None)
    signal.on_fit_start(trainer, module)
    signal.on_train_batch_start(trainer, module, batch, 0)
    module.training_step(batch, 0).backward()
    signal.on_after_backward(trainer, module)
    for parameter, one in zip(parameters, whole, strict=True):
        assert torch.allclose(parameter.grad, one, rtol=1e-3, atol=1e-5 * float(one.abs().max()) + 1e-9)
    figures = module.take_figures()
    assert figures.pop("train/gradient_signal") == pytest.approx(expected, rel=1e-4)
    assert figures == pytest.approx(told, rel=1e-4, abs=1e-9)
    assert signal.count == 1 and signal.mean == pytest.approx(expected, rel=1e-4)
    assert module.hold_gradient is None  # of this step alone


def rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as file:
        found = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in found if "train/loss" in row]


@pytest.fixture(scope="module")
def unmeasured(tiny_run):
    train_script.run(tiny_run("unmeasured", *RUN, "trainer.signal_every=0"))
    return rows(tiny_run.folder / "unmeasured")


def test_measuring_changes_no_step_and_does_not_depend_on_the_micro_batch(tiny_run, unmeasured, capsys):
    assert not any("train/gradient_signal" in row for row in unmeasured)
    found = {}
    for micro in (4, 2, 1):
        train_script.run(
            tiny_run(f"micro{micro}", *RUN, f"trainer.micro_batch={micro}", "trainer.signal_every=1")
        )
        found[micro] = rows(tiny_run.folder / f"micro{micro}")
        assert "signal in the gradient: " in capsys.readouterr().out
        for row, plain in zip(found[micro], unmeasured, strict=True):
            assert row["train/loss"] == pytest.approx(plain["train/loss"], rel=1e-4)
            assert row["train/gradient_norm"] == pytest.approx(plain["train/gradient_norm"], rel=1e-3)
            assert -1 <= row["train/gradient_signal"] <= 1
    for micro in (2, 1):  # from accumulated gradients as from two backward passes
        assert [row["train/gradient_signal"] for row in found[micro]] == pytest.approx(
            [row["train/gradient_signal"] for row in found[4]], rel=1e-2, abs=1e-4
        )


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["+model.lora.rank=2", "+model.lora.alpha=2"], id="lora", marks=pytest.mark.slow),
        pytest.param(["trainer.precision=bf16-mixed", "trainer.gradient_checkpointing=true"], id="half"),
        pytest.param(
            ["noise.times_per_pair=2", "noise.reduction=inside", "anchor.weight=1"],
            id="times",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_measuring_goes_with_other_settings(tiny_run, overrides):
    name = overrides[0].split("=")[0]
    for every in (0, 2):
        train_script.run(tiny_run(f"{name}{every}", *RUN, *overrides, f"trainer.signal_every={every}"))
    plain, measured = (rows(tiny_run.folder / f"{name}{every}") for every in (0, 2))
    assert ["train/gradient_signal" in row for row in measured] == [False, True, False]
    assert measured[1]["train/gradient_norm"] == pytest.approx(plain[1]["train/gradient_norm"], rel=1e-3)
    compared = (
        2 if "precision" in name else 3
    )  # in bf16 rounding alone moves the tiny model's next loss by 10 %
    assert [row["train/loss"] for row in measured[:compared]] == pytest.approx(
        [row["train/loss"] for row in plain[:compared]], rel=1e-3
    )


def test_it_is_measured_by_itself_only_where_that_is_cheap():
    def decided(parameters: int, every=None, world=1) -> tuple[int, list[str]]:
        told: list[str] = []
        weights = [torch.nn.Parameter(torch.empty(parameters, device="meta"))]
        module = SimpleNamespace(policy=SimpleNamespace(parameters=lambda: weights), print=told.append)
        signal = GradientSignal(every)
        signal.on_fit_start(SimpleNamespace(world_size=world), module)
        return signal.every, told

    assert decided(100_000_000) == (EVERY, [])
    assert decided(100_000_001) == (0, [])
    assert decided(2_600_000_000, every=5) == (5, [])
    assert decided(10, world=2) == (0, [])
    every, told = decided(10, every=5, world=2)
    assert every == 0 and "one process only" in told[0]


@pytest.mark.parametrize(
    "signal, told",
    [
        (0.5, "signal = noise at about 16 pairs, and a batch has 32: it is large enough"),
        (0.1, "about 140 pairs, and a batch has 32: it is too small for a sure step"),
        (
            0.01,
            "about 1,600 pairs, and a batch has 32: it is too small, and so is the number of prompts (400)",
        ),
        (-0.1, "none above the noise: raise trainer.batch=32, or use more prompts (400)"),
    ],
)
def test_advice_by_hand(signal, told):
    meter = GradientSignal(1)
    assert meter.advice(32, 400) is None
    meter.load_state_dict({"total": 3 * signal, "count": 3})
    found = meter.advice(32, 400)
    assert told in found and "between half-batches of 16 pairs (mean of 3 steps)" in found
    assert meter.state_dict() == {"total": 3 * signal, "count": 3}


def test_a_wrong_interval_is_refused(tiny_run):
    with pytest.raises(InputError, match=r"trainer\.signal_every=-1: must be a whole number of at least 0"):
        train_script.run(tiny_run("wrong", "trainer.signal_every=-1"))
