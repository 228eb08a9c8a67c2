import math

import pytest
import torch
from scipy.special import expit

from capo.calibration import ScoreError, calibrate, calibrated_rewards, raw_scores, zscores
from capo.errors import InputError


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(found: torch.Tensor, expected, tolerance: float = 1e-12) -> bool:
    return torch.allclose(
        found.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance
    )


# ---- win-rates


def test_hand_worked_win_rates():
    # sigmoid(log 3) = 3/4, sigmoid(log 9) = 9/10, sigmoid(-x) = 1 - sigmoid(x)
    # 0:     (1/4 + 1/10) / 2 = 0.175;  log 3: (3/4 + 1/4) / 2 = 0.5;  log 9: (9/10 + 3/4) / 2 = 0.825
    scores = torch.tensor([0.0, math.log(3), math.log(9)], dtype=torch.float64)
    assert close(calibrated_rewards(scores), [0.175, 0.5, 0.825])


def test_hand_worked_probabilities():
    # eq. 28 with a = 1: 0.2 / (0.2 + 0.6) = 1/4; with a = 2: 0.04 / (0.04 + 0.36) = 1/10
    scores = torch.tensor([0.2, 0.6], dtype=torch.float64)
    assert close(calibrated_rewards(scores, "log"), [0.25, 0.75])
    assert close(calibrated_rewards(scores, "log", 2.0), [0.1, 0.9])


def test_probability_of_zero_is_clamped():
    # 1e-6 / (1e-6 + 0.5) = 2e-6 / (1 + 2e-6)
    assert close(
        calibrated_rewards(torch.tensor([0.0, 0.5]).double(), "log"), [2e-6 / (1 + 2e-6), 1 / (1 + 2e-6)]
    )


def test_agrees_with_equation_7_written_out():
    scores, scale = normal(5, 7), 2.5
    expected = torch.tensor(
        [
            [sum(expit(scale * (a - b)) for j, b in enumerate(row) if j != i) / 6 for i, a in enumerate(row)]
            for row in scores.tolist()
        ]
    )
    assert close(calibrated_rewards(scores, scale=scale), expected)


def test_agrees_with_equation_28_written_out():
    scores, alpha = normal(4, 5).sigmoid(), 1.7
    power = scores**alpha
    ratio = power[:, :, None] / (power[:, :, None] + power[:, None, :])
    expected = (ratio.sum(-1) - 0.5) / 4  # less the comparison with itself
    assert close(calibrated_rewards(scores, "log", alpha), expected)


@pytest.fixture
def spread_scores() -> torch.Tensor:
    """200 prompts x 16 float64 scores whose gaps stay under 30."""
    scores = 4 * normal(200, 16, seed=1)
    assert (scores.amax(-1) - scores.amin(-1)).max() < 30
    return scores


def test_win_rates_average_to_a_half_and_lie_inside_the_unit_interval(spread_scores):
    rates = calibrated_rewards(spread_scores)
    assert close(rates.sum(-1), torch.full((200,), 8.0))  # N / 2
    assert rates.min() > 0 and rates.max() < 1


def test_adding_a_constant_changes_nothing(spread_scores):
    assert close(calibrated_rewards(spread_scores + 12.5), calibrated_rewards(spread_scores))


def test_negating_gives_the_complement(spread_scores):
    assert close(calibrated_rewards(-spread_scores), 1 - calibrated_rewards(spread_scores))
    assert close(calibrated_rewards(spread_scores, scale=-1.0), 1 - calibrated_rewards(spread_scores))


def test_order_is_kept_strictly(spread_scores):
    ordered = calibrated_rewards(spread_scores).gather(-1, spread_scores.argsort(-1))
    assert (ordered.diff(dim=-1) > 0).all()


def test_two_candidates_give_tanh_of_half_their_distance():
    scores = normal(50, 2) * 5
    rates = calibrated_rewards(scores)
    assert close(rates[:, 0] - rates[:, 1], torch.tanh((scores[:, 0] - scores[:, 1]) / 2))


