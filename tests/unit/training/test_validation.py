"""How validation is shared out, and what it leaves on the device."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from capo.errors import InputError
from capo.rewards import Reward
from capo.training.validation import WinRateValidation, share


@pytest.mark.parametrize("prompts, world", [(7, 3), (8, 4), (1, 3), (5, 1)])
def test_every_prompt_counts_once_and_all_draw_equally_many(prompts, world):
    shares = [share(prompts, rank, world) for rank in range(world)]
    assert sorted(row for _, mine in shares for row in mine) == list(range(prompts))
    assert len({len(drawn) for drawn, _ in shares}) == 1
    assert all(drawn[: len(mine)] == mine for drawn, mine in shares)


class Stays:
    """Fails to score; knows where it is."""

    device = None

    def to(self, device):
        self.device = str(device)

    def __call__(self, images, prompts):
        assert self.device == "meta"
        raise KeyError("token")


def test_a_reward_that_fails_leaves_the_device(tmp_path):
    scorer, prompts = Stays(), [SimpleNamespace(text="a")]
    base = SimpleNamespace(prompts=prompts, seeds=[[0]], base_scores={"odd": torch.zeros(1, 1)})
    reward = Reward("odd", scorer, logs=tmp_path)
    validation = WinRateValidation(base, None, [reward], None, 1, tmp_path)
    with pytest.raises(InputError, match=r"reward 'odd': .* failed: KeyError: 'token'"):
        validation._judged(reward, [Image.new("RGB", (2, 2))], [0], torch.device("meta"))
    assert scorer.device == "cpu"
