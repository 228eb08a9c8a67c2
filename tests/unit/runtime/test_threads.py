import threading

import pytest
import torch

from capo.calibration import calibrate
from capo.data.selection import select
from capo.pairs import frs
from capo.runtime.threads import map_ahead, map_batches, over_rows

CPU = torch.device("cpu")


@pytest.fixture
def three_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def test_lanes_keep_the_order_and_have_one_thread_each(three_threads):
    meet = threading.Barrier(3, timeout=120)  # passed only if three parts are worked on at once

    def part(number):
        meet.wait()
        return number, torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():
        assert map_batches(part, range(6), "batches", CPU) == [(number, 1, False) for number in range(6)]
    assert torch.get_num_threads() == 3
    assert (
        map_batches(lambda _: threading.current_thread(), [0, 1], "operations", CPU)
        == [threading.main_thread()] * 2
    )


def test_what_goes_wrong_in_a_lane_is_raised_and_the_threads_are_back(three_threads):
    def part(number):
        raise OSError(f"part {number}")

    with pytest.raises(OSError, match="part 0"):
        map_batches(part, range(3), "batches", CPU)
    assert torch.get_num_threads() == 3


def test_the_first_half_is_one_part_ahead_in_a_thread_like_the_callers(three_threads):
    begun = [threading.Event() for _ in range(4)]

    def first(number):
        begun[number].set()
        return threading.current_thread(), torch.get_num_threads(), torch.is_grad_enabled()

    def second(number, half):
        assert begun[min(number + 1, 3)].wait(60)
        assert number + 2 > 3 or not begun[number + 2].wait(0.05)  # and no more than one
        return number, half

    with torch.no_grad():
        found = map_ahead(first, second, range(4), CPU)
    threads = {half[0] for _, half in found}
    assert len(threads) == 1 and threading.current_thread() not in threads
    assert [(number, *half[1:]) for number, half in found] == [(number, 3, False) for number in range(4)]
    assert torch.get_num_threads() == 3 and map_ahead(first, second, [], CPU) == []


@pytest.mark.parametrize("rows", [0, 1, 5, 10, 31])
def test_rows_are_covered_once(three_threads, rows):
    seen = torch.zeros(rows)

    def add(where):
        seen[where] += 1

    over_rows(add, rows, 5, CPU)
    assert torch.equal(seen, torch.ones(rows))


def test_selection_is_the_same_for_any_number_of_threads(three_threads):
    scores = torch.randn(30_000, 6, 2, generator=torch.Generator().manual_seed(0)).round(decimals=1)

    def selected():
        return select(frs, scores, calibrate(scores, ["identity"] * 2, [1.0] * 2))

    shared = selected()
    torch.set_num_threads(1)
    alone = selected()
    for name in ("winners", "losers", "rewards", "pairs"):
        assert torch.equal(getattr(shared, name), getattr(alone, name)), name
