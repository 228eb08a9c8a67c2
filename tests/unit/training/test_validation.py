"""How validation is shared out."""

import pytest

from capo.training.validation import share


@pytest.mark.parametrize("prompts, world", [(7, 3), (8, 4), (1, 3), (5, 1)])
def test_every_prompt_counts_once_and_all_draw_equally_many(prompts, world):
    shares = [share(prompts, rank, world) for rank in range(world)]
    assert sorted(row for _, mine in shares for row in mine) == list(range(prompts))
    assert len({len(drawn) for drawn, _ in shares}) == 1
    assert all(drawn[: len(mine)] == mine for drawn, mine in shares)