def test_scale_matters():
    cosines = 0.25 + 0.01 * normal(100, 16)
    # over 0.04, four standard deviations, a sigmoid moves by 0.01; over logits, x 100, by much of its range
    assert (calibrated_rewards(cosines) - 0.5).abs().max() < 0.01
    assert (calibrated_rewards(cosines, scale=100.0) - 0.5).abs().mean() > 0.1


@pytest.mark.parametrize("link", ["identity", "log"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("candidates", [2, 3, 7, 16, 33])
def test_ties_stay_ties_to_the_last_bit(candidates, dtype, link):
    # many sizes: what vectorized code leaves over at the end of a range is where ties break
    for prompts in [*range(1, 40), 1100]:
        scores = normal(prompts, candidates, seed=prompts).sigmoid().to(dtype)
        scores[:, -1] = scores[:, 0]
        rates = calibrated_rewards(scores, link, 3.0)
        assert torch.equal(rates[:, -1], rates[:, 0])


@pytest.mark.parametrize("candidates", [3, 7, 16])
def test_a_prompt_does_not_depend_on_the_prompts_beside_it(candidates):
    scores = normal(6000, candidates, dtype=torch.float32)
    together = calibrated_rewards(scores, scale=2.0)
    for start, stop in [
        (0, 1),
        (7, 50),
        (1000, 5100),
        *((5900 + size, 5900 + 2 * size) for size in range(1, 50)),
    ]:
        assert torch.equal(calibrated_rewards(scores[start:stop], scale=2.0), together[start:stop])


def test_leading_dimensions_and_strides_are_free():
    scores = normal(4, 16, 3, dtype=torch.float32)
    expected = torch.stack([calibrated_rewards(prompt) for prompt in scores.movedim(-1, 1).reshape(12, 16)])
    assert torch.equal(calibrated_rewards(scores.movedim(-1, 1)), expected.reshape(4, 3, 16))
    assert calibrated_rewards(torch.empty(0, 16)).shape == (0, 16)


def test_does_not_write_to_its_input_and_takes_no_gradient():
    scores = normal(3, 4, dtype=torch.float32).requires_grad_()
    before = scores.detach().clone()
    assert not calibrated_rewards(scores).requires_grad
    assert torch.equal(scores, before)


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", [calibrated_rewards, raw_scores])
def test_half_precision_is_computed_in_float32(method, dtype):
    scores = (20 + 3 * normal(6, 16)).to(dtype)
    found = method(scores)
    assert found.dtype == dtype
    assert torch.equal(found, method(scores.float()).to(dtype))


@pytest.mark.parametrize("method", [calibrated_rewards, raw_scores, zscores])
def test_dtypes_are_kept_and_integers_give_float32(method):
    whole = torch.tensor([[1, 5, 2], [7, 7, 0]])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert method(whole.to(dtype)).dtype == dtype
    for dtype in (torch.uint8, torch.int16, torch.int64):
        found = method(whole.to(dtype))
        assert found.dtype == torch.float32
        assert torch.equal(found, method(whole.float()))


# ---- refusals


@pytest.mark.parametrize("method", [calibrated_rewards, raw_scores, zscores])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_named(method, value):
    scores = normal(4, 16)
    scores[2, 5] = value
    with pytest.raises(ValueError, match=r"score \[2, 5\] is (nan|inf|-inf), which is not finite") as caught:
        method(scores)
    assert caught.value.index == (2, 5)


def test_further_bad_scores_are_counted():
    scores = normal(4, 16)
    scores[1, 3:6] = math.nan
    with pytest.raises(InputError, match=r"\[1, 3\] is nan \(and 2 more\)"):
        calibrated_rewards(scores)


@pytest.mark.parametrize("method", [calibrated_rewards, raw_scores, zscores])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5, 1), (5, 0)])
def test_one_candidate_is_refused(method, shape):
    with pytest.raises(ValueError, match=r"a win-rate needs two at least"):
        method(torch.ones(shape))


