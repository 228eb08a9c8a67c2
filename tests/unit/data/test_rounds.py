"""Rounds of training: their steps, prompts, seeds, and the validations at their ends."""

import pytest

from capo.data.prompts import Prompt
from capo.data.rounds import Round, refreshes, rounds_left, validations

PROMPTS = [Prompt(text, text) for text in "abcde"]


def steps(step: int, every: int | None, total: int) -> list[tuple[int, int, int]]:
    return [(part.number, part.first, part.last) for part in rounds_left(step, every, total)]


def test_a_run_is_divided_into_rounds_of_which_the_last_may_be_shorter():
    assert steps(0, 3, 8) == [(0, 0, 3), (1, 3, 6), (2, 6, 8)]
    assert steps(0, 4, 8) == [(0, 0, 4), (1, 4, 8)]
    assert [refreshes(every, 8) for every in (3, 4, 8, 9, None)] == [2, 1, 0, 0, 0]


@pytest.mark.parametrize("every", [None, 8, 100])
def test_without_a_refresh_there_is_one_round(every):
    assert steps(0, every, 8) == steps(5, every, 8) == steps(8, every, 8) == [(0, 0, 8)]


def test_a_run_goes_on_in_the_round_that_it_was_in():
    assert steps(2, 3, 8) == steps(0, 3, 8)
    assert steps(3, 3, 8) == steps(5, 3, 8) == [(1, 3, 6), (2, 6, 8)]
    assert steps(8, 3, 8) == [(2, 6, 8)]  # nothing is left to train, but to finish
    assert steps(6, 3, 6) == [(1, 3, 6)]


def test_validations_are_counted_once_each():
    """Of 8 steps with one every 2: 2 4 6 8; rounds of 3 steps add 3; and each run ends with one."""
    assert validations(0, 8, 2) == 4 and validations(4, 8, 2) == 2
    assert validations(0, 8, 2, 3) == 5 and validations(3, 8, 2, 3) == 3
    assert validations(0, 7, 100) == 1 and validations(7, 7, 100) == 0


def test_later_rounds_take_the_prompts_in_turn():
    def texts(number: int, count: int | None) -> str:
        return "".join(prompt.text for prompt in Round(number, 0, 1).prompts(PROMPTS, count))

    assert texts(1, None) == texts(7, None) == "abcde"
    assert [texts(number, 2) for number in (1, 2, 3, 4)] == ["ab", "cd", "ea", "bc"]


def test_each_round_draws_by_a_seed_of_its_own():
    drawn = [Round(number, 0, 1).seed(seed) for seed in (0, 1) for number in range(4)]
    assert drawn[0] == 0 and drawn[4] == 1 and len(set(drawn)) == 8
