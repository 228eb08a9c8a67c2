"""The training step against hand-made errors, and the promises about the reference."""

import copy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from capo import objectives
from capo.backbones.averaging import MovingReference
from capo.backbones.inversion import Inversion, invert
from capo.data import PreferenceBatch
from capo.errors import InputError
from capo.metrics import Figures, drift_by_time, training_figures
from capo.module import PreferenceModule, Weighting, denoising_error
from capo.objectives import Anchor, PairErrors, margin
from fixtures.fake_objectives import capo_from_predictions

LORA = {"rank": 2, "alpha": 2.0}


def batch_for(backbone, pairs=3) -> PreferenceBatch:
    draw = torch.Generator().manual_seed(0)
    shape = (pairs, 2, *backbone.latent_shape)
    text = backbone.encode_prompts(["a red cat", "a blue dog", "a red dog"][:pairs])
    return PreferenceBatch(
        latents=torch.randn(shape, generator=draw),
        noise=torch.randn(shape, generator=draw),
        u=torch.tensor([0.1, 0.5, 0.9])[:pairs],
        calibrated_rewards=torch.tensor([[0.8, 0.3], [0.7, 0.4], [0.6, 0.5]])[:pairs],
        text={name: value.clone() for name, value in text.items()},
        prompt_ids=list("abc")[:pairs],
    )


def module_for(backbone, objective=None, **options) -> PreferenceModule:
    objective = objective or partial(objectives.capo, beta=100.0)
    return PreferenceModule(
        backbone, objective, lr=1e-3, warm_up=2, weighting=Weighting("sigmoid", 1.5), **options
    )


def moved(module: PreferenceModule) -> PreferenceModule:
    """The module with a policy away from the reference."""
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.mul_(1.01)
    return module


def test_error_is_a_float32_mean():
    prediction = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16).view(1, 1, 2, 2)
    error = denoising_error(prediction, torch.zeros(1, 1, 2, 2))
    assert error.dtype == torch.float32 and error.item() == 7.5  # (1 + 4 + 9 + 16) / 4


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
def test_first_step_has_no_margin(tiny_backbone, lora, autocast):
    module = module_for(tiny_backbone, lora=lora)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        errors = module.pair_errors(batch_for(tiny_backbone))
    assert margin(errors).tolist() == [0.0, 0.0, 0.0]
    assert errors.policy_winner.dtype == torch.float32 and errors.policy_winner.min() > 0
    # capo at the start: the mean of dR^2 = (0.25 + 0.09 + 0.01) / 3
    assert module.objective(errors).mean().item() == pytest.approx(0.35 / 3, rel=1e-5)


