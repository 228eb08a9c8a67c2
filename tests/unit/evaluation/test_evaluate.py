import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from capo.backbones.export import export_policy
from capo.backbones.model_card import ModelCard
from capo.backbones.sampling import SamplerSettings
from capo.data.generation import ImageGenerator, PoolSpec, fill_pool
from capo.data.pool import Pool
from capo.data.prompts import make_prompt
from capo.errors import InputError
from capo.evaluation.diversity import Distances
from capo.evaluation.evaluate import evaluate
from capo.evaluation.results import results
from capo.evaluation.seeds import read_rates
from capo.rewards import Reward
from capo.rewards.lengths import fewest_tokens

BASE = {"looks": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])}
POLICY = {"looks": torch.tensor([[2.0, 3.0], [3.0, 4.0], [0.0, 7.0]])}
ZERO = {"looks": torch.tensor([[0.0, 0.0], [4.0, 5.0]])}
NAMED = {
    "latents": Distances.of([(0.5, 0.25, 0.0), (0.5, 0.25, 0.25), (0.5, 0.5, 0.5)]),
    "fingerprints": {"policy": "p" * 64, "base": "b" * 64},
    "seed": 0,
}


def test_results_of_hand_worked_scores():
    found = results(POLICY, BASE, zero_scores=ZERO, **NAMED)
    # prompt 0: 2>1, 2=2, 3>1, 3>2 = 3.5/4; prompt 1: two ties, one win each way = 1/2;
    # prompt 2: 0 loses, 7 wins = 1/2
    # interval of three prompts: one of them three times is 1/27 of the resamples, more than 2.5 %
    # differences 0.375, 0, 0: either sign of the first is as far from 0; s = 0.2165
    tested = {"p": 1.0, "holm": 1.0, "prompts_needed": 24}
    assert found["win_rate"] == {"looks": {"mean": 0.625, "low": 0.5, "high": 0.875} | tested}
    # zero line, first two prompts: 0 of 4; 4>3, 4=4, 5>3, 5>4 = 3.5/4.
    # Of four resamples the extremes are 1/4 each
    assert found["zero"] == {"looks": {"mean": 0.4375, "low": 0.0, "high": 0.875}}
    assert found["score"] == {"looks": {"policy": round(19 / 6, 6), "base": 3.5}}
    # changes 0.25, 0.25, 0: one prompt three times is 1/27; 4 of 8 choices of signs are as far from 0
    assert found["diversity"] == {"policy": 0.5, "base": 0.333333, "low": 0.0, "high": 0.25, "p": 0.5}
    assert found["drift"] == {"latents": {"mean": 0.25, "low": 0.0, "high": 0.5}}
    assert (found["prompts"], found["images_per_prompt"]) == (3, 2)
    assert (found["policy"], found["base"]) == ("p" * 64, "b" * 64)
    assert not {"oracle", "oracle_by_category", "win_rate_by_category"} & set(found)


def test_win_rates_by_category_are_tested_together():
    found = results(POLICY, BASE, zero_scores={}, categories=["two", "", "single"], **NAMED)
    # the rates of test_results_of_hand_worked_scores, 3.5/4 and 1/2, of one prompt each
    tested = {"p": 1.0, "holm": 1.0}
    assert found["win_rate_by_category"] == {
        "two": {"looks": {"mean": 0.875, "low": 0.875, "high": 0.875} | tested},
        "single": {"looks": {"mean": 0.5, "low": 0.5, "high": 0.5} | tested},
    }
    scores = {"looks": torch.tensor([[1.0, 2.0]] * 24)}
    better = {"looks": scores["looks"] + torch.tensor([[5.0, 5.0]] * 12 + [[0.0, 0.0]] * 12)}
    found = results(better, scores, zero_scores={}, categories=["a"] * 12 + ["b"] * 12, **NAMED)
    first, second = (found["win_rate_by_category"][name]["looks"] for name in "ab")
    assert (first["p"], first["holm"]) == (0.000488, 0.000977)  # all of 2^12 signs, two of which are as far
    assert second["p"] == second["holm"] == 1.0


