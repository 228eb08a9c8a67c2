"""Runs whose policy is sampled with the unconditional prediction of its base or of another policy."""

import csv
import json

import pytest
import torch

from capo.backbones.export import load_policy
from capo.backbones.sampling import sample_prompts
from capo.cli import evaluate as evaluate_script
from capo.cli import train as train_script
from capo.cli.build import base_of, sampler_settings
from capo.cli.named_rewards import rewards_of
from capo.cli.parts import module_of
from capo.cli.readiness import check_sharded_guidance
from capo.data.prompts import candidate_seed, make_prompt
from capo.errors import InputError
from fixtures.fake_rewards import BRIGHTNESS

STRONG = ["trainer.lr=0.01", "trainer.warm_up=0", "sampling.guidance=4", "sampling.parallel=batches"]
LORA = ["+model.lora.rank=2", "+model.lora.alpha=2", "+model.lora.seed=0"]


def scores(folder):
    with (folder / "metrics.csv").open() as file:
        return [float(row["val/score/r"]) for row in csv.DictReader(file) if row["val/win_rate"]]


def settings(folder):
    return json.loads((folder / "evaluation" / "settings.json").read_text())


def evaluated(tiny_run, folder, source):
    cfg = tiny_run("unused", f"run={folder}", f"sampling.unconditional={source}", config="evaluate")
    cfg.trust = [BRIGHTNESS]
    return evaluate_script.run(cfg, [f"sampling.unconditional={source}"], folder)


@pytest.mark.parametrize(
    "kind", ["lora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("full", "sft"))]
)
def test_validation_and_evaluation_sample_with_the_base(tiny_run, kind):
    """The same training, other images: the setting moves what is measured, and no weight."""
    more = {"full": [], "lora": LORA, "sft": ["objective=sft"]}[kind]
    own, base = (tiny_run.folder / f"{kind}-{source}" for source in ("policy", "base"))
    train_script.run(tiny_run(own.name, *STRONG, *more))
    train_script.run(tiny_run(base.name, *STRONG, *more, "sampling.unconditional=base"))
    weights = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (own, base)
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert scores(own) != scores(base)
    cards = [(folder / "policy" / "README.md").read_text() for folder in (own, base)]
    assert "pipe.unet.forward = guided" in cards[1] and "pipe.unet.forward" not in cards[0]
    one, other = settings(own), settings(base)
    assert "unconditional" not in one and other["unconditional"] == other["base"]
    assert one["policy_generator"] != other["policy_generator"]
    assert one["base_generator"] == other["base_generator"]
    # an evaluation with other words draws the other images, and never takes those that lie there
    first = json.loads((own / "evaluation" / "results.json").read_text())
    found = evaluated(tiny_run, own, "base")
    assert found["score"]["r"]["policy"] != first["score"]["r"]["policy"]
    assert found == json.loads((base / "evaluation" / "results.json").read_text())
    assert found["score"]["r"]["base"] == first["score"]["r"]["base"]
    assert evaluated(tiny_run, own, "policy") == first


def mean_score(cfg, backbone, denoiser, unconditional):
    """Mean score by the reward r of the validation images that these two networks draw."""
    prompts = [make_prompt(text) for text in ("red cat", "blue dog")]
    seeds = [
        [candidate_seed(cfg.evaluation.seed, prompt.id, index) for index in range(2)] for prompt in prompts
    ]
    text = backbone.encode_prompts([prompt.text for prompt in prompts])
    latents = sample_prompts(
        backbone, denoiser, text, seeds, sampler_settings(cfg), unconditional=unconditional
    )
    images = backbone.decode(latents.half().float().flatten(0, 1), batch=4)
    (reward,) = (reward for reward in rewards_of(cfg, "rewards") if reward.name == "r")
    return reward.score(images, [prompt.text for prompt in prompts for _ in range(2)]).mean().item()


def test_another_policy_is_a_negative_one(tiny_run):
    negative = tiny_run.folder / "negative"
    train_script.run(tiny_run(negative.name, *STRONG, *LORA, "seed=3", "evaluate=false"))
    folder = tiny_run.folder / "against"
    train_script.run(tiny_run(folder.name, *STRONG, f"sampling.unconditional={negative / 'policy'}"))
    outcome = json.loads((negative / "outcome.json").read_text())
    assert settings(folder)["unconditional"] == outcome["policy"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [LORA, []], ids=["lora", "full"])
def test_a_swapped_run_is_a_negative_model_and_serves_another(tiny_run, more):
    """It is validated and evaluated as the base's unconditional prediction, and another policy uses it."""
    kind = len(more)
    plain, negative, user = (tiny_run.folder / f"{name}-{kind}" for name in ("plain", "negative", "user"))
    train_script.run(tiny_run(plain.name, *STRONG, *more, "evaluate=false"))
    train_script.run(tiny_run(negative.name, *STRONG, *more, "selection.swap=true"))
    weights = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (plain, negative)
    ]
    assert any(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    # evaluated: the base with the policy beside it
    own, outcome = settings(negative), json.loads((negative / "outcome.json").read_text())
    assert own["policy"] == own["base"] and own["unconditional"] == outcome["policy"]
    assert own["policy_generator"] != own["base_generator"]
    # validated likewise: the score is that of images drawn so, and not of the policy's own
    cfg = tiny_run("unused", *STRONG, *more)
    base, policy = base_of(cfg), load_policy(base_of(cfg), negative / "policy")
    beside, itself = (mean_score(cfg, base, *pair) for pair in ((base.denoiser, policy), (policy, None)))
    assert scores(negative)[-1] == pytest.approx(beside, abs=1e-4)
    assert abs(beside - itself) > 1e-3
    card = (negative / "policy" / "README.md").read_text()
    assert "a negative model\n" in card and "| negative model | winner and loser are exchanged" in card
    assert "won by the base with this unconditional prediction against the base" in card
    assert "negative model" not in (plain / "policy" / "README.md").read_text()
    # another policy takes its unconditional prediction from it
    train_script.run(tiny_run(user.name, *STRONG, f"sampling.unconditional={negative / 'policy'}"))
    assert settings(user)["unconditional"] == outcome["policy"]
    assert settings(user)["policy"] != settings(user)["base"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "sampling.unconditional=base",
            "sampling.unconditional=base: must be policy with selection.swap=true",
        ),
        ("sampling.guidance=1", "sampling.guidance=1: must be above 1 with selection.swap=true"),
    ],
)
def test_a_swap_that_validation_could_not_use_is_refused_before_weights_load(
    tiny_run, monkeypatch, override, told
):
    monkeypatch.setattr("capo.cli.tune.build_components", lambda *_, **__: pytest.fail("weights load"))
    with pytest.raises(InputError, match=told):
        train_script.run(tiny_run("refused", "sampling.guidance=4", "selection.swap=true", override))