def test_errors_are_those_of_separate_forward_passes(tiny_backbone):
    module, batch = module_for(tiny_backbone), batch_for(tiny_backbone)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.mul_(1.01)
    errors = module.pair_errors(batch)
    t = tiny_backbone.timesteps(batch.u, "uniform")
    for kind, k in (("winner", 0), ("loser", 1)):
        noisy = tiny_backbone.add_noise(batch.latents[:, k], batch.noise[:, k], t)
        for who, network in (("policy", module.policy), ("reference", tiny_backbone.denoiser)):
            told = tiny_backbone.predict(network, noisy, t, batch.text)
            expected = (told - batch.noise[:, k]).square().mean((1, 2, 3))
            assert torch.allclose(getattr(errors, f"{who}_{kind}"), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(errors.weight, tiny_backbone.weight(t, 1.5))
    assert torch.allclose(errors.gap, torch.tensor([0.5, 0.3, 0.1]))


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_reference_is_frozen_and_in_no_checkpoint(tiny_backbone, lora):
    module = module_for(tiny_backbone, lora=lora)
    before = {name: value.clone() for name, value in tiny_backbone.denoiser.state_dict().items()}
    module.objective(module.pair_errors(batch_for(tiny_backbone))).mean().backward()
    trained = [p for p in module.policy.parameters() if p.requires_grad]
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    assert all(p.grad is None for p in tiny_backbone.denoiser.parameters())
    torch.optim.SGD(trained, lr=1.0).step()
    assert all(
        torch.equal(value, before[name]) for name, value in tiny_backbone.denoiser.state_dict().items()
    )
    assert all(name.startswith("policy.") for name in module.state_dict())


def test_one_small_step_raises_the_margin(tiny_backbone):
    module, batch = module_for(tiny_backbone), batch_for(tiny_backbone)
    module.objective(module.pair_errors(batch)).mean().backward()
    with torch.no_grad():
        for parameter in module.policy.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
    assert margin(module.pair_errors(batch)).mean() > 0


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
def test_a_reference_that_follows_computes_what_the_averaged_weights_do(tiny_backbone, lora, autocast):
    moving, batch = MovingReference(0.75), batch_for(tiny_backbone)
    module = module_for(tiny_backbone, lora=lora, moving=moving)

    def errors_of(trained):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return trained.pair_errors(batch)

    moving.on_train_start(SimpleNamespace(global_step=0), module)
    assert margin(errors_of(module)).tolist() == [0.0, 0.0, 0.0]  # it begins as the policy
    trained = [parameter for parameter in module.policy.parameters() if parameter.requires_grad]
    expected, moves = copy.deepcopy(module), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for own, other in zip(trained, (p for p in expected.parameters() if p.requires_grad), strict=True):
            move = 0.05 * torch.randn(own.shape, generator=moves)
            own.add_(move), other.lerp_(other + move, 0.25)
    moving.on_train_batch_end(SimpleNamespace(global_step=1), module, None, None, 0)
    before = [parameter.detach().clone() for parameter in trained]
    errors, wanted = errors_of(module), errors_of(expected)
    assert torch.equal(errors.reference_winner, wanted.policy_winner)
    assert torch.equal(errors.reference_loser, wanted.policy_loser)
    assert not errors.reference_winner.requires_grad and margin(errors).abs().min() > 0
    module.objective(errors).mean().backward()  # through the policy, whose weights are back in place
    assert all(map(torch.equal, trained, before)) and any(p.grad.abs().max() > 0 for p in trained)
    assert module._reference.network is None and all(n.startswith("policy.") for n in module.state_dict())


def test_a_reference_that_follows_needs_one_that_is_read(tiny_backbone):
    with pytest.raises(InputError, match=r"decay must be null \(reference=frozen\), since this objective"):
        module_for(tiny_backbone, partial(objectives.sft, beta=None), moving=MovingReference(0.9))
    with pytest.raises(InputError, match=r"with trainer\.pinned=0\.2, which pins to the base"):
        module_for(tiny_backbone, pinned=0.2, moving=MovingReference(0.9))


def counted_passes(backbone, monkeypatch) -> list[int]:
    """Latents in each forward pass from here on."""
    sizes, predict = [], backbone.predict
    monkeypatch.setattr(
        backbone, "predict", lambda n, x, t, text: sizes.append(len(x)) or predict(n, x, t, text)
    )
    return sizes


def test_sft_computes_neither_reference_nor_loser(tiny_backbone, monkeypatch):
    module = module_for(tiny_backbone, partial(objectives.sft, beta=None))
    sizes = counted_passes(tiny_backbone, monkeypatch)
    errors = module.pair_errors(batch_for(tiny_backbone))
    assert sizes == [3] and errors.reference_winner is None and errors.policy_loser is None


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_mapo_makes_no_pass_through_the_reference(tiny_backbone, monkeypatch, lora):
    module = module_for(tiny_backbone, partial(objectives.mapo, beta=0.1), lora=lora)
    sizes = counted_passes(tiny_backbone, monkeypatch)
    monkeypatch.setattr(module, "reference", lambda: pytest.fail("there is no reference to read"))
    loss = module.training_step(batch_for(tiny_backbone), 0)
    assert sizes == [6] and loss.isfinite() and module._reference.network is None
    assert set(module.take_figures()) >= {"train/loss", "train/error_winner"}


def test_kto_takes_both_candidates_of_each_prompt_as_samples(tiny_backbone, monkeypatch):
    module = moved(module_for(tiny_backbone, partial(objectives.kto, beta=100.0)))
    batch, sizes = batch_for(tiny_backbone), counted_passes(tiny_backbone, monkeypatch)
    batch.calibrated_rewards[0] = torch.tensor([0.8, 0.6])  # both good
    errors = module.pair_errors(batch)
    group = errors.group
    assert (
        sizes == [6, 6]
        and group.policy.shape == (3, 2)
        and torch.equal(group.rewards, batch.calibrated_rewards)
    )
    assert torch.equal(group.policy[:, 0], errors.policy_winner)
    assert torch.equal(group.reference[:, 1], errors.reference_loser)
    gain = (group.reference - group.policy).detach()
    assert not errors.kl.requires_grad and torch.allclose(errors.kl, gain.mean().expand(3))
    y = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0]])  # 0.5 of the last is neither
    expected = (1 - torch.sigmoid(100 * y * (gain - gain.mean().clamp(min=0)))).mean()  # over six samples
    assert module.objective(errors).mean().item() == pytest.approx(expected.item(), rel=1e-5)
    plain = module_for(tiny_backbone).pair_errors(batch)
    assert plain.group is None and plain.kl is None


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
def test_the_policy_inverts_its_own_latents(tiny_backbone, monkeypatch, lora, autocast):
    module = module_for(tiny_backbone, lora=lora, inversion=Inversion(steps=2, renoise=1, eta=0.1))
    batch = batch_for(tiny_backbone)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert margin(module.pair_errors(batch)).tolist() == [0.0, 0.0, 0.0]  # the same latents for both
        with torch.no_grad():
            for name, parameter in module.policy.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05) if "lora_B" in name else parameter.mul_(1.01)
        sizes = counted_passes(tiny_backbone, monkeypatch)
        errors = module.pair_errors(batch)
        loss = module.objective(errors).mean()
    assert sizes == [6] * (2 * 2 + 2)  # of policy and reference as ever, after those of the inversion
    loss.backward()
    trained = [parameter for parameter in module.policy.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    assert sum(parameter.grad.abs().sum() for parameter in trained) > 0
    if autocast:  # which rounds attention with gradients and without in different ways
        return
    # by hand: the target is what inversion finds
    t = tiny_backbone.timesteps(batch.u, "uniform").repeat_interleave(2)
    text = {name: value.repeat_interleave(2, dim=0) for name, value in batch.text.items()}
    latents, noise = batch.latents.flatten(0, 1), batch.noise.flatten(0, 1)
    with torch.no_grad():
        options = {"steps": 2, "renoise": 1, "eta": 0.1, "noise": noise}
        noisy, target = invert(tiny_backbone, module.policy, latents, t, text, **options)
        told = tiny_backbone.predict(module.policy, noisy, t, text)
    expected = denoising_error(told, target).view(3, 2)
    assert torch.allclose(errors.policy_winner, expected[:, 0], rtol=1e-4)
    assert torch.allclose(errors.policy_loser, expected[:, 1], rtol=1e-4)


def test_a_pair_objective_refuses_larger_groups(tiny_backbone):
    batch = batch_for(tiny_backbone)
    wider = replace(batch, latents=batch.latents[:, [0, 1, 1]], noise=batch.noise[:, [0, 1, 1]])
    with pytest.raises(ValueError, match="cannot read 3 candidates"):
        module_for(tiny_backbone).pair_errors(wider)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
def test_an_objective_on_predictions_sees_what_the_errors_were_made_of(tiny_backbone, lora, autocast):
    module, batch = (
        module_for(tiny_backbone, partial(capo_from_predictions, beta=100.0), lora=lora),
        batch_for(tiny_backbone),
    )
    with torch.no_grad():  # away from the start, where both losses are dR^2 whatever the predictions
        for name, parameter in module.policy.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05) if "lora_B" in name else parameter.mul_(1.01)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        errors = module.pair_errors(batch)
    told = errors.predictions
    assert {value.dtype for value in (told.policy, told.reference, told.target)} == {torch.float32}
    assert torch.equal(told.target, batch.noise)  # a UNet's target, winner first
    assert (
        told.policy.requires_grad
        and not told.reference.requires_grad
        and not torch.equal(told.policy, told.reference)
    )
    assert torch.allclose(module.objective(errors), objectives.capo(errors, beta=100.0), rtol=1e-4)


