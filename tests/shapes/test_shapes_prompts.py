from collections import Counter

import numpy as np
import pytest

from capo.errors import InputError
from capo.prompts import check_splits, prompt_id
from capo.shapes.captions import WORDS, caption, parse
from capo.shapes.make.scenery import allowed
from capo.shapes.make.text import LENGTH, tokenizer
from capo.shapes.prompts import CATEGORIES, TRAINING, prompt_sets, split_of, training_request
from capo.shapes.scenes import UNUSUAL


@pytest.fixture(scope="module")
def splits():
    return prompt_sets(400, 100, 300, seed=0)


def names_unusual(text):
    return any((group.colour, group.shape) in UNUSUAL for group in parse(text).groups)


def test_splits_are_disjoint_and_of_the_size_asked(splits):
    check_splits(splits)  # raises for a text in two splits or twice in one
    assert {name: len(prompts) for name, prompts in splits.items()} == {"train": 400, "validation": 100, "test": 300}
    for name, prompts in splits.items():
        assert {split_of(prompt.text) for prompt in prompts} == {name}
        assert all(prompt.id == prompt_id(prompt.text) for prompt in prompts)


def test_a_sentence_keeps_its_split_at_any_seed_and_size(splits):
    other = prompt_sets(300, 50, 400, seed=7)
    assert not {p.text for p in other["train"]} & {p.text for p in splits["test"]}
    assert not {p.text for p in splits["train"]} & {p.text for p in other["test"]}
    assert prompt_sets(20, 5, 5, seed=0)["train"] == splits["train"][:20]


def test_unusual_combinations_are_in_test_prompts_only(splits):
    for name in ("train", "validation"):
        assert not any(names_unusual(prompt.text) for prompt in splits[name])
    odd = [prompt for prompt in splits["test"] if names_unusual(prompt.text)]
    assert odd and {prompt.category for prompt in odd} == {"unusual"}
    assert {prompt.category for prompt in splits["test"]} == set(CATEGORIES)


@pytest.mark.parametrize(("split", "names"), [("train", TRAINING), ("validation", TRAINING), ("test", tuple(CATEGORIES))])
def test_any_prefix_is_balanced_over_the_categories(splits, split, names):
    for length in (len(names), 3 * len(names), 72):
        counts = Counter(prompt.category for prompt in splits[split][:length])
        assert set(counts) == set(names)
        assert max(counts.values()) - min(counts.values()) <= 2


def test_what_is_trained_on_is_no_test_prompt():
    rng = np.random.default_rng(3)
    for _ in range(500):
        request = training_request(rng)
        assert allowed(request) and split_of(caption(request)) != "test" and not names_unusual(caption(request))


def test_more_prompts_than_the_grammar_has_is_refused():
    with pytest.raises(InputError, match=r"prompts.validation=100000: the shapes grammar has only about \d+"):
        prompt_sets(1, 100_000, 1)


def test_every_word_is_one_token_and_every_sentence_fits(splits):
    told = tokenizer()
    for word in WORDS:
        assert len(told(word).input_ids) == 3, word  # start, the word, end
    longest = max(splits["test"] + splits["train"], key=lambda prompt: len(prompt.text.replace(",", " ,").split()))
    ids = told(longest.text).input_ids
    assert len(ids) == len(longest.text.replace(",", " ,").split()) + 2 <= LENGTH
    assert len({tuple(told(word).input_ids) for word in WORDS}) == len(WORDS)
