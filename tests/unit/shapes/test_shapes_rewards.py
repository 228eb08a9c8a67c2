from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from scipy.stats import spearmanr

from capo.cli.build import build_components
from capo.cli.compose import composed
from capo.cli.resolvers import shipped
from capo.errors import InputError
from capo.rewards import Reward, load_rewards
from capo.shapes.captions import caption
from capo.shapes.make.lineups import changed
from capo.shapes.make.scenery import random_style
from capo.shapes.prompts import CATEGORIES, TRAINING
from capo.shapes.rating import rating
from capo.shapes.render import render
from capo.shapes.rewards import AlignmentScorer, LooksScorer, PreferenceScorer
from capo.shapes.scenes import realize

WEIGHTS = Path(shipped("rewards"))
SCORERS = {"alignment": AlignmentScorer, "looks": LooksScorer, "preference": PreferenceScorer}


@pytest.fixture(scope="module")
def scorers():
    return {name: scorer(WEIGHTS / f"{name}.safetensors") for name, scorer in SCORERS.items()}


@pytest.fixture(scope="module")
def pictures():
    """Return pictures in usual styles, and for each a sentence that holds and one that does not."""
    rng = np.random.default_rng(21)
    found = []
    for index in range(96):
        request = CATEGORIES[TRAINING[index % len(TRAINING)]](rng)
        scene = realize(request, rng, random_style(rng))
        found.append((Image.fromarray(render(scene)), caption(request), caption(changed(request, rng))))
    return [list(column) for column in zip(*found, strict=True)]


@pytest.mark.parametrize("name", SCORERS)
def test_weights_are_small_halves_and_scores_full_floats(scorers, pictures, name):
    from safetensors.torch import load_file

    state = load_file(WEIGHTS / f"{name}.safetensors")
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float16}
    assert sum(t.numel() for t in state.values()) <= 500_000
    scores = scorers[name](pictures[0][:5], pictures[1][:5])
    assert scores.shape == (5,) and scores.dtype == torch.float32 and scores.isfinite().all()
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in scorers[name].module.parameters())


@pytest.mark.parametrize("name", SCORERS)
def test_a_score_is_its_own_whatever_stands_beside_it(scorers, pictures, name):
    images, prompts = pictures[0][:6], pictures[1][:6]
    together = scorers[name](images, prompts)
    alone = torch.cat(
        [scorers[name]([image], [prompt]) for image, prompt in zip(images, prompts, strict=True)]
    )
    turned = scorers[name](images[::-1], prompts[::-1]).flip(0)
    assert together == pytest.approx(alone.numpy(), abs=1e-4)
    assert together == pytest.approx(turned.numpy(), abs=1e-4)


def test_alignment_is_a_probability_that_prefers_what_is_true(scorers, pictures):
    images, true, false = pictures
    right, wrong = scorers["alignment"](images, true), scorers["alignment"](images, false)
    assert min(right.min(), wrong.min()) >= 0 and max(right.max(), wrong.max()) <= 1
    assert (right > wrong).float().mean() >= 0.85
    assert right.mean() > wrong.mean() + 0.4


def test_preference_leans_to_what_is_true(scorers, pictures):
    images, true, false = pictures
    assert (scorers["preference"](images, true) > scorers["preference"](images, false)).float().mean() >= 0.7


@pytest.mark.parametrize("name", ["alignment", "preference"])
def test_features_tell_pictures_apart_and_do_not_depend_on_what_stands_beside_them(scorers, pictures, name):
    images = pictures[0][:5]
    found = scorers[name].features(images)
    assert found.shape[0] == 5 and torch.pdist(found).min() > 0.1
    torch.testing.assert_close(scorers[name].features(images[::-1]).flip(0), found, rtol=1e-4, atol=1e-5)
    assert not hasattr(scorers["looks"], "features")