def test_predictions_are_kept_for_those_that_read_them_alone(tiny_backbone):
    assert module_for(tiny_backbone).pair_errors(batch_for(tiny_backbone)).predictions is None
    winners = objectives.requires(reference=False, predictions=True, loser=False)(
        lambda errors, *, beta: errors.policy_winner
    )
    told = (
        module_for(tiny_backbone, partial(winners, beta=None))
        .pair_errors(batch_for(tiny_backbone))
        .predictions
    )
    assert (
        told.policy.shape == told.target.shape == (3, 1, *tiny_backbone.latent_shape)
        and told.reference is None
    )


def test_an_objective_on_winners_may_read_the_reference(tiny_backbone):
    winners = objectives.requires(loser=False)(
        lambda errors, *, beta: errors.policy_winner - errors.reference_winner
    )
    module = module_for(tiny_backbone, partial(winners, beta=1.0))
    module.log = lambda *args, **kwargs: None  # it needs a trainer
    assert module.training_step(batch_for(tiny_backbone), 0) == 0  # policy = reference


def test_figures_by_hand():
    errors = PairErrors(
        policy_winner=torch.tensor([0.2, 0.5]),
        reference_winner=torch.tensor([0.3, 0.4]),
        policy_loser=torch.tensor([0.4, 0.4]),
        reference_loser=torch.tensor([0.4, 0.4]),
        weight=torch.tensor([1.0, 0.5]),
        gap=torch.tensor([0.4, 0.2]),
    )
    # h = -w (m+ - r+) + w (m- - r-): 0.1 and -0.05; beta h = 3 and -1.5, both beyond 1
    figures = {name: float(value) for name, value in training_figures(errors, beta=30.0).items()}
    assert figures["train/h"] == pytest.approx(0.025) and figures["train/beta_h"] == pytest.approx(0.75)
    assert figures["train/accuracy"] == 0.5 and figures["train/dR"] == pytest.approx(0.3)
    assert figures["train/drift_winner"] == pytest.approx(0.0, abs=1e-7) and figures["train/drift_loser"] == 0
    assert figures["train/saturated"] == 1.0
    collected = Figures()
    collected.note(drift_by_time(errors, torch.tensor([0.05, 0.95])))
    drift = collected.take()
    assert drift.keys() == {f"drift/{kind}/u{u}" for kind in ("winner", "loser") for u in (0.0, 0.8)}
    assert drift["drift/winner/u0.0"] == pytest.approx(-0.1) and drift["drift/winner/u0.8"] == pytest.approx(
        0.1
    )


