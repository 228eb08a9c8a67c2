"""`check NAME --published FOLDER`: the published scores of four pictures, beside a reward's own."""

import re

import pytest
import torch
from PIL import Image

from capo.cli.rewards import main
from capo.errors import InputError
from capo.rewards import Reward
from capo.rewards.published import NAMES, PROMPT, PUBLISHED, compared, pictures
from capo.rewards.selfcheck import FAILED, PASSED, WARNING
from fixtures.configuration import composed_rewards
from fixtures.tiny_clip import build_clip

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    """Gray pictures of the published names and size; each is known by its level."""
    for number, name in enumerate(NAMES):
        gray = (40 * (number + 1),) * 3
        Image.new("RGB", (512, 512), gray).save(tmp_path / name, lossless=True)
    return tmp_path


class Known:
    """Scores of the four pictures by their level, `added` to the third; only for the published prompt."""

    def __init__(self, scores, added=0.0):
        self.scores, self.added, self.moved = scores, added, []

    def to(self, device):
        self.moved.append(str(device))

    def __call__(self, images, prompts):
        assert set(prompts) == {PROMPT}
        numbers = [image.getpixel((0, 0))[0] // 40 - 1 for image in images]
        return torch.tensor([self.scores[n] + self.added * (n == 2) for n in numbers])


@pytest.mark.parametrize(
    ("name", "added", "outcome"),
    [
        # spread of imagereward: 0.5812 + 2.0296 = 2.6108, of which 2 % are 0.0522
        ("imagereward", 0.0, PASSED),
        ("imagereward", 0.052, PASSED),
        ("imagereward", -0.053, FAILED),
        # of hpsv2: 0.2321 - 0.1923 = 0.0398, 0.0008
        ("hpsv2", 0.0007, PASSED),
        ("hpsv2", 0.0009, FAILED),
        # of mps: 10.92 - 9.25 = 1.67, 0.0334; made otherwise, so that it may differ
        ("mps", 0.033, PASSED),
        ("mps", 0.034, WARNING),
    ],
)
def test_scores_agree_within_a_share_of_the_published_spread(folder, name, added, outcome):
    scorer = Known(PUBLISHED[name].scores, added)
    finding = compared(Reward(name, scorer), pictures(folder), CPU)
    assert (finding.name, finding.outcome) == ("published scores", outcome)
    third = PUBLISHED[name].scores[2]
    assert f"3.webp {third + added:.4f}, published {third:g}" in finding.found
    assert ("antialias=false" in finding.remedy) == (name == "hpsv2" and outcome == FAILED)
    assert scorer.moved == ["cpu", "cpu"]  # taken there, and given back


def test_a_reward_without_published_scores_is_not_compared(folder):
    assert compared(Reward("mine", Known([])), pictures(folder), CPU).found.startswith("none are known")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_scores_lie_in_the_declared_range(name):
    (reward,) = composed_rewards(f"rewards={name}")
    least, most = reward.range
    assert all(least <= score <= most for score in PUBLISHED[name].scores)


def test_pictures_that_are_missing_or_of_another_size(folder):
    Image.new("RGB", (256, 512)).save(folder / "2.webp")
    with pytest.raises(InputError, match=r"--published .*2\.webp has 256 x 512 pixels.*512 x 512"):
        pictures(folder)
    (folder / "2.webp").write_text("no picture")
    with pytest.raises(InputError, match=r"--published .*: no picture 2\.webp"):
        pictures(folder)
    (folder / "1.webp").unlink()
    with pytest.raises(InputError, match=r"no picture 1\.webp .*the folder must hold 1\.webp, .*ImageReward"):
        pictures(folder)


def test_the_command_compares(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("capo.rewards.selfcheck.SHORTEST", 0.0)  # the speed is that of one call
    build_clip(folder / "clip")
    own = [
        f"pickscore.weights={folder / 'clip'}",
        "pickscore.revision=null",
        "pickscore.scorer.processor=null",
    ]
    command = ["check", "pickscore", *own, "--device", "cpu", "--published", str(folder)]
    assert main(command) == 1
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "published scores" in told and re.search(r"1\.webp -?\d+\.\d{4}, published 20\.737", told)
    assert main(["check", "looks", "--device", "cpu", "--published", str(folder)]) == 1
    assert "no published scores of looks are known; there are of imagereward" in capsys.readouterr().err
    assert main([*command[:-1], str(folder / "nowhere")]) == 1
    assert "no picture 1.webp" in capsys.readouterr().err
