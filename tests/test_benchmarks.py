"""The benchmarks at their smallest size: they run, print their figures, and compare what is equal."""

import importlib
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from timing import in_turn, median_ratio  # noqa: E402


@pytest.fixture
def printed(capsys):
    """Runs a benchmark's `main` and gives what it prints."""

    def run(script: str, *arguments: str) -> str:
        importlib.import_module(script).main([*arguments, "--threads", "1"])
        return capsys.readouterr().out

    return run


def rates(table: str, unit: str) -> dict[str, tuple[float, float]]:
    """name -> units a second and ratio, from the rows under the heading with `unit`."""
    rows = table.split(f"{unit}/s", 1)[1].splitlines()[1:]
    found = (re.fullmatch(r"(\S.*?)\s+([\d.]+)\s+([\d.]+) x", row) for row in rows)
    return {row[1]: (float(row[2]), float(row[3])) for row in found if row}


def test_train_step(printed):
    told = printed("train_step", "--batch", "2", "--prompts", "4", "--steps", "1", "--runs", "1")
    found = rates(told, "pairs")
    assert list(found) == ["capo", "bare loop", "four passes", "published"]
    assert found["capo"][1] == 1 and all(rate > 0 and ratio > 0 for rate, ratio in found.values())
    assert "weights of capo and bare loop after their last step: 0 apart" in told  # the same steps were timed


def test_sampling(printed):
    told = printed("sampling", "--batch", "2", "--prompts", "1", "--runs", "1")
    found = rates(told, "images")
    assert list(found) == ["sampling", "pool", "pipeline"] and all(rate > 0 for rate, _ in found.values())
    # the same images but for rounding
    assert int(re.search(r"pixels of sampling and pipeline: (\d+) of 255 apart", told)[1]) <= 2


def test_reading(printed):
    told = printed("reading", "--batch", "4", "--prompts", "16", "--visits", "16", "--runs", "1")
    assert "in 6 files, 16 visits" in told  # two rows of 8 prompts: a text and two blocks of latents each
    shares = re.findall(r"^(training loader|storage alone) .* (\d+)% of memmap$", told, re.MULTILINE)
    assert len(shares) == 2 and all(int(share) > 0 for _, share in shares)
    assert re.search(r"^first epoch +\d+ pairs/s$", told, re.MULTILINE)


def test_growth_keeps_its_pool(printed, tmp_path):
    arguments = ("--prompts", "100", "--prompts_per_shard", "32", "--pool", str(tmp_path))
    told = printed("growth", *arguments)
    assert all(f"\n{stage}" in told for stage in ("prompts", "what is there", "selection", "first batch"))
    assert re.search(r"in all [\d.]+ s and [\d.]+ GiB", told)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    assert len(files) == 1 + 4 * 2 * 3  # the prompts; four rows of two blocks and three rewards
    printed("growth", *arguments)
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}


def test_jobs_take_turns():
    calls = []
    seconds = in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, runs=2)
    assert calls == ["b", "a", "a", "b", "b", "a"]  # one round to warm up; then every round begins with another
    assert [len(found) for found in seconds.values()] == [2, 2]


def test_ratios_are_of_each_round():
    assert median_ratio([1, 2, 4], [2, 2, 12]) == 2  # 2, 1 and 3