def test_drift_by_time_is_averaged_over_pairs_and_does_not_wait_for_the_device():
    def errors(drift, device="cpu"):
        drift = torch.tensor(drift, device=device)
        same = torch.zeros_like(drift)
        return PairErrors(drift, same, drift, same, same + 1, same)

    figures = Figures()
    figures.note(drift_by_time(errors([1.0, 2.0, 5.0]), torch.tensor([0.1, 0.15, 0.5])))
    figures.note(drift_by_time(errors([6.0, 7.0, float("nan")]), torch.tensor([0.19, 0.5, 0.99])))
    found = figures.take()
    assert found.pop("drift/winner/u0.8") != found.pop("drift/loser/u0.8")  # NaN stays in its own fifth
    # (1 + 2 + 6) / 3 in the first fifth, (5 + 7) / 2 in the third
    assert found == {
        f"drift/{kind}/{u}": v for kind in ("winner", "loser") for u, v in (("u0.0", 3), ("u0.4", 6))
    }
    assert figures.take() == {}
    meta = drift_by_time(errors([1.0], "meta"), torch.tensor([0.1], device="meta"))  # no value can be read
    assert len(meta) == 10


def test_figures_continue_from_totals():
    first, whole = Figures(), Figures()
    for number, value in enumerate((1.0, torch.tensor(2.0), 6.0)):
        whole.note({"a": value})
        if number < 2:
            first.note({"a": value})
    again = Figures()
    again.restore(first.totals())
    again.note({"a": 6.0})
    assert again.take() == whole.take() == {"a": 3.0}


