"""Scoring a pool: batches are decoded ahead, rewards of other processes work beside those of this one."""

import dataclasses
import threading
import time

import pytest
import torch

from capo.backbones.sampling import SamplerSettings
from capo.data import stages
from capo.data.engines import LocalEngine
from capo.data.generation import ImageGenerator, PoolSpec, fill_pool, open_pool, stages_of
from capo.data.prompts import make_prompt
from capo.errors import InputError
from capo.rewards import Reward, load_rewards
from fixtures.fake_backbone import FakeBackbone
from fixtures.fake_rewards import brightness

PROMPTS = [make_prompt(text) for text in ("a red circle", "a blue square", "the green triangle")]
SETTINGS = SamplerSettings(steps=2, guidance=3.0, batch=3)
PATIENCE = 240  # seconds
THEIRS = """
import time
from pathlib import Path

class Sum:
    def __call__(self, images, prompts):
        return [sum(image.tobytes()) + len(prompt) for image, prompt in zip(images, prompts)]

class Meets(Sum):
    def __init__(self, folder):
        self.folder = Path(folder)

    def __call__(self, images, prompts):
        (self.folder / "there").touch()
        while not (self.folder / "here").exists():
            time.sleep(0.01)
        return super().__call__(images, prompts)

class Hangs(Sum):
    def __init__(self, folder):
        self.folder = Path(folder)

    def __call__(self, images, prompts):
        (self.folder / "there").touch()
        time.sleep(1000)
"""


def total(images, prompts):
    pairs = zip(images, prompts, strict=True)
    return torch.tensor([float(sum(image.tobytes()) + len(prompt)) for image, prompt in pairs])


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Makes a reward whose scorer runs in another process."""
    (tmp_path / "theirs.py").write_text(THEIRS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(name, *arguments):
        scorer = {"_target_": f"theirs.{name}", "_args_": [str(argument) for argument in arguments]}
        (reward,) = load_rewards({name.lower(): {"scorer": scorer, "isolated": True, "timeout": PATIENCE}})
        return reward

    return make


def scored(root, generator, rewards, overlap):
    """A pool of three prompts with five candidates, scored with or without overlap."""
    spec = PoolSpec(root, "tiny", "train", 5, PROMPTS, candidates=5, prompts_per_shard=2)
    pool = fill_pool(spec, generator, stages=("text", "latents"), progress=False)
    stage = stages_of(pool, spec, generator, rewards, True)[-1]
    stage.overlap = overlap
    LocalEngine().run([stage], progress=False)
    return {str(path.relative_to(pool.folder)): path.read_bytes() for path in pool.folder.rglob("scores/*/*")}


@pytest.mark.parametrize("parallel", ["operations", "batches"])
def test_scores_are_the_same_with_and_without_overlap(tiny_backbone, tmp_path, elsewhere, parallel):
    settings = dataclasses.replace(SETTINGS, parallel=parallel)
    generator = ImageGenerator.base(tiny_backbone, settings)
    rewards = [Reward("brightness", brightness), elsewhere("Sum"), Reward("total", total)]
    plain = scored(tmp_path / "plain", generator, rewards, False)
    assert len(plain) == 6 and scored(tmp_path / "ahead", generator, rewards, True) == plain
    spec = PoolSpec(tmp_path / "ahead", "tiny", "train", 5, PROMPTS, candidates=5, prompts_per_shard=2)
    found = open_pool(spec, generator).scores([reward.key for reward in rewards], 5)
    assert torch.equal(found[..., 1], found[..., 2]) and len(found[..., 1].unique()) == 15


@pytest.mark.parametrize(("device", "ahead"), [("cpu", False), ("cuda", True)])
def test_on_another_device_than_the_cpu_a_batch_is_decoded_while_the_one_before_is_scored(
    tmp_path, device, ahead, monkeypatch
):
    """The first of two batches is scored until the second one begins to be decoded, if that is ever."""
    begun, seen = threading.Event(), []
    monkeypatch.setattr(stages, "model_of", lambda device: "a GPU")

    class Watched(FakeBackbone):
        def decode(self, latents, batch=8):
            if len(latents) == 1:
                begun.set()
            return super().decode(latents, batch)

    def waits(images, prompts):
        if len(images) == 3:
            seen.append(begun.wait(PATIENCE if ahead else 0.05))
        assert threading.current_thread() is threading.main_thread()
        return torch.zeros(len(images))

    backbone = Watched()
    spec = PoolSpec(tmp_path, "tiny", "train", 5, PROMPTS[:1], candidates=4)
    generator = ImageGenerator.base(backbone, SETTINGS)
    fill_pool(spec, generator, stages=("text", "latents"), progress=False)
    backbone.device = torch.device(device)  # nothing is there: the fake has no network
    fill_pool(spec, generator, [Reward("waits", waits)], stages=("scores",), progress=False)
    assert seen == [ahead]


def test_a_reward_of_another_process_works_beside_those_of_this_one(tmp_path, elsewhere):
    """Each waits for the other, in another process and here."""

    def meets(images, prompts):
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "there").exists():
            assert time.monotonic() < deadline, "the other reward has not begun"
            time.sleep(0.01)
        (tmp_path / "here").touch()
        return torch.zeros(len(images))

    generator = ImageGenerator.base(FakeBackbone(), SETTINGS)
    rewards = [elsewhere("Meets", tmp_path), Reward("meets", meets)]
    assert len(scored(tmp_path / "pools", generator, rewards, True)) == 4


def test_an_error_here_does_not_wait_for_an_answer_from_there(tmp_path, elsewhere):
    def fails(images, prompts):
        while not (tmp_path / "there").exists():
            time.sleep(0.01)
        return torch.full((len(images),), torch.nan)

    generator, rewards = ImageGenerator.base(FakeBackbone(), SETTINGS), [elsewhere("Hangs", tmp_path)]
    began = time.monotonic()
    with pytest.raises(InputError, match="'fails' is nan"):
        scored(tmp_path / "pools", generator, [*rewards, Reward("fails", fails)], True)
    assert time.monotonic() - began < PATIENCE / 2


def test_an_error_of_the_thread_that_decodes_is_raised(tmp_path):
    class Broken(FakeBackbone):
        def decode(self, latents, batch=8):
            raise InputError("no room to decode")

    generator = ImageGenerator.base(Broken(), SETTINGS)
    with pytest.raises(InputError, match="no room to decode"):
        scored(tmp_path / "pools", generator, [Reward("brightness", brightness)], True)
