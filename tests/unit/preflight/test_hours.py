"""Hours of a run against hand-worked numbers."""

from dataclasses import replace

import pytest

from capo.preflight.hours import costs_of, hours, scoring_by, work_of
from capo.preflight.requests import Judge, PoolRequest, Rates, Request, SamplingRequest, TrainingRequest
from capo.runtime.launch import Division
from capo.runtime.outlook import Cost, Hours, Outlook, told_hours

A, B = Judge("a", "a-1"), Judge("b", "b-2")
# two devices; 100 steps of 2 x 4 x 8 = 64 pairs; 6 denoising steps an image
REQUEST = Request(
    None,
    TrainingRequest(Division(2, 4, 8), 100, 2, True, "32-true", "adamw", "ddp", False, None, True),
    SamplingRequest(6, 2, 4, "32-true", 4),
    {
        "train": PoolRequest(10, 4, 2, judges=(A, B)),
        "policy in validation": PoolRequest(
            2, 4, 0, times=5, stored=False, judges=(A,), stage="validation", encoded=False
        ),
        "test": PoolRequest(5, 2, 1, judges=(A,), stage="evaluation"),
    },
    4,
    1e12,
    0.5,
)
FLOPS = {"pair": 5e9, "step": 3e8, "decode": 2e8, "image": 2e9}
SPEED = 2 * 0.5e12  # of both devices


def test_hours_by_operations():
    found = hours(REQUEST, FLOPS)
    assert found["training"] == pytest.approx(100 * 64 * 5e9 / SPEED / 3600)
    assert found["latents"] == pytest.approx(40 * 6 * 3e8 / SPEED / 3600)
    assert found["images"] == 40 + 40 + 10
    assert found["sampling"] == pytest.approx(90 * 2e9 / SPEED / 3600)
    assert found["text"] is None and found["without"]["text"] == ["text"]
    # the images are decoded, but what the rewards take is not known
    assert found["scores"] == pytest.approx(40 * 2e8 / SPEED / 3600)
    assert found["without"]["scores"] == ["a", "b"] and found["without"]["validation"] == ["a"]
    assert found["validation"] == pytest.approx(40 * 2e9 / SPEED / 3600)
    assert found["without"]["total"] == ["text", "a", "b"]
    parts = [found[name] for name in ("latents", "scores", "training", "validation", "evaluation")]
    assert found["total"] == pytest.approx(sum(parts))


def test_hours_by_rates_of_one_device():
    scoring = {"a-1": 4.0, "b-2": 8.0}
    found = hours(replace(REQUEST, rates=Rates(10.0, 12.0, 2.0, 32.0, scoring)), FLOPS)
    assert found["without"] == {}
    assert found["text"] == pytest.approx(10 / 20 / 3600) and found["training"] == pytest.approx(100 / 3600)
    assert found["latents"] == pytest.approx(40 * 6 / 24 / 3600)
    # an image: decoded in 1/4 s, scored in 1/8 and 1/16 s, on two devices
    assert found["scores"] == pytest.approx(40 * (1 / 4 + 1 / 8 + 1 / 16) / 3600)
    assert found["validation"] == pytest.approx(40 * (1 / 4 + 1 / 4 + 1 / 8) / 3600)
    assert found["evaluation"] == pytest.approx((5 / 20 + 10 * (1 / 4 + 1 / 4 + 1 / 8)) / 3600)


def test_an_unknown_number_of_prompts_and_an_unknown_peak():
    pools = {"train": PoolRequest(None, 4, 1, judges=(A,))}
    found = hours(replace(REQUEST, pools=pools), FLOPS)
    assert found["images"] is found["sampling"] is found["latents"] is None
    assert found["without"]["latents"] == ["the number of prompts"] and found["training"] > 0
    assert costs_of(replace(REQUEST, flops=None), {})["training"] == Cost(without=("training",))


def test_what_is_not_drawn_takes_no_hours():
    pools = {"test": PoolRequest(5, 2, 1, times=0, judges=(A,), stage="evaluation")}
    assert "evaluation" not in hours(replace(REQUEST, pools=pools), FLOPS)


def test_work_that_is_done_and_measured():
    outlook = Outlook.of(work_of(REQUEST), costs_of(replace(REQUEST, flops=None), {}))
    assert outlook.total.hours == 0 and str(outlook.total) == "unknown"
    outlook.measured("latents", 36.0)
    outlook.done("latents", "latents", 10)
    assert outlook.hours()["latents"] == Hours(0.3)  # 30 images of 36 s
    assert outlook.hours()["validation"] == Hours(0.4, ("decoding", "a"))
    assert str(outlook.hours()["validation"]) == "at least 0.4"
    outlook.done("latents", "latents", 1000)
    assert "latents" not in outlook.hours()
    outlook.done("another", "latents", 1)  # which is not in the plan
    assert "another" not in outlook.hours()


def test_the_order_of_judges_does_not_matter_and_hours_are_short():
    assert scoring_by([A, B]) == scoring_by([B, A, A]) == "scores by a-1, b-2"
    assert [told_hours(hours) for hours in (0.00423, 0.126, 9.96, 12.51, 1250.4)] == [
        "0.0042", "0.13", "10", "12.5", "1,250"
    ]  # fmt: skip
