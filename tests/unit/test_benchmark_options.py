"""Numbers on the command line of the benchmarks: what is no count ends in argparse's message, not later."""

import argparse

import pytest

from benchmarks.options import add_numbers


@pytest.mark.parametrize(("option", "value"), [("prompts", "0"), ("candidates", "1"), ("runs", "2.5")])
def test_a_number_that_is_no_count_is_refused_with_its_option(option, value, capsys):
    parser = argparse.ArgumentParser()
    add_numbers(parser, {"prompts": 4, "candidates": 16, "runs": 1})
    with pytest.raises(SystemExit) as ended:
        parser.parse_args([f"--{option}", value])
    smallest = 2 if option == "candidates" else 1
    assert ended.value.code == 2
    assert f"--{option}: '{value}' must be a whole number of at least {smallest}" in capsys.readouterr().err
    assert parser.parse_args(["--prompts", "1", "--candidates", "2"]) == argparse.Namespace(
        prompts=1, candidates=2, runs=1
    )
