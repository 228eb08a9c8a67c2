import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from capo.errors import InputError
from capo.rewards.blip_vqa_hf import BlipVQAHF, noun_phrases, question
from fixtures.configuration import composed_rewards
from fixtures.tiny_blip import ByHand, build_blip
from fixtures.tiny_clip import noise_images

IMAGES = noise_images(4)
PROMPTS = ["a green bench and a red cat", "the dog", "there and then or", "a red cat, a green dog on a bed"]
ASKED = [["a green bench?", "a red cat?"], ["the dog?"], ["then?"], ["a red cat?", "a green dog?", "a bed?"]]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip")
    return folder, ByHand(build_blip(folder))


@pytest.fixture(scope="module")
def scorer(built):
    return BlipVQAHF(str(built[0]))


def test_the_score_is_the_product_over_the_questions_of_the_published_ratio(built, scorer):
    by_hand = built[1]
    expected, single = [], []
    for image, questions in zip(IMAGES, ASKED, strict=True):
        rates = [by_hand.yes(image, asked) for asked in questions]
        single += rates
        expected.append(torch.tensor(rates).prod())
    assert max(single) - min(single) > 0.2  # or the product would say little
    scores = scorer(IMAGES, PROMPTS)
    assert scores.dtype == torch.float32 and [scorer.questions(prompt) for prompt in PROMPTS] == ASKED
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert scorer([], []).shape == (0,)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_score_does_not_change_with_its_neighbors(built, scorer, batch):
    """Questions of other lengths stand beside it, and images with more of them."""
    order = [3, 1, 0, 2]
    torch.testing.assert_close(
        BlipVQAHF(str(built[0]), batch=batch)([IMAGES[i] for i in order], [PROMPTS[i] for i in order]),
        scorer(IMAGES, PROMPTS)[order],
        rtol=1e-5,
        atol=1e-6,
    )


def test_long_questions_are_cut_as_the_official_scorer_does(built, scorer, tmp_path):
    """50 words, then 35 tokens, of which the last is the end: the 34th word is not read."""
    long = " ".join(["red"] * 33 + ["blue"] * 30)
    file = tmp_path / "phrases.json"
    file.write_text(json.dumps({"long": [long]}))
    found = BlipVQAHF(str(built[0]), phrases=str(file))(IMAGES[:1], ["long"])
    assert found.item() == pytest.approx(built[1].yes(IMAGES[0], " ".join(["red"] * 33)), abs=1e-5)
    assert len(question(long).split()) == 50


def test_phrases_by_the_rule():
    found = {
        "a plastic toy and a glass bottle": ["a plastic toy", "a glass bottle"],
        "rubber sole shoes and fluffy clouds": ["rubber sole shoes", "fluffy clouds"],
        "a triangular slice of pizza and a cubic Rubik's cube.": [
            "a triangular slice", "pizza", "a cubic Rubik's cube",
        ],
        "The tall tree, (the short one) near The Hague": ["The tall tree", "the short one", "The Hague"],
        "The wooden spoon boil the fluffy noodles": ["The wooden spoon boil", "the fluffy noodles"],
        "The round knob and the square plate were firmly attached to the door, its lids are a pair": [
            "The round knob", "the square plate", "the door", "its lids", "a pair",
        ],
        "a": [],
    }  # fmt: skip
    assert {prompt: noun_phrases(prompt) for prompt in found} == found


def test_questions_are_prepared_as_officially(scorer):
    assert question('The "BIG" (round) dog.') == "the big round dog?"
    assert scorer.questions("a cat on top of the side") == ["a cat?"]  # two that are not asked
    assert len(scorer.questions(", ".join(["a cat"] * 12))) == 8
    assert scorer.questions("and of a") == [] and scorer(IMAGES[:1], ["and of a"]).tolist() == [1.0]


def test_phrases_of_a_file(built, tmp_path):
    file = tmp_path / "phrases.json"
    file.write_text(json.dumps({"a cat  sits ": ["a cat", "the left", "Sits."]}))
    scorer = BlipVQAHF(str(built[0]), phrases=str(file))
    assert scorer.questions("a cat sits") == ["a cat?", "sits?"]
    with pytest.raises(InputError, match=r"blip-vqa-hf.scorer.phrases: has no prompt 'a dog'; give a file"):
        scorer(IMAGES[:1], ["a dog"])
    for content, says in (
        ("[]", "phrases.json: "),
        ("{", "phrases.json: "),
        ('{"a cat": "a cat"}', "'a cat' has no list of phrases; give a JSON file"),
        ('{"a cat": [1]}', "'a cat' has no list of phrases"),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=says):
            BlipVQAHF(str(built[0]), phrases=str(file))
    with pytest.raises(InputError, match=r"scorer.phrases=.*none.json: no such file; give a JSON file"):
        BlipVQAHF(str(built[0]), phrases=str(tmp_path / "none.json"))


def test_weights_that_are_another_models(built, tmp_path):
    with pytest.raises(InputError, match=r"rewards\.blip-vqa-hf\.weights=me/none .* is not here"):
        BlipVQAHF("me/none")
    folder = tmp_path / "blip"
    shutil.copytree(built[0], folder)
    words = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(words.replace('"yes"', '"yea"'))
    with pytest.raises(InputError, match=r"its tokenizer lacks 'yes' or 'no'; give Salesforce/blip-vqa-base"):
        BlipVQAHF(str(folder))
    (folder / "tokenizer.json").write_text(words)
    state = load_file(folder / "model.safetensors")
    del state["text_decoder.cls.predictions.transform.dense.bias"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks text_decoder\.cls\.predictions\.transform\.dense\.bias;"):
        BlipVQAHF(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "clip"}))
    with pytest.raises(InputError, match=r"a model of type clip, this reward reads Salesforce/blip-vqa-base"):
        BlipVQAHF(str(folder))


def test_the_yaml_reaches_the_scorer(built, scorer):
    (reward,) = composed_rewards("rewards=blip_vqa_hf", f"rewards.blip-vqa-hf.weights={built[0]}")
    assert reward.name == "blip-vqa-hf" and reward.needs_prompt
    reward.setup("cpu")
    assert torch.equal(reward.score(IMAGES, PROMPTS), scorer(IMAGES, PROMPTS))
