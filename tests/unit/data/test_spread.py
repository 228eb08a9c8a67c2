import math

import pytest
import torch

from capo.calibration import calibrate
from capo.data.spread import Spread, spread, spread_warnings


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_hand_worked_spread():
    # N = 2: deviations from 1/2 are the std. Prompts 0.5 -+ 0.3 and 0.5 -+ 0.4: sqrt((0.09 + 0.16) / 2).
    # The largest std of two win-rates is sqrt(3 / 12) = 0.5: 0.3 and 0.4 are neither flat (< 0.025) nor
    # saturated (> 0.475). Second reward: -+ 0.01 is flat, -+ 0.49 saturated, std sqrt((0.0001 + 0.2401) / 2).
    first = torch.tensor([[0.2, 0.8], [0.9, 0.1]])
    second = torch.tensor([[0.49, 0.51], [0.01, 0.99]])
    found = spread(torch.stack([first, second], dim=-1))
    assert found[0].std == pytest.approx(math.sqrt(0.125), abs=1e-6)
    assert (found[0].flat, found[0].saturated) == (0.0, 0.0)
    assert found[1].std == pytest.approx(math.sqrt(0.1201), abs=1e-6)
    assert (found[1].flat, found[1].saturated) == (0.5, 0.5)


def test_a_ranking_without_doubt_is_saturated_and_a_raw_cosine_flat():
    scores = torch.stack(
        [1000 * normal(300, 16), 0.01 * normal(300, 16, seed=1), normal(300, 16, seed=2)], dim=-1
    )
    ranking, cosine, logit = spread(calibrate(scores, ["identity"] * 3, [1.0] * 3))
    assert ranking.saturated == 1.0 and ranking.std == pytest.approx(
        math.sqrt(17 / 180), rel=1e-3
    )  # (N+1)/(12 (N-1))
    assert cosine.flat == 1.0
    assert (logit.flat, logit.saturated) == (0.0, 0.0)


def test_shares_belong_to_win_rates_only():
    scores = normal(30, 16, 1) + 0.3
    assert not math.isnan(spread(calibrate(scores, ["identity"], [1.0]).bfloat16())[0].flat)
    for method in ("raw", "zscore"):
        found = spread(calibrate(scores, ["identity"], [1.0], method))[0]
        assert math.isnan(found.flat) and math.isnan(found.saturated)
    assert found.std == pytest.approx(1.0)  # of z-scores
    with pytest.raises(ValueError, match="two candidates"):
        spread(torch.ones(0, 16, 3))


def test_warnings_name_the_reward_and_what_is_wrong():
    spreads = [Spread(0.01, 0.9, 0.0), Spread(0.2, 0.1, 0.1), Spread(0.3, 0.0, 0.8)]
    flat, saturated = spread_warnings(spreads, ["clip", "fine", "steep"])
    assert "'clip'" in flat and "90%" in flat and "hardly takes part" in flat
    assert "'steep'" in saturated and "80%" in saturated and "bare ranking" in saturated
    assert spread_warnings([Spread(1.0, math.nan, math.nan)], ["raw"]) == []
