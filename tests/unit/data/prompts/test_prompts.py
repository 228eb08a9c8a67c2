import pytest

from capo.data.prompts import (
    Prompt,
    candidate_seed,
    check_splits,
    make_prompt,
    normalize,
    prompt_id,
    text_files,
)
from capo.errors import InputError


def test_normalize_collapses_white_space_and_composes():
    # "e" followed by the combining acute accent U+0301 is the one character U+00E9 in NFC
    assert normalize("  a\tcafe\u0301\u00a0 in\n\nParis ") == "a caf\u00e9 in Paris"


def test_prompt_id_is_blake2b_of_the_normalized_text():
    # printf 'a red circle' | b2sum -l 64
    assert prompt_id("a red circle") == "8cbf502735c9b035"
    assert make_prompt(" a  red\ncircle", "colors") == Prompt("8cbf502735c9b035", "a red circle", "colors")


def test_prompt_id_tells_case_and_order_apart():
    texts = ["a red circle", "a Red circle", "a circle red", "a red circle."]
    assert len({prompt_id(text) for text in texts}) == 4


def test_candidate_seed_by_hand():
    # printf '7/0123456789abcdef/3' | b2sum -l 64 is bca4c0320a926f80, less its last bit 6796600448234633152
    assert candidate_seed(7, "0123456789abcdef", 3) == 6796600448234633152


def test_candidate_seeds_depend_on_all_three():
    seeds = {
        candidate_seed(seed, prompt_id(text), index)
        for seed in (0, 1)
        for text in ("a circle", "a square")
        for index in range(50)
    }
    assert len(seeds) == 2 * 2 * 50
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": ["a circle"], "test": []}, "prompts 'test': the set is empty"),
        (
            {"train": ["a circle", "a square", " a  circle"]},
            r'train prompt 3 \("a circle"\) is also train prompt 1: remove one',
        ),
        (
            {"train": ["a circle"], "test": ["a star", "a circle"]},
            r'test prompt 2 \("a circle"\) is also train prompt 1: remove one',
        ),
        ({"train": ["a circle", " "]}, "train prompt 2 is empty"),
        (
            {"train": ["a circle", "ab" * 50_001]},
            r'train prompt 2 \("(ab){20}\.\.\."\) has 100,002 letters, more than the 100,000 that a prompt',
        ),
    ],
)
def test_check_splits_names_what_is_wrong(splits, message):
    with pytest.raises(InputError, match=message):
        check_splits({name: [make_prompt(text) for text in texts] for name, texts in splits.items()})


def test_check_splits_accepts_disjoint_sets():
    disjoint = {"train": [make_prompt("a circle")], "test": [make_prompt("a square")]}
    check_splits(disjoint)
    with pytest.raises(InputError, match="a square"):
        check_splits(disjoint | {"train": disjoint["test"]})


@pytest.fixture
def files(tmp_path):
    texts = {"train": "a circle\n\na  square\n", "validation": "\ufeffa star", "test": "ein Gem\u00fcse\r\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    return {name: tmp_path / name for name in ("train", "validation", "test")}


def test_text_files(files):
    splits = text_files(**files)
    assert {split: [prompt.text for prompt in prompts] for split, prompts in splits.items()} == {
        "train": ["a circle", "a square"],
        "validation": ["a star"],
        "test": ["ein Gem\u00fcse"],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"prompts\.test=.*test: cannot be read \(No such file"),
        (b"\n \n", r"prompts\.test=.*test: the file has no prompt"),
        (b"a circle\n\xff\xfe", r"prompts\.test=.*test: not UTF-8 text \(byte 9\)"),
        (b"a star", r'test prompt 1 \("a star"\) is also validation prompt 1'),
    ],
)
def test_text_files_that_cannot_be_used(files, content, message):
    files["test"].unlink()
    if content is not None:
        files["test"].write_bytes(content)
    with pytest.raises(InputError, match=message):
        text_files(**files)