@pytest.mark.parametrize("value", [-1e-9, 1 + 2e-6])
def test_the_log_link_takes_probabilities_only(value):
    scores = torch.full((2, 3), 0.5, dtype=torch.float64)
    scores[1, 2] = value
    with pytest.raises(ScoreError, match=r"score \[1, 2\] is .* takes probabilities"):
        calibrated_rewards(scores, "log")


@pytest.mark.parametrize("value", [0.0, 1 + 1e-6])
def test_the_edges_of_a_probability_are_taken(value):
    assert calibrated_rewards(torch.tensor([0.5, value], dtype=torch.float64), "log").isfinite().all()


def test_unknown_link_and_useless_scale():
    with pytest.raises(ValueError, match=r"'logit'.*identity, log"):
        calibrated_rewards(normal(2, 3), "logit")
    with pytest.raises(InputError, match="scale nan"):
        calibrated_rewards(normal(2, 3), scale=math.nan)
    with pytest.raises(ScoreError, match=r"\[0, 1\] is .* overflows torch.float32 at scale 100"):
        calibrated_rewards(torch.tensor([[0.0, 3e37]]), scale=100.0)


# ---- controls


def test_raw_is_the_score_itself():
    scores = normal(3, 4, dtype=torch.float32)
    found = raw_scores(scores, "log", 100.0)
    assert torch.equal(found, scores)
    assert found.data_ptr() != scores.data_ptr()


def test_hand_worked_zscores():
    # 1, 2, 3, 6: mean 3, squared deviations 4, 1, 0, 9, mean 3.5; link and scale do not enter
    found = zscores(torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64), "identity", 5.0)
    assert close(found, [-2 / 3.5**0.5, -1 / 3.5**0.5, 0.0, 3 / 3.5**0.5])


def test_zscores_of_equal_scores_are_zero():
    equal = torch.full((1, 7), 0.1)  # whose sum / 7 is not 0.1 in floating point
    assert torch.equal(zscores(equal), torch.zeros(1, 7))


# ---- several rewards


def test_every_reward_has_its_own_link_and_scale():
    scores = torch.stack([normal(4, 6), normal(4, 6, seed=1).sigmoid()], dim=-1).float()
    found = calibrate(scores, ["identity", "log"], [0.5, 2.0])
    assert torch.equal(found[..., 0], calibrated_rewards(scores[..., 0].contiguous(), "identity", 0.5))
    assert torch.equal(found[..., 1], calibrated_rewards(scores[..., 1].contiguous(), "log", 2.0))


@pytest.mark.parametrize(
    ("method", "function"), [("win_rate", calibrated_rewards), ("raw", raw_scores), ("zscore", zscores)]
)
def test_method_is_chosen_by_name(method, function):
    scores = normal(4, 6, 2, dtype=torch.float32)
    found = calibrate(scores, ["identity"] * 2, [3.0, 1.0], method)
    assert torch.equal(found[..., 0], function(scores[..., 0], "identity", 3.0))
    assert found.dtype == torch.float32


def test_calibrate_names_the_reward():
    scores = normal(4, 6, 2)
    with pytest.raises(InputError, match=r"^method must be one of win_rate, raw, zscore, got 'winrate'"):
        calibrate(scores, ["identity"] * 2, [1.0, 1.0], "winrate")
    with pytest.raises(InputError, match=r"'looks'.*scale -1.0"):
        calibrate(scores, ["identity"] * 2, [1.0, -1.0], names=["preference", "looks"])
    with pytest.raises(InputError, match="'looks': link 'exp'"):
        calibrate(scores, ["identity", "exp"], [1.0, 1.0], names=["preference", "looks"])
    scores[3, 2, 1] = math.nan
    with pytest.raises(ScoreError, match=r"'looks': score \[3, 2\] is nan") as caught:
        calibrate(scores, ["identity"] * 2, [1.0, 1.0], names=["preference", "looks"])
    assert caught.value.index == (3, 2, 1)
    with pytest.raises(ValueError, match="1 links, 2 scales"):
        calibrate(scores, ["identity"], [1.0, 1.0])
