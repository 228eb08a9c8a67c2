"""Which rewards' weights are looked for and loaded: all that will be asked, and no others."""

from functools import partial

import pytest
from omegaconf import OmegaConf

from capo.cli import evaluate as evaluate_script
from capo.cli import generate as generate_script
from capo.cli import train as train_script
from capo.cli.readiness import check_reward_weights
from capo.errors import InputError
from capo.rewards import Reward
from fixtures.fake_rewards import BRIGHTNESS, Brightness

FAR = {
    "scorer": {"_target_": "capo.rewards.clip_scores.PickScore", "weights": "owner/far", "revision": None},
    "scale": 20.0,
}
REFUSED = r"rewards\.far\.weights=owner/far \(revision main\) is not here"


def with_far(cfg, place):
    """`cfg` with one reward at `place`, whose weights are nowhere."""
    OmegaConf.update(cfg, place, {"far": FAR}, merge=False, force_add=True)
    return cfg


def test_stages_that_score_nothing_go_without_the_weights_of_rewards(tiny_run, monkeypatch):
    file = tiny_run.folder / "pairs.parquet"

    def run(stage):
        cfg = tiny_run(
            "unused", f"stage={stage}", "pool.seed=41", f"pair_export.file={file}", config="generate"
        )
        generate_script.run(with_far(cfg, "rewards"))

    run("text")
    run("latents")
    for stage in ("score", "all"):
        with pytest.raises(InputError, match=REFUSED):
            run(stage)
    with monkeypatch.context() as elsewhere:  # a machine that has the weights
        elsewhere.setattr("capo.cli.readiness.look_for", lambda *source: None)
        elsewhere.setattr("capo.rewards.reward._build", lambda reward: Brightness())
        run("score")
    run("report")
    run("export")
    assert (
        file.is_file()
        and len(list((tiny_run.folder / "pools").glob("tiny-*-41-train/report/calibration.json"))) == 1
    )


def test_held_out_rewards_are_asked_in_training_alone(tiny_run, tmp_path):
    with pytest.raises(InputError, match=REFUSED):
        train_script.run(with_far(tiny_run("watched"), "validation.held_out"))
    train_script.run(tiny_run("watched", "evaluate=false"))
    folder = tiny_run.folder / "watched"
    train_script.run(
        with_far(tiny_run("watched"), "validation.held_out")
    )  # what is missing is the evaluation
    results = (folder / "evaluation" / "results.json").read_bytes()
    assert "owner/far" in (folder / "config.yaml").read_text()
    (folder / "evaluation" / "results.json").unlink()
    evaluate_script.run(
        tiny_run("unused", f"run={folder}", f"trust=[{BRIGHTNESS}]", config="evaluate"), [], folder
    )
    assert (folder / "evaluation" / "results.json").read_bytes() == results
    cfg = with_far(
        tiny_run("unused", f"policy={folder / 'policy'}", config="evaluate"), "validation.held_out"
    )
    assert evaluate_script.run(cfg, [], tmp_path)["win_rate"]


def test_one_name_trained_and_evaluated_with_other_weights_is_looked_for_twice(tmp_path):
    reward = partial(Reward, "far")
    typo, there = (reward(FAR["scorer"] | {"weights": source}) for source in ("owner/typo", str(tmp_path)))
    for rewards in ([typo, there], [there, typo]):
        with pytest.raises(InputError, match=r"rewards\.far\.weights=owner/typo"):
            check_reward_weights(rewards)
    other = reward(FAR["scorer"] | {"weights": "owner/typo", "revision": "abc"})
    with pytest.raises(InputError) as refused:
        check_reward_weights([typo, typo, other, there])
    assert (
        str(refused.value).count("owner/typo (revision main)")
        == str(refused.value).count("owner/typo (revision abc)")
        == 1
    )
