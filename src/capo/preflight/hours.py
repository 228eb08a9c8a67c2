"""Hours of a run by stage: from measured or stated rates, else from operations and a device's peak."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from capo.preflight.requests import Judge, PoolRequest, Request
from capo.runtime.outlook import DECODING, HOUR, LATENTS, SCORES, STAGES, TEXT, TRAINING, Cost, Outlook, Work


def scoring_by(judges: Sequence[Judge]) -> str:
    """Kind of the work of decoding an image and scoring it by these judges."""
    return f"{SCORES} by {', '.join(sorted({judge.key for judge in judges}))}"


def pool_work(pool: PoolRequest) -> Iterator[Work]:
    """Yield the work of drawing a pool's images and scoring them."""
    prompts = pool.prompts
    images = None if prompts is None else prompts * pool.images * pool.times
    if pool.encoded and pool.times:
        again = pool.times if pool.stored else 1  # each pool has its own text
        yield Work(pool.stage or TEXT, TEXT, None if prompts is None else prompts * again)
    yield Work(pool.stage or LATENTS, LATENTS, images)
    yield Work(pool.stage or SCORES, scoring_by(pool.judges), images)


def work_of(request: Request) -> list[Work]:
    """List the work of a run, in the order of its stages; training counts pairs."""
    pairs = request.training.steps * math.prod(asdict(request.training.division).values())
    found = [Work(TRAINING, TRAINING, pairs)]
    for pool in request.pools.values():
        found += pool_work(pool)
    return sorted(found, key=lambda work: STAGES.index(work.stage))


def costs_of(request: Request, arithmetic: Mapping[str, float]) -> dict[str, Cost]:
    """Seconds of a unit of each kind of work, on all devices together.

    A measured rate comes first. Without one, a denoising step, a decoded image and a pair take their
    operations at `utilization` of the peak; a text encoder's and a reward's are not counted by anybody.
    """
    rates, devices = request.rates, request.training.division.devices
    speed = None if request.flops is None else request.flops * request.utilization

    def seconds(rate: float | None, flops: float) -> float | None:
        if rate is not None:
            return 1 / (rate * devices)
        return None if speed is None else flops / (speed * devices)

    step = seconds(rates.steps, arithmetic.get("step", 0.0))
    known = {
        TEXT: None if rates.text is None else 1 / (rates.text * devices),
        LATENTS: None if step is None else request.sampling.steps * step,
        DECODING: seconds(rates.decoding, arithmetic.get("decode", 0.0)),
        TRAINING: seconds(rates.pairs, arithmetic.get("pair", 0.0)),
    }
    costs = {kind: Cost(without=(kind,)) if each is None else Cost(each) for kind, each in known.items()}
    return costs | {
        scoring_by(pool.judges): _scoring(pool.judges, costs[DECODING], rates.scoring, devices)
        for pool in request.pools.values()
    }


def _scoring(judges: Sequence[Judge], decoding: Cost, rates: Mapping[str, float], devices: int) -> Cost:
    distinct = {judge.key: judge.name for judge in judges}
    scored = sum(1 / (rates[key] * devices) for key in distinct if key in rates)
    unknown = tuple(name for key, name in distinct.items() if key not in rates)
    return Cost(decoding.seconds + scored, decoding.without + unknown)


def hours(request: Request, arithmetic: Mapping[str, float]) -> dict[str, Any]:
    """Compute the hours of a run as JSON values.

    Keys: each stage and `total` (hours; None: nothing of it is known), `without` (the same names -> what the
    hours leave out for want of a rate), `sampling` (of all images, drawn and decoded) and `images` (both None
    if unknown), `flops`, `utilization`, `peak of`, and `rates`: name -> where it is from.
    """
    costs = costs_of(request, arithmetic)
    outlook = Outlook.of(work_of(request), costs)
    found = {**outlook.hours(), "total": outlook.total}
    counts = [work.units for work in work_of(request) if work.kind == LATENTS]
    images = None if None in counts else sum(count for count in counts if count is not None)
    drawn = [costs[kind] for kind in (LATENTS, DECODING)]
    known = not any(cost.without for cost in drawn)
    each = sum(cost.seconds for cost in drawn) / HOUR
    return {
        **{name: None if part.without and not part.hours else part.hours for name, part in found.items()},
        "without": {name: list(part.without) for name, part in found.items() if part.without},
        "sampling": images * each if known and images is not None else None,
        "images": images,
        "flops": request.flops,
        "utilization": request.utilization,
        "peak of": request.peak_of,
        "rates": dict(request.rates.origins),
    }