def test_oracle_changes_and_categories():
    measures = {
        "base": {"alignment": torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])},
        "policy": {"alignment": torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])},
    }
    found = results(
        POLICY,
        BASE,
        zero_scores={},
        policy_measures=measures["policy"],
        base_measures=measures["base"],
        categories=["two", "single", "two"],
        **NAMED,
    )
    # changes 1/2, -1/2, 0: the extreme resamples take one prompt three times
    unclear = {"p": 1.0, "holm": 1.0}
    assert found["oracle"] == {"alignment": {"policy": 0.5, "base": 0.5, "low": -0.5, "high": 0.5} | unclear}
    assert found["oracle_by_category"] == {
        "two": {"alignment": {"policy": 0.5, "base": 0.25, "low": 0.0, "high": 0.5} | unclear},
        "single": {"alignment": {"policy": 0.5, "base": 1.0, "low": -0.5, "high": -0.5} | unclear},
    }
    assert found["zero"] == {}


def test_a_model_against_itself_is_a_half_and_swapping_gives_the_rest():
    same = results(BASE, BASE, zero_scores={}, **NAMED)["win_rate"]["looks"]
    assert same == {"mean": 0.5, "low": 0.5, "high": 0.5, "p": 1.0, "holm": 1.0, "prompts_needed": None}
    one, other = (
        results(a, b, zero_scores={}, **NAMED)["win_rate"]["looks"]["mean"]
        for a, b in ((POLICY, BASE), (BASE, POLICY))
    )
    assert one + other == 1.0


def test_prompts_without_a_category_count_in_the_whole_only():
    measure = {"alignment": torch.ones(3, 2)}
    found = results(
        POLICY,
        BASE,
        zero_scores={},
        policy_measures=measure,
        base_measures=measure,
        categories=["", "two", ""],
        **NAMED,
    )
    assert list(found["oracle_by_category"]) == ["two"]


# --- the whole evaluation, on the tiny pipeline ---

TEXTS = {
    "a red square": "single",
    "the green circle": "single",
    "a blue triangle left of a red circle": "position",
    "a green square and the red triangle": "two",
    "a blue circle": "single",
}
PROMPTS = [make_prompt(text, category) for text, category in TEXTS.items()]
SETTINGS = SamplerSettings(steps=2, guidance=3.0, batch=4)


def brightness(images, prompts):
    return torch.tensor([float(torch.tensor(list(image.tobytes())).float().mean()) for image in images])


def redness(images, prompts):
    return torch.tensor([float(image.getpixel((3, 3))[0]) for image in images])


def darkness(images, prompts):
    return -brightness(images, prompts)


def words(images, prompts):
    return torch.tensor([float(len(prompt.split())) for prompt in prompts])


REWARDS = [Reward("brightness", brightness), Reward("redness", redness)]
ORACLE = [Reward("dark", darkness), Reward("words", words)]


def plan_of(root, **changes):
    plan = PoolSpec(root, "tiny", "test", 0, PROMPTS, candidates=3, prompts_per_shard=2)
    return replace(plan, **changes)


def tuned(backbone, shift=0.05, fingerprint="f" * 64):
    """A policy that is the base with another output bias."""
    policy = backbone.trainable_copy().eval().requires_grad_(False)
    policy.conv_out.bias.add_(shift)
    return ImageGenerator(backbone, policy, fingerprint, SETTINGS)


def run(folder, pools, backbone, policy=None, **changes):
    options = {
        "zero": plan_of(pools, seed=1, prompts=PROMPTS[:2]),
        "oracle": ORACLE,
        "shown": 2,
        "progress": False,
    }
    return evaluate(folder, plan_of(pools), policy or tuned(backbone), REWARDS, **options | changes)


