"""Policies between base and tuned one, and what a run exports of them."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from capo.cli import evaluate as evaluate_script
from capo.cli import train as train_script
from capo.cli.parts import module_of
from capo.errors import InputError
from capo.training.strength import set_strength
from capo.training.validation import Validated, WinRateValidation
from fixtures.fake_rewards import BRIGHTNESS

LORA = ["+model.lora.rank=2", "+model.lora.alpha=3"]
RUN = ["trainer.max_steps=3", "validation.every=1", "evaluate=false", "trainer.lr=1e-2"]


@pytest.fixture(params=[[], LORA], ids=["full", "lora"])
def trained(request, tiny_run):
    """A module whose weights have moved, and these weights by name."""
    from capo.cli.build import base_of

    cfg = tiny_run("strength", *request.param)
    module = module_of(cfg, base_of(cfg))
    draw = torch.Generator().manual_seed(0)
    moved = {
        name: weight.detach() + 0.1 * torch.randn(weight.shape, generator=draw)
        for name, weight in module.named_parameters()
        if weight.requires_grad
    }
    return module, moved


def predicted(module, denoiser):
    backbone = module.backbone
    draw = torch.Generator().manual_seed(1)
    noisy = torch.randn((2, *backbone.latent_shape), generator=draw)
    with torch.no_grad():
        text = backbone.encode_prompts(["red", "blue"])
        return backbone.predict(denoiser, noisy, torch.tensor([10, 800]), text)


def test_strength_0_is_the_base_and_1_the_policy_bit_for_bit(trained):
    module, moved = trained
    set_strength(module, moved, 1.0)
    own = dict(module.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in moved.items())
    tuned = predicted(module, module.policy)
    set_strength(module, moved, 0.0)
    base = predicted(module, module.backbone.denoiser)
    assert torch.equal(predicted(module, module.policy), base) and not torch.equal(tuned, base)


def test_between_the_two_the_change_of_each_weight_is_scaled(trained):
    """In the function: W + a alpha / rank B A for an adapter, base + a (policy - base) otherwise."""
    module, moved = trained
    set_strength(module, moved, 0.25)
    own = {name.removeprefix("policy."): weight for name, weight in module.named_parameters()}
    base = dict(module.backbone.denoiser.named_parameters())
    for name, value in moved.items():
        name = name.removeprefix("policy.")
        if module.lora:
            expected = 0.25 * value if "lora_B" in name else value
        else:
            expected = base[name] + 0.25 * (value - base[name])
        assert torch.allclose(own[name], expected, atol=1e-7)


def scripted(monkeypatch, by_name, script):
    """Give validations scripted win-rates: of steps in order, and of strengths by name."""
    steps = iter(script)

    def validate(self, policy, place, name):
        rate = by_name[name] if name in by_name else next(steps)
        prompts = len(self.base.prompts)
        rates = {reward.name: torch.full((prompts,), rate, dtype=torch.float64) for reward in self.rewards}
        figures = {"val/win_rate": rate, **{f"val/win_rate/{name}": rate for name in rates}}
        return Validated(figures, rates, None, self.base.pictures)

    monkeypatch.setattr(WinRateValidation, "validate", validate)


def exported(folder):
    return load_file(folder / "policy/unet/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    "script, best",
    [((0.6, 0.7, 0.4), 2), ((0.7, 0.6, 0.4), 1), pytest.param((0.6, 0.7, 0.8), 3, marks=pytest.mark.slow)],
)
def test_the_checkpoint_with_the_highest_win_rate_is_exported(tiny_run, monkeypatch, script, best):
    scripted(monkeypatch, {}, script)
    cfg = tiny_run(f"best{best}", *RUN)
    assert train_script.run(cfg) == max(script)
    folder = tiny_run.folder / f"best{best}"
    [kept] = (folder / "checkpoints").glob("0*.ckpt")
    assert kept.name == f"{best:06d}.ckpt"
    state = torch.load(kept, weights_only=True)["state_dict"]
    policy = exported(folder)
    assert all(torch.equal(policy[name.removeprefix("policy.")], value) for name, value in state.items())


def test_a_run_below_the_base_says_so_and_a_moved_one_remembers_its_best(tiny_run, monkeypatch, capsys):
    scripted(monkeypatch, {}, (0.42, 0.32))
    train_script.run(tiny_run("moving", *RUN, "trainer.max_steps=2"))
    assert "step 1 has a win-rate of 0.420" in capsys.readouterr().out
    before = tiny_run.folder / "moving"
    assert "not above the base" in (before / "policy/README.md").read_text()
    before.rename(tiny_run.folder / "moved")
    scripted(monkeypatch, {}, (0.41,))
    assert train_script.run(tiny_run("moved", *RUN)) == 0.42
    assert [path.name for path in (tiny_run.folder / "moved/checkpoints").glob("0*")] == ["000001.ckpt"]


@pytest.mark.slow
@pytest.mark.parametrize("place", [os.rename, shutil.copytree], ids=["moved", "copied"])
def test_a_moved_or_copied_run_exports_the_best_that_lies_where_it_is_now(tiny_run, monkeypatch, place):
    """The best of three steps is the first; the run is interrupted after the second."""
    scripted(monkeypatch, {}, (0.7, 0.6))
    origin, folder = (tiny_run.folder / f"{place.__name__}-{end}" for end in ("from", "to"))
    train_script.run(tiny_run(origin.name, *RUN, "trainer.max_steps=2"))
    best = torch.load(origin / "checkpoints/000001.ckpt", weights_only=True)["state_dict"]
    place(origin, folder)
    if origin.is_dir():
        (origin / "checkpoints/000001.ckpt").write_bytes(b"the run goes on without its origin")
    scripted(monkeypatch, {}, (0.5,))
    assert train_script.run(tiny_run(folder.name, *RUN)) == 0.7
    policy = exported(folder)
    assert all(torch.equal(policy[name.removeprefix("policy.")], value) for name, value in best.items())


@pytest.mark.parametrize(
    ("half", "exported_strength", "lora"),
    [
        pytest.param(0.75, 0.5, [], id="full-a lower one is better"),
        pytest.param(0.55, 1.0, LORA, id="lora-none is"),
        pytest.param(0.55, 1.0, [], id="full-none is", marks=pytest.mark.slow),
        pytest.param(0.75, 0.5, LORA, id="lora-a lower one is better", marks=pytest.mark.slow),
    ],
)
def test_the_best_strength_is_exported(
    tiny_run, tiny_folder, monkeypatch, capsys, half, exported_strength, lora
):
    scripted(monkeypatch, {"strength 0.5": half, "strength 0.25": 0.51}, (0.5, 0.55, 0.6))
    name = f"strength{exported_strength}{bool(lora)}"
    found = train_script.run(tiny_run(name, *RUN, *lora, "validation.strengths=[0.5,0.25]"))
    folder = tiny_run.folder / name
    assert found == max(half, 0.6)
    curve = json.loads((folder / "strength.json").read_text())
    assert curve["chosen"] == exported_strength
    assert [point["strength"] for point in curve["curve"]] == [0.25, 0.5, 1.0]
    assert re.search(r"strength 0.25: 0.510 \(0.510 to 0.510\)", capsys.readouterr().out)
    assert f"| strength | {exported_strength:g}, chosen among" in (folder / "policy/README.md").read_text()
    trained = torch.load(folder / "checkpoints/000003.ckpt", weights_only=True)["state_dict"]
    if lora:
        policy = load_file(folder / "policy/pytorch_lora_weights.safetensors")
        own = {key.split(".", 1)[1]: value for key, value in policy.items()}
        trained = {key.removeprefix("policy.").replace(".default", ""): v for key, v in trained.items()}
        factor = {key: exported_strength if "lora_B" in key else 1 for key in own}
        assert own.keys() == trained.keys() and any("lora_B" in key for key in own)
        assert all(torch.equal(own[key], factor[key] * trained[key]) for key in own)
        return
    policy, base = exported(folder), load_file(tiny_folder / "unet/diffusion_pytorch_model.safetensors")
    for key, value in trained.items():
        key = key.removeprefix("policy.")
        assert torch.allclose(policy[key], torch.lerp(base[key], value, exported_strength), atol=1e-7)


def test_averaged_weights_are_validated_and_exported(tiny_run, monkeypatch):
    seen = []
    validate = WinRateValidation.validate

    def watched(self, policy, place, name):
        seen.append({key: value.detach().clone() for key, value in policy.named_parameters()})
        return validate(self, policy, place, name)

    monkeypatch.setattr(WinRateValidation, "validate", watched)
    train_script.run(tiny_run("averaged", *RUN, "validation.every=3", "trainer.ema=0.9"))
    checkpoint = torch.load(tiny_run.folder / "averaged/checkpoints/last.ckpt", weights_only=True)
    policy = exported(tiny_run.folder / "averaged")
    for name, average in checkpoint["average"].items():
        name = name.removeprefix("policy.")
        assert torch.equal(seen[-1][name], average) and torch.equal(policy[name], average)
    assert any(
        not torch.equal(value, checkpoint["average"][name])
        for name, value in checkpoint["state_dict"].items()
    )


def test_the_strength_of_a_finished_run_is_chosen_again(tiny_run, monkeypatch):
    """evaluate.py run=DIR validation.strengths=[...] exports and evaluates another policy of the run."""
    train_script.run(tiny_run("again", *RUN))
    folder = tiny_run.folder / "again"
    before = exported(folder)
    steps = sorted(path.name for path in (folder / "checkpoints").iterdir())
    scripted(monkeypatch, {"strength 1": 0.6, "strength 0.5": 0.7}, ())
    asked = [f"run={folder}", f"trust=[{BRIGHTNESS}]", "validation.strengths=[0.5]"]
    cfg = tiny_run("asked", *asked, config="evaluate")
    results = evaluate_script.run(cfg, ["validation.strengths=[0.5]"], folder)
    assert json.loads((folder / "outcome.json").read_text())["val/win_rate"] == 0.7
    after = exported(folder)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert "| strength | 0.5, chosen among 0.5, 1 |" in (folder / "policy/README.md").read_text()
    assert "<h2>Strength</h2>" in (folder / "evaluation/report.html").read_text() and results["win_rate"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == steps
    plain = tiny_run("plain", *asked[:2], "validation.strengths=null", config="evaluate")
    assert evaluate_script.run(plain, ["validation.strengths=null"], folder)["win_rate"]
    assert all(torch.equal(exported(folder)[name], after[name]) for name in after)
    for path in (folder / "checkpoints").glob("0*"):
        path.unlink()
    with pytest.raises(InputError, match="needs the run's best checkpoint"):
        evaluate_script.run(cfg, ["validation.strengths=[0.5]"], folder)
