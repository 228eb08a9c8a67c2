"""Calibration: raw scores of a prompt's candidates -> calibrated rewards (CaPO, section 4.2).

Each calibration method is a function with the signature `(scores, link, scale)`. `METHODS` maps the names
that `calibration=win_rate|raw|zscore` accepts to these functions; `calibrate` applies one of them to every
reward.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from capo.errors import InputError, ParameterError
from capo.runtime.dtypes import at_least_float32
from capo.runtime.threads import over_rows

LOG_FLOOR = 1e-6  # probabilities are clamped to at least this before the logarithm
LOG_CEILING = 1 + 1e-6  # a probability of 1 may exceed 1 by this much through rounding

# PyTorch evaluates the last few elements of a range one by one, with an `exp` that rounds differently from
# the vectorized one. If the number of columns is a multiple of LANES and the block is too small to be split
# over threads, no such elements are left, so equal scores get bitwise equal win-rates whatever other prompts
# are in the tensor. A block of BLOCK elements and two buffers fit in the L2 cache.
LANES, BLOCK = 64, 2**14


class ScoreError(InputError):
    """Scores that cannot be calibrated; `index` locates the first bad score in the given tensor."""

    def __init__(self, message: str, index: tuple[int, ...]):
        super().__init__(message)
        self.index = index


@dataclass(frozen=True)
class Link:
    """A function from scores to log-odds, and the range of scores that it accepts."""

    to_log_odds: Callable[[Tensor], Tensor]
    lowest: float = -math.inf
    highest: float = math.inf


def _log(values: Tensor) -> Tensor:
    # 1 * log(values) instead of Tensor.log, which gives every block to MKL's threads: on busy cores these
    # wait for each other a hundred times as long as the logarithms take
    return torch.special.xlogy(1.0, values)


LINKS = {
    # Bradley-Terry rewards are log-odds already
    "identity": Link(lambda scores: scores),
    # probabilities: sigmoid(a (log s - log s')) is eq. 28's s^a / (s^a + s'^a)
    "log": Link(lambda scores: _log(scores.clamp(min=LOG_FLOOR)), lowest=0.0, highest=LOG_CEILING),
}


@torch.no_grad()
def calibrated_rewards(scores: Tensor, link: str = "identity", scale: float = 1.0) -> Tensor:
    """Win-rates: mean probability of a candidate to win against the others of its prompt (eq. 6, 7, 28).

    `R_ca[i] = 1/(N-1) * sum_{j != i} sigmoid(u[i] - u[j])` with `u = scale * link(score)`.

    Args:
        scores: (..., N) raw scores of the N candidates of a prompt.
        link: `identity` for log-odds (Bradley-Terry), `log` for probabilities, which are clamped at 1e-6.
        scale: factor after the link; 100 turns the cosine of a CLIP-type reward into its logit.

    Returns:
        (..., N) win-rates in [0, 1]; their mean over the candidates is 1/2, and equal scores get bitwise
        equal win-rates. The dtype is that of the scores (half precision is computed in float32); integers
        give float32.

    Raises:
        InputError: if N < 2, the link is unknown, the scale is not finite, a score is not finite or overflows
            when scaled, or, with link `log`, a score is below 0 or above 1 + 1e-6. For a bad score it is a
            `ScoreError`, which has the index of the score.
    """
    work = _checked(scores)
    _check_link(work, link, scale)
    candidates = scores.shape[-1]
    rows = work.reshape(-1, candidates)
    result = torch.empty(rows.shape, dtype=_result_dtype(scores), device=scores.device)
    columns = max(BLOCK // candidates // LANES, 1) * LANES
    columns = min(columns, math.ceil(len(rows) / LANES) * LANES)

    def calibrate_rows(where: slice) -> None:
        block = torch.zeros(candidates, columns, dtype=work.dtype, device=scores.device)
        for start in range(where.start, where.stop, columns or 1):
            part = rows[start : min(start + columns, where.stop)]
            block[:, : len(part)] = part.T
            wins = _expected_wins(scale * LINKS[link].to_log_odds(block)) / (candidates - 1)
            result[start : start + len(part)] = wins[:, : len(part)].T

    over_rows(calibrate_rows, len(rows), 4 * columns or 1, scores.device)
    return result.reshape(scores.shape)


def raw_scores(scores: Tensor, link: str = "identity", scale: float = 1.0) -> Tensor:
    """Raw scores, unchanged, as in a literal reading of eq. 22 (control): (..., N) -> (..., N).

    Link and scale are ignored. The dtype is chosen as in `calibrated_rewards`. Raises InputError for N < 2
    and for a score that is not finite.
    """
    return _checked(scores).to(_result_dtype(scores), copy=True)


def zscores(scores: Tensor, link: str = "identity", scale: float = 1.0) -> Tensor:
    """Scores in standard deviations from the mean of their prompt (control): (..., N) -> (..., N).

    `(s - mean) / std` over the N candidates, with the population standard deviation; 0 where all candidates
    score the same. Link and scale are ignored. The computation is in float64, the dtype of the result is
    chosen as in `calibrated_rewards`. Raises InputError for N < 2 and for a score that is not finite.
    """
    _checked(scores)
    work = scores.double().contiguous()
    centered = work - work.mean(-1, keepdim=True)
    deviation = centered.square().mean(-1, keepdim=True).sqrt()
    same = work.eq(work[..., :1]).all(-1, keepdim=True)  # not std == 0: the mean of equal numbers is rounded
    return torch.where(same, 0.0, centered / deviation).to(_result_dtype(scores))


METHODS: dict[str, Callable[[Tensor, str, float], Tensor]] = {
    "win_rate": calibrated_rewards,
    "raw": raw_scores,
    "zscore": zscores,
}


def calibrate(
    scores: Tensor,
    links: Sequence[str],
    scales: Sequence[float],
    method: str = "win_rate",
    names: Sequence[str] | None = None,
) -> Tensor:
    """Calibrate every reward with its own link and scale.

    Args:
        scores: (P, N, L) raw scores: prompts, candidates, rewards.
        links: L links, see `calibrated_rewards`.
        scales: L positive scales; a negative one would contradict domination and `best_worst`, which take the
            higher raw score for the better one.
        method: a key of `METHODS`: `win_rate`, `raw` or `zscore`.
        names: L names of the rewards, for messages.

    Returns:
        (P, N, L) calibrated rewards; the dtype is chosen as in `calibrated_rewards`.

    Raises:
        InputError: if the method is unknown, a scale is not positive, or the method rejects the scores of a
            reward (the message then starts with the reward's name). A `ScoreError` has `index` = (prompt,
            candidate, reward).
        ValueError: if the scores do not have three dimensions, or the numbers of links, scales or names
            differ from the number of rewards.
    """
    names = names or [f"reward {index}" for index in range(len(links))]
    if scores.ndim != 3 or not scores.shape[-1] == len(links) == len(scales) == len(names):
        raise ValueError(
            f"scores {tuple(scores.shape)} need (P, N, L) with a link, scale and name for each reward; "
            f"got {len(links)} links, {len(scales)} scales, {len(names)} names"
        )
    if method not in METHODS:
        raise ParameterError("method", method, f"must be one of {', '.join(METHODS)}")
    result = torch.empty(scores.shape, dtype=_result_dtype(scores), device=scores.device)
    for index, (link, scale, name) in enumerate(zip(links, scales, names, strict=True)):
        if not scale > 0:
            raise InputError(
                f"reward '{name}': scale {scale} is not positive; negate the scores in its scorer instead"
            )
        try:
            result[..., index] = METHODS[method](scores[..., index], link, scale)
        except ScoreError as error:
            raise ScoreError(f"reward '{name}': {error}", (*error.index, index)) from None
        except InputError as error:
            raise InputError(f"reward '{name}': {error}") from None
    return result


def _expected_wins(u: Tensor) -> Tensor:
    """(N, C) log-odds, one prompt per column -> (N, C) sum of sigmoid(u[i] - u[j]) over j != i.

    Every candidate sums over the same rivals in the same order, itself included (sigmoid(0) = 1/2, subtracted
    at the end), so that the sums of equal candidates are rounded equally.
    """
    total, difference = torch.zeros_like(u), torch.empty_like(u)
    for rival in u:
        torch.sub(u, rival, out=difference)
        total += difference.sigmoid_()
    return total - 0.5


def _result_dtype(scores: Tensor) -> torch.dtype:
    return scores.dtype if scores.is_floating_point() else torch.float32


def _checked(scores: Tensor) -> Tensor:
    """Cast scores to the dtype of the computation (float32 or float64).

    Raises InputError for N < 2 and for scores that are not finite.
    """
    candidates = scores.shape[-1] if scores.ndim else 0
    if candidates < 2:
        raise InputError(
            f"{candidates} candidate(s) per prompt (scores of shape {tuple(scores.shape)}): a win-rate needs "
            f"two at least"
        )
    work = at_least_float32(scores)
    # aminmax returns NaN if any score is NaN: one pass and no temporary tensor in the usual case
    if work.numel() and not torch.stack(work.aminmax()).isfinite().all():
        _refuse(scores, ~work.isfinite(), "which is not finite; score the candidate again")
    return work


def _check_link(work: Tensor, link: str, scale: float) -> None:
    if link not in LINKS:
        raise InputError(f"link {link!r} is unknown; choose one of {', '.join(LINKS)}")
    if not math.isfinite(scale):
        raise InputError(
            f"scale {scale} is not finite; give the factor that turns the linked score into log-odds"
        )
    if work.numel() == 0:
        return
    lowest, highest = work.aminmax()
    taken = LINKS[link]
    if lowest < taken.lowest or highest > taken.highest:
        bad = (work < taken.lowest) | (work > taken.highest)
        _refuse(work, bad, f"but link '{link}' takes probabilities only; link 'identity' takes log-odds")
    if not (scale * taken.to_log_odds(torch.stack([lowest, highest]))).isfinite().all():
        bad = ~(scale * taken.to_log_odds(work)).isfinite()
        _refuse(work, bad, f"which overflows {work.dtype} at scale {scale}; lower the scale")


def _refuse(scores: Tensor, bad: Tensor, why: str) -> None:
    """Raise a ScoreError that names the first score marked in `bad` and says how many more there are."""
    found = bad.nonzero()
    index = tuple(found[0].tolist())
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    raise ScoreError(f"score {list(index)} is {scores[index].item()}{more}, {why}", index)