@pytest.fixture(scope="module")
def evaluated(tiny_backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "evaluation"
    pools = folder.parent.parent / f"{folder.parent.name}-pools"
    return folder, pools, run(folder, pools, tiny_backbone)


@pytest.fixture
def copied(evaluated, tmp_path):
    """The evaluation in a folder that a test may change, and the base's pools, which it may not."""
    return Path(shutil.copytree(evaluated[0], tmp_path / "evaluation")), evaluated[1]


def test_prompts_that_a_reward_reads_in_part_are_told(copied, tiny_backbone):
    folder, pools = copied
    assert "cut" not in json.loads((folder / "results.json").read_text())
    longest = max(fewest_tokens(prompt.text) for prompt in PROMPTS)
    count = sum(fewest_tokens(prompt.text) == longest for prompt in PROMPTS)
    rewards = [replace(REWARDS[0], tokens=longest - 1), replace(REWARDS[1], tokens=longest)]
    options = {"oracle": ORACLE, "shown": 1, "progress": False}
    found = evaluate(folder, plan_of(pools), tuned(tiny_backbone), rewards, **options)
    assert found["cut"] == {"brightness": {"tokens": longest - 1, "prompts": count}}
    assert f"at least {count} of 5 prompts are longer" in (folder / "report.html").read_text()


def test_evaluation_agrees_with_pools_filled_and_scored_by_hand(evaluated, tiny_backbone, tmp_path):
    _, _, found = evaluated
    base = ImageGenerator.base(tiny_backbone, SETTINGS)
    sides = {
        "policy": fill_pool(plan_of(tmp_path / "p"), tuned(tiny_backbone), REWARDS, progress=False),
        "base": fill_pool(plan_of(tmp_path / "b"), base, REWARDS, progress=False),
    }
    keys = [reward.key for reward in REWARDS]
    scores = {side: pool.scores(keys, 3) for side, pool in sides.items()}
    for number, reward in enumerate(REWARDS):
        ours, theirs = scores["policy"][..., number], scores["base"][..., number]
        wins = [
            sum((a > b) + (a == b) / 2 for a in row for b in other) / 9
            for row, other in zip(ours.tolist(), theirs.tolist(), strict=True)
        ]
        assert found["win_rate"][reward.name]["mean"] == pytest.approx(sum(wins) / 5, abs=1e-6)
        assert found["score"][reward.name]["policy"] == pytest.approx(ours.mean().item(), abs=1e-4)
    # the oracle sees the images that the reward saw
    assert found["oracle"]["dark"]["policy"] == pytest.approx(
        -found["score"]["brightness"]["policy"], abs=1e-4
    )
    # 3 + 3 + 8 + 7 + 3 words
    same = {"policy": 4.8, "base": 4.8, "low": 0.0, "high": 0.0, "p": 1.0, "holm": 1.0}
    assert found["oracle"]["words"] == same
    assert found["oracle_by_category"]["position"]["words"]["base"] == 8.0
    assert (found["prompts"], found["images_per_prompt"]) == (5, 3)
    assert found["base"] == tiny_backbone.fingerprints["denoiser"] and found["policy"] == "f" * 64


def test_zero_line_is_the_base_with_other_seeds(evaluated, tiny_backbone):
    _, pools, found = evaluated
    pool = {seed: Pool.open(next(pools.glob(f"tiny-*-{seed}-test"))) for seed in (0, 1)}
    ours, theirs = (pool[seed].scores([REWARDS[0].key], 3, [0, 1])[..., 0].tolist() for seed in (1, 0))
    wins = [
        sum((a > b) + (a == b) / 2 for a in row for b in other) / 9
        for row, other in zip(ours, theirs, strict=True)
    ]
    assert found["zero"]["brightness"]["mean"] == pytest.approx(sum(wins) / 2, abs=1e-6)
    assert ours != theirs


def test_policy_and_base_draw_the_same_seeds(evaluated, tiny_backbone, tmp_path):
    _, pools, _ = evaluated
    same = ImageGenerator(tiny_backbone, tiny_backbone.trainable_copy().eval(), "e" * 64, SETTINGS)
    found = run(tmp_path / "evaluation", pools, tiny_backbone, policy=same, zero=None)
    assert {rate["mean"] for rate in found["win_rate"].values()} == {0.5}  # image for image the base's scores
    assert {(score["policy"] - score["base"]) for score in found["score"].values()} == {0.0}
    assert found["diversity"]["policy"] == found["diversity"]["base"] > 0
    nothing = {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert found["drift"] == {"latents": nothing} and found["diversity"]["p"] == 1.0
    assert found["zero"] == {}


class Halves:
    """Scorer whose vectors are the colors of an image's left and right half, gray being 0."""

    def __call__(self, images, prompts):
        return brightness(images, prompts)

    def features(self, images):
        pixels = torch.stack([torch.from_numpy(np.asarray(image, dtype=np.float32)) for image in images])
        return torch.cat([half.mean((1, 2)) for half in (pixels - 128).chunk(2, dim=2)], dim=1)


def test_features_and_weights_are_measured_where_they_are_given(
    evaluated, tiny_backbone, tmp_path, monkeypatch, caplog
):
    _, pools, plain = evaluated
    encoder = Reward("halves", Halves())
    policy = tuned(tiny_backbone)
    folder = export_policy(tiny_backbone, policy.denoiser, tmp_path / "policy", ModelCard("capo", "nothing"))
    options = {"encoder": encoder, "sample": 3, "weights": folder}
    found = run(tmp_path / "evaluation", pools, tiny_backbone, policy, **options)
    assert found["features"]["reward"] == "halves" and found["features"]["prompts"] == 3
    assert found["features"]["drift"]["mean"] > 0 and found["features"]["diversity"]["base"] > 0
    # the bias alone has moved
    bias = tiny_backbone.denoiser.conv_out.bias.double()
    weights = found["drift"]["weights"]
    assert {name for name, change in weights["blocks"].items() if change} == {"conv_out"}
    weight = tiny_backbone.denoiser.conv_out.weight.double()
    norm = (bias.square().sum() + weight.square().sum()).sqrt().item()
    assert weights["blocks"]["conv_out"] == pytest.approx(0.05 * len(bias) ** 0.5 / norm, rel=1e-4)
    assert {key: found[key] for key in ("win_rate", "diversity")} == {
        key: plain[key] for key in ("win_rate", "diversity")
    }
    with (tmp_path / "evaluation" / "win_rates.csv").open() as file:
        rows = list(csv.DictReader(file))
    for column, mean in {
        "diversity/policy": found["diversity"]["policy"],
        "drift": found["drift"]["latents"]["mean"],
    }.items():
        assert sum(float(row[column]) for row in rows) / len(rows) == pytest.approx(mean, abs=1e-6)
    page = (tmp_path / "evaluation" / "report.html").read_text()
    assert "'halves' (features) the cosine" in page.replace("&#39;", "'") and "<code>conv_out</code>" in page
    monkeypatch.setattr("capo.evaluation.sides.Comparison.sides", lambda *_: pytest.fail("again"))
    assert run(tmp_path / "evaluation", pools, tiny_backbone, policy, **options) == found
    monkeypatch.undo()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    found = run(tmp_path / "evaluation", pools, tiny_backbone, policy, **options | {"sample": 2})
    assert "weights" not in found["drift"] and "weights is not measured" in caplog.text


def test_the_base_itself_has_no_drift_and_the_same_diversity_in_features(evaluated, tiny_backbone, tmp_path):
    same = ImageGenerator(tiny_backbone, tiny_backbone.trainable_copy().eval(), "e" * 64, SETTINGS)
    encoder = Reward("halves", Halves())
    found = run(
        tmp_path / "evaluation", evaluated[1], tiny_backbone, policy=same, zero=None, encoder=encoder
    )["features"]
    assert found["drift"] == {"mean": 0.0, "low": 0.0, "high": 0.0} and found["prompts"] == 5
    change = found["diversity"]
    assert change["policy"] == change["base"] > 0 and change["low"] == change["high"] == 0


def test_files_of_an_evaluation(evaluated):
    folder, _, found = evaluated
    assert sorted(path.name for path in folder.iterdir()) == [
        "pool",
        "report.html",
        "results.json",
        "settings.json",
        "win_rates.csv",
    ]
    # two rewards of one policy: the product of what each is above the base, of the largest possible
    above = [max(rate["mean"] - 0.5, 0) / 0.5 for rate in found["win_rate"].values()]
    assert found["hypervolume"]["mean"] == pytest.approx(above[0] * above[1], abs=1e-5)
    _, rates = read_rates(folder.parent)
    assert {name: round(rate.mean().item(), 5) for name, rate in rates.items()} == {
        name: round(rate["mean"], 5) for name, rate in found["win_rate"].items()
    }
    text = (folder / "results.json").read_text()
    assert json.loads(text) == found
    assert "/" not in text  # no path
    assert sorted(found) == [
        "base",
        "diversity",
        "drift",
        "hypervolume",
        "images_per_prompt",
        "oracle",
        "oracle_by_category",
        "policy",
        "prompts",
        "score",
        "win_rate",
        "win_rate_by_category",
        "zero",
    ]
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["rewards"] == {reward.name: reward.key for reward in REWARDS}
    assert settings["oracle"] == {measure.name: measure.key for measure in ORACLE}
    # 2 gain, 2 lose, 2 plain
    assert (folder / "report.html").read_text().count('<article class="card') in (4, 5)


def test_the_same_settings_give_the_same_bytes_elsewhere(evaluated, tiny_backbone, tmp_path):
    folder, _, _ = evaluated
    run(tmp_path / "other" / "evaluation", tmp_path / "pools", tiny_backbone)
    for name in ("results.json", "report.html", "settings.json"):
        assert (tmp_path / "other" / "evaluation" / name).read_bytes() == (folder / name).read_bytes()


def test_a_result_of_the_same_settings_is_kept_and_of_others_replaced(
    copied, evaluated, tiny_backbone, monkeypatch
):
    (folder, pools), first = copied, evaluated[2]
    monkeypatch.setattr(
        "capo.evaluation.sides.Comparison.sides", lambda *_: pytest.fail("it was evaluated again")
    )
    assert run(folder, pools, tiny_backbone) == first
    monkeypatch.undo()
    second = run(folder, pools, tiny_backbone, policy=tuned(tiny_backbone, 0.5, "a" * 64))
    assert second["policy"] == "a" * 64 and second["score"] != first["score"]
    assert json.loads((folder / "results.json").read_text()) == second
    assert len(list((folder / "pool").iterdir())) == 1  # the first policy's images are gone
    assert len(run(folder, pools, tiny_backbone, zero=None)["zero"]) == 0


@pytest.mark.parametrize("lost", ["results.json", "report.html", "settings.json"])
def test_a_result_that_is_not_whole_is_made_again(copied, evaluated, tiny_backbone, lost):
    (folder, pools), found = copied, evaluated[2]
    kept = (folder / lost).read_bytes()
    (folder / lost).unlink()
    assert run(folder, pools, tiny_backbone) == found
    assert (folder / lost).read_bytes() == kept


def test_settings_are_written_last(copied, tiny_backbone, monkeypatch):
    folder, pools = copied

    def fail(path, data):
        raise OSError("the machine went down")

    monkeypatch.setattr("capo.evaluation.evaluate.write_whole", fail)
    with pytest.raises(OSError):
        run(folder, pools, tiny_backbone, shown=1)
    # so that nobody takes the old results for those of new settings
    assert not (folder / "settings.json").exists()


def test_zero_line_of_other_prompts_is_refused(tiny_backbone, tmp_path):
    with pytest.raises(InputError, match=r"evaluation.zero_prompts"):
        run(
            tmp_path / "evaluation",
            tmp_path,
            tiny_backbone,
            zero=plan_of(tmp_path, seed=1, prompts=PROMPTS[1:]),
        )
    assert list(tmp_path.iterdir()) == []


def test_without_an_oracle_nothing_is_said_of_one(copied, tiny_backbone):
    folder, pools = copied
    assert not [key for key in run(folder, pools, tiny_backbone, oracle=[]) if "oracle" in key]