def test_looks_follows_the_rating_and_sees_no_prompt(scorers, pictures):
    images, true, false = pictures
    told = scorers["looks"](images, true)
    assert told.equal(scorers["looks"](images, false))
    assert told.min() >= 1 and told.max() <= 10
    assert spearmanr(told, [rating(image) for image in images]).statistic >= 0.7


def test_what_cannot_be_judged_is_refused(scorers, tmp_path):
    with pytest.raises(InputError, match=r"'hexagon'.*grammar"):
        scorers["alignment"]([Image.new("RGB", (64, 64))], ["a red hexagon"])
    with pytest.raises(InputError, match=r"\(32, 32\) pixels.* judge 64 x 64"):
        scorers["looks"]([Image.new("RGB", (32, 32))], ["a red circle"])
    with pytest.raises(InputError, match=r"rewards.looks.weights=.*none\.safetensors: no such file"):
        LooksScorer(tmp_path / "none.safetensors")


def test_weights_that_are_damaged_or_anothers_are_named_with_their_key(tmp_path):
    whole = WEIGHTS / "looks.safetensors"
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:20_000])
    with pytest.raises(InputError, match=rf"^rewards.looks.weights={cut}: no safetensors file and no state"):
        LooksScorer(cut)
    with pytest.raises(InputError, match=rf"^rewards.alignment.weights={whole}: its weights do not load"):
        AlignmentScorer(whole)


def test_prompts_of_other_grammars_are_judged_by_what_reads_none_and_refused_by_name_elsewhere(
    scorers, pictures
):
    images, _, _ = pictures
    others = ["une étoile", "word " * 99, ""]
    looks = Reward("looks", scorer=scorers["looks"])
    assert looks.score(images[:3], others).equal(looks.score(images[:3], ["a red circle"] * 3))
    for name in ("alignment", "preference"):
        with pytest.raises(
            InputError, match=rf'^image 0 \("une étoile"\) to .*: reward \'{name}\': prompt .*\'une\''
        ):
            Reward(name, scorer=scorers[name]).score(images[:3], others)


@pytest.mark.parametrize(("rewards", "told"), [
    ("alignment", "reward 'alignment': prompt 'une étoile': the rewards of the shapes world know no word"),
    ("looks", "reward 'alignment': .*; evaluation.oracle=null leaves the oracle out"),  # of the oracle
    ("looks evaluation.oracle=null", None),
])  # fmt: skip
def test_prompts_that_cannot_be_judged_are_refused_before_images_are_drawn(tmp_path, rewards, told):
    names, *others = rewards.split()
    splits = []
    for split, noun in {"train": "étoile", "validation": "lune", "test": "nuit"}.items():
        (tmp_path / f"{split}.txt").write_text(f"une {noun}\n")
        splits.append(f"prompts.{split}={tmp_path}/{split}.txt")
    cfg = composed("train", [
        "prompts=text", *splits, f"rewards={names}", f"rewards@evaluation.rewards={names}", *others,
        f"run_dir={tmp_path}",
    ])  # fmt: skip
    with nullcontext() if told is None else pytest.raises(InputError, match=told):
        build_components(cfg)


@pytest.mark.parametrize("package", ["rewards", "evaluation.rewards"])
def test_the_config_group_brings_three_rewards(package):
    cfg = composed(None, [f"+rewards@{package}=shapes"])
    rewards = load_rewards(OmegaConf.to_container(OmegaConf.select(cfg, package), resolve=True))
    assert [reward.name for reward in rewards] == ["alignment", "looks", "preference"]
    assert [reward.link for reward in rewards] == ["log", "identity", "identity"]
    assert [reward.needs_prompt for reward in rewards] == [True, False, True]
    image = Image.fromarray(np.full((64, 64, 3), 246, dtype=np.uint8))
    for reward in rewards:
        assert reward.score([image], ["a circle"]).shape == (1,)
        assert Path(reward.weights).parent == WEIGHTS
