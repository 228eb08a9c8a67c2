"""Every objective and every recipe of one trains on both shapes models, all weights and an adapter.

A few steps on one batch lower its loss, from configurations as users compose them. The factor of `linear_dpo`
changes with the margin and has no gradient: the steps lower what it multiplies.
"""

from types import SimpleNamespace

import pytest
import torch

from capo.cli.build import built
from capo.cli.parts import module_of
from capo.cli.readiness import check_draw, check_objective
from capo.data import PreferenceBatch
from capo.errors import InputError
from fixtures import ROOT
from fixtures.configuration import composed

pytestmark = pytest.mark.slow
OBJECTIVES = sorted(file.stem for file in (ROOT / "conf" / "objective").glob("*.yaml"))
CHOICES = {
    **{name: [f"objective={name}"] for name in OBJECTIVES},
    "capo_group of pairs": ["objective=capo_group", "selection.group=2"],
    "kto of 3": ["objective=kto", "selection.group=3"],
    "sdpo": ["objective=sdpo", "noise.shared=true"],
    "smpo inverted": [
        "objective=smpo", "noise.source=inverted", "noise.inversion.steps=2", "noise.inversion.renoise=1",
    ],
    "mapo inverted": ["objective=mapo", "noise.source=inverted", "noise.inversion.steps=2"],
    "inpo": ["experiment=inpo", "noise.inversion.steps=3"],
    "pnapo": ["experiment=pnapo"],
    "budget": ["experiment=budget"],
    "ipo, ema reference": ["objective=ipo", "reference=ema"],
    "linear_dpo, base as reference": ["objective=linear_dpo", "reference=frozen"],
}  # fmt: skip
PROMPTS = ["a red circle", "a large blue square", "two green stars", "a yellow cross"]


@pytest.fixture(scope="module", params=["shapes_unet", "shapes_mmdit"])
def model(request):
    """Name of the model and its backbone."""
    cfg = composed(f"model={request.param}")
    return request.param, built(cfg, "model.backbone", name=request.param)


def batch_of(backbone, group: int, shared: bool) -> PreferenceBatch:
    draw = torch.Generator().manual_seed(0)
    shape = (len(PROMPTS), group, *backbone.latent_shape)
    noise = torch.randn(shape, generator=draw)
    return PreferenceBatch(
        latents=torch.randn(shape, generator=draw),
        noise=noise[:, :1].expand(shape) if shared else noise,
        u=torch.tensor([0.2, 0.4, 0.6, 0.8]),
        calibrated_rewards=torch.linspace(0.8, 0.2, group).expand(shape[:2]),
        text=backbone.encode_prompts(PROMPTS),
        prompt_ids=list("abcd"),
    )


@pytest.mark.parametrize("tuned", ["full", "lora"])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_few_steps_lower_the_loss_of_their_batch(model, choice, tuned):
    name, backbone = model
    lora = ["+model.lora={rank: 4, alpha: 4, seed: 0}"] if tuned == "lora" else []
    rate = "trainer.lr=1e-3" if lora else "trainer.lr=3e-5"
    cfg = composed(f"model={name}", *CHOICES[choice], rate, "trainer.warm_up=0", *lora)
    check_objective(cfg)
    if cfg.noise.source == "inverted" and name == "shapes_mmdit":
        with pytest.raises(
            InputError, match=r"noise\.source=inverted: model=shapes_mmdit: .*discrete schedules"
        ):
            check_draw(cfg)
        return
    check_draw(cfg)
    module = module_of(cfg, backbone)
    module.log = lambda *args, **kwargs: None  # it needs a trainer
    multiplied, pair_errors = [], module.pair_errors

    def watched(batch):
        errors = pair_errors(batch)
        if errors.policy_loser is not None:
            multiplied.append((errors.weight * (errors.policy_winner - errors.policy_loser)).mean().item())
        return errors

    module.pair_errors = watched
    batch = batch_of(backbone, cfg.selection.group, cfg.noise.shared)
    before = {key: value.clone() for key, value in module.policy.state_dict().items()}
    base = {key: value.clone() for key, value in backbone.denoiser.state_dict().items()}
    optimizer, losses = module.configure_optimizers()["optimizer"], []
    for step in range(1, 5):
        loss = module.training_step(batch, 0)
        loss.backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        for follower in module.configure_callbacks():
            follower.on_train_batch_end(SimpleNamespace(global_step=step), module, None, None, 0)
        losses.append(multiplied[-1] if choice.startswith("linear_dpo") else loss.item())
    assert module.skipped.total == 0 and losses[-1] < losses[0], losses
    changed = {key for key, value in module.policy.state_dict().items() if not value.equal(before[key])}
    assert changed and all(("lora_" in key) == bool(lora) for key in changed)
    assert all(value.equal(base[key]) for key, value in backbone.denoiser.state_dict().items())