class Reads(TorchDispatchMode):
    """Counts the operations that hand a number to Python, for which a GPU would be waited for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(options or {}))


def test_a_micro_step_reads_nothing_from_the_device_and_a_step_its_norm(tiny_backbone):
    """Figures are read when a row of the curves is due."""
    module = module_for(tiny_backbone, gradient_clip=1.0, anchor=Anchor(1.0))
    optimizer = torch.optim.SGD(module.policy.parameters(), lr=0)
    with Reads() as micro:
        for _ in range(3):
            module.training_step(batch_for(tiny_backbone), 0).backward()
    assert micro.count == 0
    with Reads() as step:
        module.configure_gradient_clipping(optimizer)
    assert step.count == 1  # whether the norm is finite
    with Reads() as row:
        figures = module.take_figures()
    assert row.count > 0 and figures["train/clipped"] == float(figures["train/gradient_norm"] > 1)


@pytest.mark.parametrize("limit, expected", [(1.0, 1 / 3), (None, None)])
def test_the_share_of_clipped_steps_is_logged(tiny_backbone, limit, expected):
    module = module_for(tiny_backbone, gradient_clip=limit)
    module.log = lambda *args, **kwargs: None  # it needs a trainer
    optimizer = module.configure_optimizers()["optimizer"]
    weight = module.policy.conv_in.bias
    for norm in (0.5, 2.0, float("inf"), 0.9):  # clipped: the second of three; the third is skipped
        weight.grad = torch.zeros_like(weight)
        weight.grad[0] = norm
        module.configure_gradient_clipping(optimizer)
    found = module.take_figures()
    assert found.get("train/clipped") == (expected and pytest.approx(expected))
    assert found["train/gradient_norm"] == pytest.approx((0.5 + 2.0 + 0.9) / 3)
    assert found["train/skipped_steps"] == 1


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(tiny_backbone):
    module = module_for(tiny_backbone, max_bad_steps=2)
    module.log = lambda *args, **kwargs: None  # it needs a trainer
    optimizer = module.configure_optimizers()["optimizer"]
    before = [parameter.clone() for parameter in module.policy.parameters()]
    module.policy.conv_in.weight.grad = torch.full_like(module.policy.conv_in.weight, float("nan"))
    module.configure_gradient_clipping(optimizer)
    optimizer.step()
    assert module.skipped.total == 1 and all(
        torch.equal(a, b) for a, b in zip(before, module.policy.parameters(), strict=True)
    )
    module.policy.conv_in.weight.grad = torch.full_like(module.policy.conv_in.weight, float("inf"))
    with pytest.raises(InputError, match="2 steps in a row"):
        module.configure_gradient_clipping(optimizer)


def loss_and_gradient(backbone, batch, **options) -> tuple:
    module = module_for(backbone, **options)
    module.log = lambda *args, **kwargs: None  # it needs a trainer
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.mul_(1.05)  # away from the start
    loss = module.training_step(batch, 0)
    loss.backward()
    return loss, module.policy.conv_in.weight.grad, module.take_figures()


def test_an_anchor_without_weight_changes_nothing(tiny_backbone):
    batch = batch_for(tiny_backbone)
    plain, off = (
        loss_and_gradient(tiny_backbone, batch, **options) for options in ({}, {"anchor": Anchor(0.0, 0.3)})
    )
    assert torch.equal(plain[0], off[0]) and torch.equal(plain[1], off[1]) and plain[2] == off[2]


def test_an_anchor_adds_its_penalty(tiny_backbone):
    batch = batch_for(tiny_backbone)
    plain, held = (
        loss_and_gradient(tiny_backbone, batch, **options) for options in ({}, {"anchor": Anchor(2.0, 0.01)})
    )
    added = held[2]["train/anchor"]
    assert added > 0 and held[0].item() == pytest.approx(plain[0].item() + added, rel=1e-6)
    assert not torch.equal(plain[1], held[1]) and "train/anchor" not in plain[2]


def test_an_anchor_is_refused_where_there_is_nothing_to_hold_to(tiny_backbone):
    with pytest.raises(InputError, match="no reference"):
        module_for(tiny_backbone, partial(objectives.sft, beta=None), anchor=Anchor(1.0))


def at_two_times(batch: PreferenceBatch) -> PreferenceBatch:
    rows = torch.arange(len(batch.u)).repeat_interleave(2)
    return replace(
        batch,
        latents=batch.latents[rows],
        noise=torch.randn(6, *batch.noise.shape[1:], generator=torch.Generator().manual_seed(1)),
        u=torch.tensor([0.1, 0.7, 0.2, 0.9, 0.3, 0.6]),
        calibrated_rewards=batch.calibrated_rewards[rows],
        text={name: value[rows] for name, value in batch.text.items()},
        times=2,
    )


def test_the_loss_of_several_times_is_outside_or_inside(tiny_backbone):
    batch = at_two_times(batch_for(tiny_backbone))
    outside, inside = (
        loss_and_gradient(tiny_backbone, batch, reduction=reduction)[0] for reduction in ("outside", "inside")
    )
    module = module_for(tiny_backbone)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.mul_(1.05)
    h = margin(module.pair_errors(batch)).view(3, 2)
    # beta^2 times the variance of h over the times of a pair, in the mean over the pairs
    assert (outside - inside).item() == pytest.approx(
        100.0**2 * h.var(1, correction=0).mean().item(), rel=1e-3
    )
    single = batch_for(tiny_backbone)
    one, other = (
        loss_and_gradient(tiny_backbone, single, reduction=reduction) for reduction in ("outside", "inside")
    )
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_the_mean_margin_needs_a_margin(tiny_backbone):
    with pytest.raises(InputError, match="reduction must be outside"):
        module_for(tiny_backbone, partial(objectives.sft, beta=None), reduction="inside")


def test_unknown_weighting_is_refused():
    with pytest.raises(InputError, match="constant"):
        Weighting("snr", 0.0)
