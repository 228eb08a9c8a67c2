"""Training steps in which some pairs pin the prediction without a prompt to the reference's."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from capo import objectives
from capo.data import PreferenceBatch
from capo.errors import InputError
from capo.module import PreferenceModule, Weighting
from capo.objectives.pinned import pinned_rows

LORA, BETA = {"rank": 2, "alpha": 2.0}, 100.0
U = torch.tensor([0.1, 0.5, 0.9])  # 4096 u ends in .6, .0 and .4: the second is pinned at 0.3, all at 0.7


def batch_for(backbone) -> PreferenceBatch:
    draw = torch.Generator().manual_seed(0)
    shape = (3, 2, *backbone.latent_shape)
    return PreferenceBatch(
        latents=torch.randn(shape, generator=draw),
        noise=torch.randn(shape, generator=draw),
        u=U,
        calibrated_rewards=torch.tensor([[0.8, 0.3], [0.7, 0.4], [0.6, 0.5]]),
        text=backbone.encode_prompts(["a red cat", "a blue dog", "a red dog"]),
        prompt_ids=list("abc"),
    )


def module_for(backbone, objective=objectives.capo, moved=True, **options) -> PreferenceModule:
    module = PreferenceModule(
        backbone,
        partial(objective, beta=BETA),
        lr=1e-3,
        warm_up=2,
        weighting=Weighting("sigmoid", 1.5),
        **options,
    )
    module.log = lambda *args, **kwargs: None  # it needs a trainer
    with torch.no_grad():
        for name, parameter in module.policy.named_parameters():
            if moved and parameter.requires_grad:
                parameter.add_(0.2) if "lora_B" in name else parameter.mul_(1.01)
    return module


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["sdxl", "sd15", "sd3"])
def test_a_pinned_pair_is_compared_without_its_prompt(tiny_backbones, name, lora):
    backbone = tiny_backbones[name]
    module, batch = module_for(backbone, lora=lora, pinned=0.3), batch_for(backbone)
    assert pinned_rows(U, 0.3).tolist() == [False, True, False]
    loss = module.training_step(batch, 0)
    plain = module.objective(module.pair_errors(batch))
    # the second pair by hand, both latents with the empty prompt
    t = backbone.timesteps(batch.u, "uniform")[1:2]
    distances = []
    for k in (0, 1):
        noisy = backbone.add_noise(batch.latents[1:2, k], batch.noise[1:2, k], t)
        told = backbone.predict(module.policy, noisy, t, backbone.unconditional(1))
        with module.reference() as network:
            distances.append((told - backbone.predict(network, noisy, t, backbone.unconditional(1))).square())
    pinned = BETA * backbone.weight(t, 1.5) * torch.stack(distances).mean()
    assert pinned.item() > 1e-3
    expected = (plain[0] + pinned[0] + plain[2]) / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() != pytest.approx(plain.mean().item(), rel=1e-3)


def test_at_0_every_bit_is_as_before(tiny_backbone, monkeypatch):
    module, batch = module_for(tiny_backbone), batch_for(tiny_backbone)
    monkeypatch.setattr(tiny_backbone, "unconditional", lambda count: pytest.fail("nothing is pinned"))
    loss, errors = module.training_step(batch, 0), module.pair_errors(batch)
    assert errors.predictions is None
    assert torch.equal(loss, module.objective(errors).mean())


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_pinned_pairs_alone_pull_the_policy_back(tiny_backbone, lora):
    module, batch = module_for(tiny_backbone, lora=lora, pinned=0.7), batch_for(tiny_backbone)
    assert pinned_rows(U, 0.7).all()
    losses = []
    trained = [parameter for parameter in module.policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-6 if lora is None else 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss = module.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2] > 0


def test_an_untrained_policy_has_nothing_to_pin(tiny_backbone):
    module = module_for(tiny_backbone, moved=False, pinned=0.7)
    assert module.training_step(batch_for(tiny_backbone), 0).item() == 0


def test_figures_are_those_of_the_other_pairs(tiny_backbone):
    module, batch = module_for(tiny_backbone, pinned=0.3), batch_for(tiny_backbone)
    module.training_step(batch, 0)
    figures = module.take_figures()
    assert figures["train/dR"] == pytest.approx((0.5 + 0.1) / 2)  # the second pair's 0.3 is left out
    assert {name for name in figures if name.startswith("drift/winner")} == {
        "drift/winner/u0.0",
        "drift/winner/u0.8",
    }
    everything = module_for(tiny_backbone, pinned=0.7)
    everything.training_step(batch, 0)
    assert list(everything.take_figures()) == ["train/loss", "train/skipped_steps"]


def test_the_choice_does_not_depend_on_the_batch(tiny_backbone):
    module, batch = module_for(tiny_backbone, pinned=0.3), batch_for(tiny_backbone)
    whole = module.training_step(batch, 0).item()

    def only(row):
        part = {name: getattr(batch, name)[row : row + 1] for name in ("latents", "noise", "u")}
        text = {name: value[row : row + 1] for name, value in batch.text.items()}
        rewards = batch.calibrated_rewards[row : row + 1]
        return replace(batch, **part, text=text, calibrated_rewards=rewards, prompt_ids=["a"])

    parts = [module.training_step(only(row), 0).item() for row in range(3)]
    assert whole == pytest.approx(sum(parts) / 3, rel=1e-4)


def test_no_reference_no_pin(tiny_backbone):
    with pytest.raises(InputError, match="without a reference"):
        module_for(tiny_backbone, objectives.sft, pinned=0.1)
