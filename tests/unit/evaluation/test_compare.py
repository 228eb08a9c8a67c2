import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from capo.data.pool import Manifest, Pool
from capo.data.prompts import make_prompt
from capo.errors import InputError
from capo.evaluation.compare import compare_runs, head_to_head, run_folders
from capo.evaluation.stored import current_results, is_evaluated

PROMPTS = [make_prompt(text) for text in ("a circle", "a square", "a star")]
KEYS = {"alignment": "alignment-00000000", "looks": "looks-11111111"}

REST = {"score": {}, "policy": "p", "base": "b"}  # of results.json, which is read whole
GIVEN = REST | {"win_rate": {}}


def policy_pool(folder, generator, scores, seed=0, order=(0, 1, 2)):
    """A pool of one row, prompts in `order`; `scores` {reward: (P, K)} of PROMPTS; latents do not matter."""
    made = {"seed": seed, "generator": generator, "latent_space": "l", "text_encoders": "t"}
    name = f"tiny-{generator[:8]}-{seed}-test"
    pool = Pool.create(folder / "evaluation" / "pool" / name, Manifest(prompts_per_shard=4, **made))
    pool.append_prompts([PROMPTS[number] for number in order], "test")
    [shard] = pool.shards(len(scores["alignment"][0]))
    pool.write_latents(shard, torch.zeros(len(PROMPTS), len(shard.candidates), 1, 2, 2), {})
    for name, values in scores.items():
        pool.write_scores(KEYS[name], shard, torch.tensor([values[number] for number in order]), {})


def write_run(folder, scores, generator="a" * 64, mean=0.6, order=(0, 1, 2), **changes):
    """What a run directory holds after its evaluation, as far as comparisons read it."""
    policy_pool(folder, generator, scores, order=order)
    settings = {
        "prompts": [prompt.id for prompt in PROMPTS],
        "seed": 0,
        "images_per_prompt": 2,
        "rewards": KEYS,
        "policy_generator": generator,
    }
    results = {
        "win_rate": {name: {"mean": mean, "low": mean - 0.05, "high": mean + 0.05} for name in KEYS},
        "oracle": {"alignment": {"policy": 0.75, "base": 0.5, "low": 0.2, "high": 0.3}},
        **REST,
    }
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "evaluation" / "settings.json").write_text(json.dumps(settings | changes))
    (folder / "evaluation" / "results.json").write_text(json.dumps(results))
    return folder


FIRST = {"alignment": [[3.0, 1.0], [2.0, 2.0], [0.0, 1.0]], "looks": [[1.0, 1.0]] * 3}
SECOND = {"alignment": [[1.0, 2.0], [2.0, 2.0], [5.0, 6.0]], "looks": [[0.0, 0.0], [0.0, 0.0], [0.0, 2.0]]}


@pytest.fixture
def runs(tmp_path):
    """Two runs of different policies."""
    return write_run(tmp_path / "0", FIRST), write_run(tmp_path / "1", SECOND, "b" * 64, mean=0.45)


def printed(folders):
    console = Console(record=True, width=100, file=io.StringIO())
    compared = compare_runs(folders, console)
    return compared, console.export_text()


# ---- head to head


def test_hand_worked_head_to_head(runs):
    found = head_to_head(*runs)
    # alignment, prompt 1: 3 beats 1 and 2, 1 ties with 1 and loses to 2: 2.5 of 4;
    # prompt 2: all tie; prompt 3: all lost
    assert found["alignment"]["mean"] == pytest.approx((0.625 + 0.5 + 0.0) / 3)
    # looks: 1 beats 0 everywhere but for the third prompt, where each of two loses to 2: 2 of 4
    assert found["looks"]["mean"] == pytest.approx((1 + 1 + 0.5) / 3)
    # a resample is the third prompt alone with probability 1/27 = 3.7 % > 2.5 %, without it with 8/27
    assert (found["looks"]["low"], found["looks"]["high"]) == (0.5, 1.0)


