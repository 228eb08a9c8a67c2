"""`python -m capo.rewards check`: what passes and what fails, on the shapes' rewards and a tiny CLIP."""

import json
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from capo.cli.rewards import check, chosen_device, main
from capo.errors import InputError
from capo.rewards import Reward
from capo.rewards.selfcheck import (
    FAILED,
    PASSED,
    PROMPTS,
    WARNING,
    Finding,
    Measured,
    findings,
    measure,
    pairs,
)
from capo.shapes.render import render
from capo.shapes.scenes import Scene, Thing
from fixtures.tiny_clip import build_clip

SCENES = {  # what the bundled pictures are
    "star": Scene((Thing("star", "yellow", "solid", 17, 32, 33),), "black"),
    "hearts": Scene(
        (Thing("heart", "red", "solid", 12, 18, 32), Thing("heart", "red", "solid", 12, 46, 32)), "white"
    ),
    "circles": Scene(
        tuple(Thing("circle", "blue", "solid", 9, x, y) for x, y in ((17, 18), (46, 20), (32, 46))), "white"
    ),
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def measured_at_once(monkeypatch):
    """The speed is that of one call, and not of as many as a second takes."""
    monkeypatch.setattr("capo.rewards.selfcheck.SHORTEST", 0.0)


def color(image):
    """Mean red, green and blue, 0-1."""
    return np.asarray(image).reshape(-1, 3).mean(0) / 255


class Fitting:
    """1 where the first color word of the prompt is the image's strongest against its background, else 0.

    Of its own image alone.
    """

    def __call__(self, images, prompts):
        return torch.tensor(
            [float(self.named(image) in prompt) for image, prompt in zip(images, prompts, strict=True)]
        )

    def named(self, image):
        red, _, blue = color(image)
        return "star" if red < 0.5 else "hearts" if red > blue else "circles"


class Neighbors(Fitting):
    """Less by what the batch's mean is."""

    def __call__(self, images, prompts):
        scores = super().__call__(images, prompts)
        return scores - scores.mean()


class Turned(Fitting):
    def __call__(self, images, prompts):
        return -super().__call__(images, prompts)


class Hollow(Fitting):
    def __call__(self, images, prompts):
        return super().__call__(images, prompts) / 0


def outcomes(reward, golden=None):
    return {finding.name: finding.outcome for finding in findings(reward, measure(reward, CPU), golden)}


def test_the_pictures_are_renders_of_these_scenes():
    images, prompts = pairs(64)
    assert prompts == [PROMPTS[name] for name in ("star", "hearts", "hearts", "circles", "circles", "star")]
    for image, scene in zip(images[::2], SCENES.values(), strict=True):
        assert np.abs(np.asarray(image, dtype=int) - render(scene)).max() <= 1
    assert {image.size for image in pairs()[0]} == {(512, 512)}


def test_a_sound_reward_passes():
    assert outcomes(Reward("x", Fitting(), range=(0, 1))) == dict.fromkeys(
        ("range", "order", "batch", "recorded scores"), PASSED
    )


@pytest.mark.parametrize(("scorer", "facts", "check", "outcome"), [
    (Turned(), {}, "order", FAILED),
    (Neighbors(), {}, "batch", FAILED),
    (Fitting(), {"range": (5, 6)}, "range", WARNING),
    (Fitting(), {"needs_prompt": False}, "prompt", FAILED),
])  # fmt: skip
def test_what_is_wrong_is_found(scorer, facts, check, outcome):
    found = outcomes(Reward("x", scorer, **facts))
    assert found[check] == outcome
    assert all(other == PASSED for name, other in found.items() if name != check)


class Moved(Fitting):
    """Says where it was taken; breaks on the device where it is told to."""

    def __init__(self, broken=False):
        self.where, self.broken = [], broken

    def to(self, device):
        self.where.append(str(device))

    def __call__(self, images, prompts):
        if self.broken:
            raise InputError("broken")
        return super().__call__(images, prompts)


def test_a_measured_reward_leaves_the_device_to_the_next_one():
    device, whole, broken = torch.device("cpu:0"), Moved(), Moved(broken=True)
    measure(Reward("x", whole), device)
    with pytest.raises(InputError, match="broken"):
        measure(Reward("x", broken), device)
    assert whole.where == broken.where == ["cpu:0", "cpu"]


def test_the_chosen_gpu_is_the_one_that_messages_tell_of(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert chosen_device("cuda:1") == torch.device("cuda:1") and chosen_device("cpu") == CPU
    chosen_device("cuda")
    assert current == [1, 0]
    with pytest.raises(
        InputError, match="--device cuda:2: torch finds 2 GPUs here; choose another one, or cpu"
    ):
        chosen_device("cuda:2")


def test_recorded_scores_are_compared_by_name_and_size():
    reward = Reward("x", Fitting())
    scores = measure(reward, CPU).scores
    measured = Measured(scores, scores, scores, 1.0, "")
    golden = {"device": "cpu", "versions": {"torch": "2"}, "scores": scores.tolist()}

    def recorded(change):
        other = scores.clone()
        other[1, 0] += change
        return findings(reward, measured, golden | {"scores": other.tolist()})[-1]

    assert recorded(0.0009).outcome == PASSED  # of a score of 1 the tolerance is 0.001
    finding = recorded(0.0021)
    assert finding.outcome == FAILED
    assert finding.found.startswith("hearts, prompt 1: 1, recorded 1.0021 (recorded on cpu with torch 2)")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_the_rewards_of_the_package_pass_against_their_recorded_scores(here, capsys):
    assert main(["check", "shapes", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert (
        told.count("the same (recorded on") == 3 and "failed" not in told and "images/s; peak memory" in told
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP whose two prompts differ; by its random weights it has no idea of shapes."""
    folder = tmp_path_factory.mktemp("clip")
    build_clip(folder)
    return [f"pickscore.weights={folder}", "pickscore.revision=null", "pickscore.scorer.processor=null"]


@pytest.mark.slow
def test_scores_are_recorded_and_compared_afterwards(here, clip, capsys, monkeypatch):
    monkeypatch.setattr(
        "capo.rewards.selfcheck._order", lambda scores: Finding("order", PASSED, "")
    )  # random weights have none
    command = ["check", "pickscore", *clip, "--device", "cpu"]
    assert main([*command, "--record"]) == 0
    path = here / "golden" / "pickscore.json"
    record = json.loads(path.read_text())
    assert (
        record["prompts"] == PROMPTS
        and {"torch", "transformers"} <= record["versions"].keys()
        and record["device"] == "cpu"
    )
    assert np.shape(record["scores"]) == (3, 2)
    capsys.readouterr()
    assert main(command) == 0
    assert "the same (recorded on cpu" in capsys.readouterr().out
    record["scores"][2][1] += 0.5
    path.write_text(json.dumps(record))
    assert main(command) == 1
    told = capsys.readouterr().out
    assert "circles, prompt 2:" in told and "failed" in told
    path.rename(here / "mine.json")
    assert main([*command, "--golden", "mine.json"]) == 1
    record["fingerprint"] = "0" * 64  # of other weights
    for name in ("mine.json", "golden/pickscore.json"):
        (here / name).write_text(json.dumps(record))
    assert main(command) == 0
    assert "none for this fingerprint" in capsys.readouterr().out
    assert main([*command, "--golden", "mine.json"]) == 1


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (
            None,
            r"--golden mine\.json: there is no such file, so no scores of fingerprint [0-9a-f]{8}; --record "
            r"writes them there",
        ),
        (
            json.dumps({"schema": 1, "fingerprint": "0" * 64}),
            r"--golden mine\.json: it has no scores of fingerprint [0-9a-f]{8}; --record",
        ),
        ("{}", r"mine\.json holds no recorded scores"),
        (
            json.dumps({"schema": 1, "fingerprint": "0" * 64, "name": "y"}),
            r"mine\.json holds scores of the reward y, not of x; remove it, or name another file: --golden",
        ),
    ],
    ids=["nowhere", "another", "unreadable", "another reward"],
)
def test_a_named_record_that_cannot_be_compared_with_fails_before_weights_are_loaded(
    here, capsys, content, fault
):
    if content:
        (here / "mine.json").write_text(content)
    moved = Moved(broken=True)
    options = Namespace(device=CPU, golden=Path("mine.json"), record=False, tolerance=1e-3, pictures=None)
    assert not check(Reward("x", moved), options, Console())
    told = capsys.readouterr().out
    assert re.search(fault, " ".join(told.replace("│", " ").split())) and "recorded scores" in told
    assert "weights and scores" not in told and not moved.where


def test_random_weights_fail_by_order_and_are_not_recorded(here, clip, capsys):
    build_clip(here / "other", seed=3)
    assert (
        main(
            [
                "check",
                "pickscore",
                *clip,
                f"rewards.pickscore.weights={here / 'other'}",
                "--device",
                "cpu",
                "--record",
            ]
        )
        == 1
    )
    told = capsys.readouterr().out
    assert "another image's prompt scores as high" in told and "nothing was recorded" in told
    assert not (here / "golden").exists()


@pytest.mark.parametrize(("command", "message"), [
    (["check", "pikscore"], "pikscore: no such reward"),
    (["check", "pickscore", "pickscore.weight=x"], "no key 'rewards.pickscore.weight'; did you mean"),
    (["check", "looks", "looks.weights=/nowhere"], "reward 'looks': no weights at /nowhere"),
    (["check", "pickscore", "pickscore.weights=nothing"], "no such file or folder"),
    (["check", "looks", "weights=x"], "weights=x: say of which reward, as in looks.weights=x"),
    (["check", "looks", "+rewards.scorer.x=1"], r"say of which reward, as in looks\.scorer\.x=1"),
    (["check", "looks", "--golden", "conf", "--record"], "conf is no file; remove it, or name another file"),
    (["check", "looks", "--golden", "broken.json"], "broken.json holds no recorded scores"),
    (["check", "shapes", "--golden", "x.json"], "a set of 3 rewards"),
    (["check", "looks", "--device", "gpu"], "--device gpu: must be cuda, cuda:NUMBER or cpu"),
    (["check", "tag", "--conf", "conf"], "tag.yaml"),
    (["check", "bytes", "--conf", "conf"], "is no UTF-8 text"),
])  # fmt: skip
def test_what_cannot_be_checked_says_so(here, capsys, command, message):
    (here / "broken.json").write_text("{}")
    (here / "conf" / "rewards").mkdir(parents=True)
    (here / "conf" / "rewards" / "tag.yaml").write_text("r: !!python/object/apply:os.system [ls]")
    (here / "conf" / "rewards" / "bytes.yaml").write_bytes(b"\xff\xfe")
    assert main(command) == 1
    told = capsys.readouterr()
    assert re.search(message, " ".join((told.out + told.err).replace("│", " ").split()))


def test_scores_that_are_not_finite_fail(here, capsys):
    options = Namespace(device=CPU, golden=None, record=False, tolerance=1e-3, pictures=None)
    assert not check(Reward("x", Hollow()), options, Console())
    assert "cannot be compared" in capsys.readouterr().out


def test_scores_are_not_recorded_over_another_file(here, capsys):
    own = here / "notes.txt"
    own.write_text("mine")
    assert main(["check", "looks", "--device", "cpu", "--record", "--golden", str(own)]) == 1
    told = capsys.readouterr().out
    assert own.read_text() == "mine" and "nothing was recorded" in told and "notes.txt" in told
    theirs = json.dumps({"schema": 1, "fingerprint": "0" * 64, "name": "y"})
    own.write_text(theirs)
    assert main(["check", "looks", "--device", "cpu", "--record", "--golden", str(own)]) == 1
    assert own.read_text() == theirs


class NoSide:
    @property
    def side(self):
        raise ValueError("no size")

    def __call__(self, images, prompts):
        return [0.0] * len(images)


def test_an_attribute_that_raises_is_named_with_its_reward():
    with pytest.raises(InputError, match=r"'odd': .* failed in its attribute `side`: ValueError: no size"):
        Reward("odd", {"_target_": f"{__name__}.NoSide"}).side  # noqa: B018