@pytest.mark.parametrize(
    ("source", "remedy"),
    [("bases", "did you mean base?"), ("/nowhere", "`policy/` folder of a finished run")],
)
def test_what_is_neither_word_nor_policy_is_refused_before_weights_load(
    tiny_run, monkeypatch, source, remedy
):
    monkeypatch.setattr("capo.cli.tune.build_components", lambda *_, **__: pytest.fail("weights load"))
    with pytest.raises(InputError) as refused:
        train_script.run(tiny_run("refused", f"sampling.unconditional={source}"))
    message = str(refused.value)
    assert message.startswith(f"sampling.unconditional={source}: must be policy, base, or the folder")
    assert remedy in message and "unet/config.json" in message
    assert not (tiny_run.folder / "refused" / "config.yaml").exists()


def test_what_cannot_be_sharded_is_refused_with_several_processes(tiny_run):
    def check(*overrides, processes=2):
        check_sharded_guidance(tiny_run("unused", "trainer.strategy=fsdp", *overrides), processes)

    base, folder = "sampling.unconditional=base", "sampling.unconditional=somewhere"
    for fine in ([], [base], [base, *LORA, "objective=sft"]):
        check(*fine)
    check(folder, processes=1)
    check_sharded_guidance(tiny_run("unused", folder, "trainer.strategy=ddp"), 2)
    with pytest.raises(InputError, match=r"unconditional=base: trainer.strategy=fsdp .* objective=sft"):
        check(base, "objective=sft")
    check("selection.swap=true")
    with pytest.raises(InputError, match=r"selection.swap=true: trainer.strategy=fsdp .* objective=sft"):
        check("selection.swap=true", "objective=sft")
    with pytest.raises(InputError, match=r"unconditional=somewhere: .*evaluate.py run=DIR"):
        check(folder)


@pytest.mark.parametrize("lora", [pytest.param([], marks=pytest.mark.slow), LORA], ids=["full", "lora"])
def test_a_run_pins_a_share_of_its_pairs(tiny_run, lora):
    """Where every pair is pinned the policy stays at the base, bit for bit; with a half it goes elsewhere."""
    found = {}
    for share in (0, 0.5, 0.9999):
        folder = tiny_run.folder / f"pinned-{share}-{len(lora)}"
        train_script.run(tiny_run(folder.name, *STRONG, *lora, f"trainer.pinned={share}", "evaluate=false"))
        found[share] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        card = (folder / "policy" / "README.md").read_text()
        assert (f"| pinned | {share:g} of the pairs" in card) == bool(share)
    start = module_of(tiny_run("unused", *lora), base_of(tiny_run("unused"))).policy
    begun = {f"policy.{name}": value for name, value in start.state_dict().items()}
    assert all(torch.equal(value, begun[name]) for name, value in found[0.9999].items())
    for share in (0, 0.5):
        assert any(not torch.equal(value, begun[name]) for name, value in found[share].items())
    assert any(not torch.equal(value, found[0][name]) for name, value in found[0.5].items())


def test_a_pin_without_a_reference_is_refused_before_weights_load(tiny_run, monkeypatch):
    monkeypatch.setattr("capo.cli.tune.build_components", lambda *_, **__: pytest.fail("weights load"))
    with pytest.raises(InputError, match=r"trainer\.pinned=0\.1: must be 0, since this objective trains"):
        train_script.run(tiny_run("refused", "objective=sft", "trainer.pinned=0.1"))
    with pytest.raises(InputError, match=r"trainer\.pinned=1: must be from 0 to less than 1"):
        train_script.run(tiny_run("refused", "trainer.pinned=1"))