def test_swapping_the_runs_gives_the_complement(runs):
    forward, backward = head_to_head(*runs), head_to_head(*reversed(runs))
    for name in KEYS:
        assert forward[name]["mean"] + backward[name]["mean"] == pytest.approx(1)
    same = {"mean": 0.5, "low": 0.5, "high": 0.5, "p": 1.0, "holm": 1.0, "prompts_needed": None}
    assert head_to_head(runs[0], runs[0])["alignment"] == same


def test_prompts_are_matched_by_identity_not_by_their_place_in_the_pool(tmp_path, runs):
    # prompts may stand elsewhere in a pool that was appended to
    shuffled = write_run(tmp_path / "2", SECOND, "c" * 64, order=(2, 0, 1))
    assert head_to_head(runs[0], shuffled) == head_to_head(*runs)


def test_the_images_of_the_finished_evaluation_count(runs):
    expected = head_to_head(*runs)
    # an interrupted evaluation of another policy, and one of another seed; both sort before what counts
    policy_pool(runs[1], "a" * 64, FIRST)
    policy_pool(runs[1], "b" * 64, FIRST, seed=-1)
    assert head_to_head(*runs) == expected


def test_images_that_are_gone(runs):
    for manifest in (runs[0] / "evaluation" / "pool").glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(InputError, match=r"no longer holds the images of results.json; remove"):
        head_to_head(*runs)


def test_scores_that_are_gone(runs):
    for path in (runs[0] / "evaluation" / "pool").glob("*/scores"):
        path.rename(path.with_name("away"))
    with pytest.raises(
        InputError, match=r"has not scored .* prompts; remove .*/0/evaluation and run evaluate.py run="
    ):
        head_to_head(*runs)


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("prompts", [], "must be a list of ids, each of them once"),
        ("prompts", [PROMPTS[0].id] * 2, "must be a list of ids, each of them once"),
        ("rewards", {"alignment": "../../x"}, "rewards.alignment=../../x: must be a name"),
        ("rewards", {"alignment": "/etc"}, "rewards.alignment=/etc: must be a name"),
        (
            "images_per_prompt",
            10**12,
            "images_per_prompt=1000000000000: must be a whole number from 1 to 1000000",
        ),
        ("seed", -1, "seed=-1: must be a whole number"),
    ],
)
def test_settings_from_elsewhere_that_cannot_be_used_are_named(tmp_path, runs, key, value, fault):
    path = runs[0] / "evaluation" / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError, match=rf"settings.json cannot be read \(.*{fault}"):
        head_to_head(*runs)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("images_per_prompt", 4),
        ("prompts", [PROMPTS[0].id]),
        ("rewards", {"alignment": "alignment-22222222"}),
    ],
)
def test_runs_of_other_prompts_seeds_images_or_rewards_are_refused(tmp_path, runs, key, value):
    other = write_run(tmp_path / "2", SECOND, "c" * 64, **{key: value})
    with pytest.raises(InputError, match=f"evaluated with different {key}; evaluate both with the same"):
        head_to_head(runs[0], other)


# ---- table


def test_two_runs_in_tables(runs):
    compared, text = printed(runs)
    stored = [json.loads((run / "evaluation" / "results.json").read_text()) for run in runs]
    assert compared["results"] == dict(zip(map(str, runs), stored, strict=True))
    assert compared["head_to_head"] == head_to_head(*runs)
    assert "60.0 (55.0–65.0)" in text and "45.0 (40.0–50.0)" in text
    assert "0.500 → 0.750" in text
    assert "37.5 (0.0–62.5)" in text  # 1.125 / 3; prompts 1 or 3 alone are 1/27 of the resamples each
    # 0.125, 0 and -0.5 from one half: mean -0.125, s^2 = 0.109375; (2.8016 / 0.125)^2 0.109375 = 54.9
    assert "about 55 prompts would show it" in text


def test_more_runs_have_no_duel_and_may_have_other_rewards(tmp_path, runs):
    third = write_run(tmp_path / "2", SECOND, "c" * 64)
    path = third / "evaluation" / "results.json"
    path.write_text(json.dumps(REST | {"win_rate": {"novelty": {"mean": 0.7, "low": 0.6, "high": 0.8}}}))
    compared, text = printed([*runs, third])
    assert compared["head_to_head"] is None and len(compared["results"]) == 3
    assert "novelty" in text and "70.0 (60.0–80.0)" in text


