"""What a run follows of its pools: shares, rates by hand, few rows, and the time that is left."""

import dataclasses
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from capo.backbones.sampling import SamplerSettings
from capo.data import watching
from capo.data.generation import ImageGenerator, PoolSpec, fill_pool
from capo.data.prompts import make_prompt
from capo.data.watching import Place, PoolWatch, current_watch, watched
from capo.runtime.outlook import Cost, Hours, Outlook, Work
from fixtures.fake_backbone import FakeBackbone

POOL = Path("/pools/train")


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(watching.time, "monotonic", lambda: clock.now)
    return clock


def follow(rows, before=0.0, total=1000.0) -> PoolWatch:
    latents = Work("latents", "latents", total)
    outlook = Outlook.of([latents, Work("evaluation", "latents", 100)], {"latents": Cost(3600.0)})
    return PoolWatch(outlook, {POOL: Place("train", {"latents": latents})}, [rows.append], before)


def test_rows_hold_shares_and_the_rate_since_the_last_row(clock):
    rows = []
    watch = follow(rows)
    stage = watch.begin("latents", POOL, 800)  # 200 of 1000 are there
    for images in (40, 40, 120):  # 10 s each
        clock.now += 10
        note = stage(images)
    # the third is at 30 s: 200 images
    assert rows == [
        {
            "pool/train/latents": 0.4,
            "time/pool/train/images_per_second": pytest.approx(200 / 30),
            "time/pool/seconds": 30.0,
            "time/hours_left": pytest.approx((800 + 100) * 0.15 / 3600),  # 0.15 s an image, now measured
        }
    ]
    assert note == "2 min left in all"
    clock.now += 15
    stage(600)
    stage.end()
    assert rows[1]["pool/train/latents"] == 1.0
    assert rows[1]["time/pool/train/images_per_second"] == pytest.approx(600 / 15) and len(rows) == 2


def test_before_a_stage_has_settled_its_rate_is_the_estimated_one(clock):
    watch = follow([])
    stage = watch.begin("latents", POOL, 1000)
    clock.now += 19
    assert stage(10) == "" and watch.outlook.total == Hours(990 + 100)


def test_a_long_pool_has_few_rows(clock):
    """Ten days with a report each ten seconds: 30 s apart at first, later at a two-hundredth of the time."""
    rows = []
    stage = follow(rows, total=864_000.0).begin("latents", POOL, 86_400)
    for _ in range(86_400):
        clock.now += 10
        stage(1)
    times = [row["time/pool/seconds"] for row in rows]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert 1000 < len(rows) < 1500 and min(gaps) == 30 and max(gaps) > 4000


def test_the_seconds_of_earlier_processes_count(clock):
    rows = []
    stage = follow(rows, before=500.0).begin("latents", POOL, 10)
    clock.now += 2
    stage(10)
    stage.end()
    assert rows[0]["time/pool/seconds"] == 502.0


def test_an_unknown_pool_is_followed_under_the_name_of_its_folder(clock):
    rows = []
    watch = follow(rows)
    stage = watch.begin("scores", Path("/elsewhere/other"), 4)
    clock.now += 2
    stage(4)
    stage.end()
    assert rows[0]["pool/other/scores"] == 1.0 and rows[0]["time/pool/other/scored_per_second"] == 2.0
    assert watch.begin("latents", POOL / "within", 4).place.name == "train"


def test_filling_a_pool_is_followed_and_a_complete_one_says_nothing(tmp_path):
    generator = ImageGenerator.base(FakeBackbone(), SamplerSettings(steps=2, guidance=3.0, batch=3))
    prompts = [make_prompt(text) for text in ("a red circle", "a blue square", "a green dot")]
    spec, rows = PoolSpec(tmp_path, "tiny", "train", 5, prompts, candidates=4, prompts_per_shard=2), []

    def fill(spec):
        with watched(PoolWatch(Outlook(), {}, [rows.append])):
            return fill_pool(spec, generator, stages=("text", "latents"), progress=False)

    name = f"pool/{fill(spec).folder.name}"
    assert [row.get(f"{name}/text", row.get(f"{name}/latents")) for row in rows] == [1.0, 1.0]
    rates = [f"time/{name}/{rate}" for rate in ("prompts_per_second", "images_per_second")]
    assert all(row[rate] > 0 for row, rate in zip(rows, rates, strict=True))
    fill(spec)
    assert len(rows) == 2 and current_watch() is None
    fill(dataclasses.replace(spec, candidates=6))
    assert len(rows) == 3
