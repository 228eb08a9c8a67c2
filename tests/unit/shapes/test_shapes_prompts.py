from collections import Counter

import numpy as np
import pytest

from capo.data.prompts import check_splits, prompt_id
from capo.errors import InputError
from capo.shapes import prompts as grammar
from capo.shapes.captions import WORDS, caption, parse
from capo.shapes.make.scenery import allowed
from capo.shapes.make.text import LENGTH, tokenizer
from capo.shapes.prompts import CATEGORIES, TRAINING, prompt_sets, split_of, training_request
from capo.shapes.scenes import BACKGROUNDS, SHAPES, UNUSUAL


@pytest.fixture(scope="module")
def splits():
    return prompt_sets(240, 80, 180, seed=0)


def names_unusual(text):
    return any((group.color, group.shape) in UNUSUAL for group in parse(text).groups)


def test_splits_are_disjoint_and_of_the_size_asked(splits):
    check_splits(splits)  # raises for a text in two splits or twice in one
    assert {name: len(prompts) for name, prompts in splits.items()} == {
        "train": 240,
        "validation": 80,
        "test": 180,
    }
    for name, prompts in splits.items():
        assert {split_of(prompt.text) for prompt in prompts} == {name}
        assert all(prompt.id == prompt_id(prompt.text) for prompt in prompts)


def test_a_sentence_keeps_its_split_at_any_seed_and_size(splits):
    other = prompt_sets(200, 50, 200, seed=7)
    assert not {p.text for p in other["train"]} & {p.text for p in splits["test"]}
    assert not {p.text for p in splits["train"]} & {p.text for p in other["test"]}
    assert prompt_sets(20, 5, 5, seed=0)["train"] == splits["train"][:20]


def test_unusual_combinations_are_in_test_prompts_only(splits):
    for name in ("train", "validation"):
        assert not any(names_unusual(prompt.text) for prompt in splits[name])
    odd = [prompt for prompt in splits["test"] if names_unusual(prompt.text)]
    assert odd and {prompt.category for prompt in odd} == {"unusual"}
    assert {prompt.category for prompt in splits["test"]} == set(CATEGORIES)


def test_which_categories_a_split_has():
    singles = [f"a {shape} on a {background} background" for shape in SHAPES for background in BACKGROUNDS]
    assert "validation" not in {
        split_of(text) for text in singles
    }  # there are only 32, none of which is in it


@pytest.mark.parametrize(
    ("split", "names"), [("train", TRAINING), ("validation", TRAINING[1:]), ("test", tuple(CATEGORIES))]
)
def test_any_prefix_is_balanced_over_the_categories(splits, split, names):
    for length in (len(names), 2 * len(names) + 3, 72):
        counts = Counter(prompt.category for prompt in splits[split][:length])
        assert set(counts) == set(names)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_what_is_trained_on_is_no_test_prompt():
    rng = np.random.default_rng(3)
    for _ in range(500):
        request = training_request(rng)
        assert (
            allowed(request) and split_of(caption(request)) != "test" and not names_unusual(caption(request))
        )


def test_more_prompts_than_the_grammar_has_is_refused(monkeypatch):
    # 8 shapes on 4 backgrounds: 32 sentences over all splits
    monkeypatch.setattr(grammar, "TRAINING", ("single",))
    every = {f"a {shape} on a {background} background" for shape in SHAPES for background in BACKGROUNDS}
    there = sum(split_of(text) == "train" for text in every)
    assert 10 < there < 30
    assert {prompt.text for prompt in prompt_sets(there, 0, 0)["train"]} == {
        text for text in every if split_of(text) == "train"
    }
    with pytest.raises(
        InputError, match=rf"prompts.train={there + 1}: the shapes grammar has only about {there} such"
    ):
        prompt_sets(there + 1, 0, 0)


def test_every_word_is_one_token_and_every_sentence_fits(splits):
    told = tokenizer()
    for word in WORDS:
        assert len(told(word).input_ids) == 3, word  # start, the word, end
    longest = max(
        splits["test"] + splits["train"], key=lambda prompt: len(prompt.text.replace(",", " ,").split())
    )
    ids = told(longest.text).input_ids
    assert len(ids) == len(longest.text.replace(",", " ,").split()) + 2 <= LENGTH
    assert len({tuple(told(word).input_ids) for word in WORDS}) == len(WORDS)
