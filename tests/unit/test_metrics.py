import pytest
import torch

from capo.metrics import WinRate
from capo.win_rates import win_rate


def scores(prompts: int) -> torch.Tensor:
    """Scores (2, prompts, 4) of policy and base."""
    return torch.randint(5, (2, prompts, 4), generator=torch.Generator().manual_seed(0)).float()


def test_metric_averages_prompts_over_batches_of_any_size():
    policy, base = scores(37)
    metric = WinRate()
    for start, stop in [(0, 1), (1, 20), (20, 37)]:
        metric.update(policy[start:stop], base[start:stop])
    assert metric.compute().item() == pytest.approx(win_rate(policy, base).mean().item())


def test_metric_weighs_prompts_equally_whatever_their_images():
    metric = WinRate()
    metric.update(torch.ones(1, 8), torch.zeros(1, 8))  # 64 comparisons won
    metric.update(torch.zeros(3, 1), torch.ones(3, 1))  # three lost
    assert metric.compute().item() == 0.25


def test_processes_add_up():
    policy, base = scores(30)
    whole, first, second = WinRate(), WinRate(), WinRate()
    whole.update(policy, base)
    first.update(policy[:7], base[:7])
    second.update(policy[7:], base[7:])
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(whole.compute().item())
    first.reset()
    first.update(policy[:7], base[:7])
    assert first.compute().item() == pytest.approx(win_rate(policy[:7], base[:7]).mean().item())


def test_a_model_against_itself_is_exactly_a_half():
    metric, (same, _) = WinRate(), scores(101)
    metric.update(same, same)
    assert metric.compute().item() == 0.5
