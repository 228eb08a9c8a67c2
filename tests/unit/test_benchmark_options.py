"""Numbers on the command line of the benchmarks: what is no count ends in argparse's message, not later."""

import argparse

import pytest

from benchmarks import cluster, gpu, growth
from benchmarks.options import add_numbers
from capo.cli.rewards import arguments as reward_arguments
from capo.cli.study_files import arguments as study_arguments
from capo.shapes.make import __main__ as make


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


@pytest.mark.parametrize(("program", "command", "told"), [
    (cluster.main, "--seconds text=x", "--seconds: 'x' must be a finite number above 0"),
    (cluster.main, "--seconds text=0", "--seconds: '0' must be a finite number above 0"),
    (cluster.main, "--seconds texts=1", "'texts=1' must be STAGE=SECONDS, of text, latents, scores"),
    (cluster.main, "--seconds 3", "'3' must be STAGE=SECONDS, of text, latents, scores"),
    (cluster.main, "--failures 1", "--failures: '1' must be a finite number of at least 0 and below 1"),
    (cluster.main, "--start nan", "--start: 'nan' must be a finite number of at least 0"),
    (gpu.main, "--results r --minutes=-1", "--minutes: '-1' must be a finite number of at least 0"),
    (study_arguments, "serve f --port 65536", "--port: '65536' must be a whole number from 0 to 65535"),
    (study_arguments, "results f --failures=-1", "--failures: '-1' must be a whole number of at least 0"),
    (study_arguments, "results f --failures=--1", "--failures: '--1' must be a whole number of at least 0"),
    (reward_arguments, "check r --tolerance inf", "--tolerance: 'inf' must be a finite number of at least 0"),
    (reward_arguments, "check r --tolerance nan", "--tolerance: 'nan' must be a finite number of at least 0"),
    (make.main, "rewards --work w --lineups 2", "--lineups: '2' must be a whole number of at least 301"),
    (make.main, "base --work w --steps 0", "--steps: '0' must be a whole number of at least 1"),
    (make.main, "base --work w --seed=-1", "--seed: '-1' must be a whole number of at least 0"),
    (make.main, "base --work w --threads x", "--threads: 'x' must be a whole number of at least 1"),
])  # fmt: skip
def test_a_number_that_a_program_cannot_use_is_refused_with_its_option(program, command, told, capsys):
    with pytest.raises(SystemExit) as ended:
        program([*command.split(), "--none"])  # refused later, so that no program starts its work here
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_a_folder_with_other_files_is_no_place_for_a_benchmarks_pool(tmp_path, capsys):
    mine = tmp_path / "train.txt"
    mine.write_text("my prompt")
    with pytest.raises(SystemExit) as ended:
        growth.main(["--pool", str(tmp_path), "--prompts", "16"])
    assert ended.value.code == 2 and mine.read_text() == "my prompt"
    assert f"--pool {tmp_path}: it holds files that this benchmark did not write" in capsys.readouterr().err


def test_numbers_at_the_ends_of_their_ranges_are_taken():
    assert study_arguments(["serve", "f", "--port", "65535"]).port == 65535
    assert study_arguments(["results", "f", "--failures", "0"]).failures == 0
    assert reward_arguments(["check", "looks", "--tolerance", "0"]).tolerance == 0
    assert cluster.stage_seconds("text=0.5") == ("text", 0.5)