def test_a_run_without_results_is_named(tmp_path, runs):
    (tmp_path / "2").mkdir()
    for held, remedy in (
        ("policy/", r"run evaluate.py policy=.*/2/policy hydra.run.dir=.*/2/evaluation"),  # of a soup
        ("config.yaml", "finish its training first"),
        ("outcome.json", "run evaluate.py run=.*/2"),
    ):
        place = tmp_path / "2" / held
        place.mkdir() if held.endswith("/") else place.write_text("{}")
        with pytest.raises(InputError, match=f"2 has not been evaluated.*{remedy}"):
            printed([*runs, tmp_path / "2"])
    for name, remedy in (("2/policy", "give the run's own directory, .*/2"), ("3", "which train.py printed")):
        with pytest.raises(InputError, match=f"{name} has not been evaluated.*{remedy}"):
            printed([*runs, tmp_path / name])
    (runs[1] / "evaluation" / "results.json").write_text("{")
    with pytest.raises(InputError, match=r"1/evaluation/results.json cannot be read"):
        printed(runs)


def test_results_of_an_earlier_policy_are_not_those_of_the_run(runs):
    outcome = runs[0] / "outcome.json"
    for own in ("p", "b"):  # that of a negative model, whose results name the base
        outcome.write_text(json.dumps({"policy": "p"}))
        (runs[0] / "evaluation" / "results.json").write_text(json.dumps({**GIVEN, "policy": own}))
        assert current_results(runs[0]) is not None
    outcome.write_text(json.dumps({"policy": "later"}))
    (runs[0] / "evaluation" / "results.json").write_text(json.dumps(GIVEN))
    assert current_results(runs[0]) is None and not is_evaluated(runs[0])
    with pytest.raises(
        InputError, match=r"0/evaluation/results.json is of another policy than .*outcome.json"
    ):
        printed(runs)


def test_an_evaluation_counts_only_when_it_is_whole(runs):
    place = runs[0] / "evaluation"
    for name in ("win_rates.csv", "report.html"):
        assert not is_evaluated(runs[0])
        (place / name).touch()
    assert is_evaluated(runs[0])
    rate = {"mean": 2.5, "low": 3, "high": 1}
    for name, text in (
        ("results.json", "{"),
        ("results.json", json.dumps({**GIVEN, "win_rate": {"looks": rate}})),
        ("results.json", json.dumps({**GIVEN, "drift": 3})),
        ("settings.json", "{}"),
    ):
        before = (place / name).read_text()
        (place / name).write_text(text)
        assert not is_evaluated(runs[0])
        (place / name).write_text(before)
    (place / "settings.json").unlink()  # of an evaluation that was killed while it wrote
    assert not is_evaluated(runs[0])


# ---- which runs


def test_a_list_is_taken_as_it_stands():
    assert run_folders(["b", "a"]) == [Path("b"), Path("a")]


def test_a_run_that_is_named_twice_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "0")
    with pytest.raises(InputError, match="runs: a is named twice, and would count as two runs: name it once"):
        run_folders(["a", "b", "a"])
    with pytest.raises(InputError, match=f"link is named twice and as {tmp_path}/0, and would"):
        run_folders([str(tmp_path / "0"), str(tmp_path / "link")])


def test_jobs_of_a_multirun_in_their_order(tmp_path):
    for number in (10, 2, 0):
        write_run(tmp_path / str(number), FIRST)
    (tmp_path / "1").mkdir()  # a job that failed: it has a configuration, but no result
    (tmp_path / "1" / "config.yaml").write_text("seed: 0\n")
    expected = [tmp_path / "0", tmp_path / "2", tmp_path / "10"]
    assert run_folders(str(tmp_path)) == run_folders([str(tmp_path)]) == expected
    assert run_folders(str(tmp_path / "2")) == [tmp_path / "2"]


def test_no_run_at_all(tmp_path):
    with pytest.raises(InputError, match="no run directory there"):
        run_folders(str(tmp_path))
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(InputError, match="none of its 1 jobs has been evaluated"):
        run_folders(str(tmp_path))
