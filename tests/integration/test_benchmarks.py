"""The benchmarks at their smallest size: they run, print their figures, and compare what is equal."""

import importlib
import json
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import full_training, generation, gpu
from benchmarks.full_steps import Clock, Setting, step_figures
from benchmarks.machine import Waits
from benchmarks.random_models import random_backbone, random_module, random_pairs, sized_blueprint
from benchmarks.records import Records, measured
from benchmarks.timing import in_turn, median_ratio
from capo.errors import InputError
from fixtures import ROOT


@pytest.fixture
def printed(capsys):
    """Runs a benchmark's `main` and gives what it prints."""

    def run(script: str, *arguments: str) -> str:
        importlib.import_module(f"benchmarks.{script}").main([*arguments, "--threads", "1"])
        return capsys.readouterr().out

    return run


def tiny(model: str, file: Path) -> list[str]:
    """Arguments of a benchmark of full size on the tiny model, whose figures go to `file`."""
    return [*f"--size tiny --device cpu --model {model} --rounds 1 --results".split(), str(file)]


def rates(table: str, unit: str) -> dict[str, tuple[float, float]]:
    """Name -> units a second and ratio, from the rows under the heading with `unit`."""
    rows = table.split(f"{unit}/s", 1)[1].splitlines()[1:]
    found = (re.fullmatch(r"(\S.*?)\s+([\d.]+)\s+([\d.]+) x", row) for row in rows)
    return {row[1]: (float(row[2]), float(row[3])) for row in found if row}


@pytest.mark.slow
def test_train_step(printed):
    told = printed("train_step", "--batch", "2", "--prompts", "4", "--steps", "1", "--runs", "1")
    found = rates(told, "pairs")
    assert list(found) == ["capo", "bare loop", "four passes", "published"]
    assert found["capo"][1] == 1 and all(rate > 0 and ratio > 0 for rate, ratio in found.values())
    assert "weights of capo and bare loop after their last step: 0 apart" in told  # the same steps were timed


def test_many_rewards(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["many_rewards", "--prompts", "50", "--candidates", "8"])
    importlib.import_module("benchmarks.many_rewards").main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == 14 and all(len(row) == 6 for row in rows)
    few, many = rows[0], rows[6]  # 2 and 12 independent rewards
    assert few[1].startswith("100.0%") and float(many[1].split("%")[0]) < 50 < float(many[3].split("%")[0])


@pytest.mark.slow
def test_reference_reuse(printed):
    told = printed("reference_reuse", "--batch", "2", "--prompts", "4", "--steps", "1", "--runs", "1")
    found = rates(told, "pairs")
    assert list(found) == ["reused", "computed"] and all(rate > 0 for rate, _ in found.values())
    assert "on disk: 2 passes" in told and "(20.0 bytes a pair)" in told
    assert "weights of reused and computed after their last step: 0 apart" in told


@pytest.mark.slow
def test_objectives(printed):
    told = printed("objectives", "--batch", "2", "--prompts", "4", "--steps", "1", "--runs", "1")
    found = dict(re.findall(r"^(\w+) +\d+ +([\d.]+) x$", told, re.MULTILINE))
    assert sorted(found) == sorted(file.stem for file in (ROOT / "conf" / "objective").glob("*.yaml"))
    assert float(found["capo"]) == 1 and all(float(ratio) > 0 for ratio in found.values())


@pytest.mark.slow
def test_sampling(printed):
    told = printed("sampling", "--batch", "2", "--prompts", "1", "--runs", "1")
    found = rates(told, "images")
    assert list(found) == ["sampling", "pool", "pipeline"] and all(rate > 0 for rate, _ in found.values())
    # the same images but for rounding
    assert int(re.search(r"pixels of sampling and pipeline: (\d+) of 255 apart", told)[1]) <= 2


def test_reading(printed):
    told = printed("reading", "--batch", "4", "--prompts", "16", "--visits", "16", "--runs", "1")
    assert "in 6 files, 16 visits" in told  # two rows of 8 prompts: a text and two blocks of latents each
    shares = re.findall(r"^(training loader|storage alone) .* (\d+)% of memmap$", told, re.MULTILINE)
    assert len(shares) == 2 and all(int(share) > 0 for _, share in shares)
    assert re.search(r"^first epoch +\d+ pairs/s$", told, re.MULTILINE)


def test_growth_keeps_its_pool(printed, tmp_path):
    arguments = ("--prompts", "100", "--prompts_per_shard", "32", "--pool", str(tmp_path))
    told = printed("growth", *arguments)
    assert all(f"\n{stage}" in told for stage in ("prompts", "what is there", "selection", "first batch"))
    assert re.search(r"in all [\d.]+ s and [\d.]+ GiB", told)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    assert len(files) == 1 + 4 * 2 * 3  # the prompts; four rows of two blocks and three rewards
    printed("growth", *arguments)
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}


def test_jobs_take_turns():
    calls = []
    seconds = in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, runs=2)
    assert calls == [
        "b",
        "a",
        "a",
        "b",
        "b",
        "a",
    ]  # one round to warm up; then every round begins with another
    assert [len(found) for found in seconds.values()] == [2, 2]


def test_ratios_are_of_each_round():
    assert median_ratio([1, 2, 4], [2, 2, 12]) == 2  # 2, 1 and 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "lora"), [pytest.param("sdxl", False, marks=pytest.mark.slow), ("sd3", True)]
)
def test_full_size_steps_on_a_tiny_model(printed, tmp_path, monkeypatch, model, lora):
    wanted = [
        Setting(1, lora=lora, compare=True),
        Setting(2, lora=lora),
        Setting(1, lora=lora, checkpointing=False),
    ]
    monkeypatch.setattr(full_training, "settings", lambda model, size: wanted)
    take = full_training.run_setting

    def short_of_memory(setting, *others):
        if setting.micro_batch == 2:
            raise torch.OutOfMemoryError("no room")
        return take(setting, *others)

    monkeypatch.setattr(full_training, "run_setting", short_of_memory)
    file = tmp_path / "figures.json"
    arguments = tiny(model, file)
    told = printed("train_step", *arguments)
    rows = json.loads(file.read_text())["rows"]
    assert [row["status"] for row in rows.values()] == ["measured", "out of memory", "measured"]
    first = rows[wanted[0].key]
    assert all(first[f"faster than {way}"] > 0 for way in ("bare loop", "four passes", "published"))
    assert first["first_batch"].startswith(
        "largest |h| of the first batch: 0,"
    )  # every setting starts from the base
    assert rows[wanted[2].key]["first_batch"].startswith("largest |h| of the first batch: 0,")
    assert (
        f"{wanted[1].key}: out of memory" in told
        and file.with_suffix(".md").read_text().count("\n| ") == 2 + 3
    )

    before = file.read_bytes()
    printed("train_step", *arguments)  # nothing is missing, so nothing is measured
    assert file.read_bytes() == before
    printed("train_step", *arguments, "--plans")
    planned = [row["planned_bytes"] for row in json.loads(file.read_text())["rows"].values()]
    assert planned[1] > planned[0] > 0 and planned[2] > planned[0]  # more images; nothing computed again


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sdxl", "sd3"])
def test_full_size_sampling_on_a_tiny_model(printed, tmp_path, model):
    file = tmp_path / "figures.json"
    printed("sampling", *tiny(model, file))
    rows = json.loads(file.read_text())["rows"]
    assert list(rows) == ["batch 2", "batch 1"]
    assert all(
        row["status"] == "measured" and row["images_per_second"] > 0 and row["faster than pipeline"] > 0
        for row in rows.values()
    )


@pytest.mark.parametrize("model", ["sdxl", "sd3"])
def test_generation_of_a_pool_on_a_tiny_model(printed, tmp_path, model):
    """Row "measured": the scores with and without overlap are equal."""
    file = tmp_path / "figures.json"
    told = printed("generation", *tiny(model, file))
    (row,) = json.loads(file.read_text())["rows"].values()
    assert row["status"] == "measured" and "batch 2: measured; images_per_second" in told
    seconds = sum(row[f"{stage} seconds"] for stage in ("text", "latents", "scores"))
    assert row["images_per_second"] == pytest.approx(8 / seconds)
    shares = ("waits", "scores wait", "one after another, scores wait")
    assert all(0 <= row[share] <= 1 for share in shares) and row["scores faster than one after another"] > 0
    before = file.read_bytes()
    printed("generation", *tiny(model, file))  # nothing is missing, so nothing is measured
    assert file.read_bytes() == before


def test_scores_that_overlap_changes_are_no_figures(printed, tmp_path, monkeypatch):
    drawn = iter(range(9))
    monkeypatch.setattr(generation, "scores_of", lambda *_: torch.tensor(next(drawn)))
    file = tmp_path / "figures.json"
    assert "failed: RuntimeError: decoding ahead changed the scores" in printed(
        "generation", *tiny("sdxl", file)
    )


def test_a_cpu_waits_while_this_process_does_not_compute(monkeypatch):
    """Of 4 s on 2 threads, 8 s of their time, 2 s are computed: 1 - 2 / 8."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(time, "perf_counter", iter([10.0, 14.0]).__next__)
    monkeypatch.setattr(time, "process_time", iter([5.0, 7.0]).__next__)
    with Waits(torch.device("cpu")) as watch:
        pass
    assert watch.share == 0.75


def test_a_gpus_queue_is_looked_up(monkeypatch):
    """Half of the looks find it empty."""
    looks, enough = [], threading.Event()

    def query() -> bool:
        looks.append(len(looks) % 2 == 0)
        if len(looks) == 20:
            enough.set()
        return looks[-1]

    queue = SimpleNamespace(query=query)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: queue)
    with Waits(torch.device("cuda")) as watch:
        assert enough.wait(120)
    assert watch.share == sum(looks) / len(looks) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("model", ["sdxl", "sd3"])
def test_arithmetic_of_a_pair_is_what_torch_counts(model):
    blueprint, cpu = sized_blueprint(model, "tiny"), torch.device("cpu")
    network = random_module(blueprint, blueprint.denoiser_name, cpu)
    backbone, pairs = (
        random_backbone(model, {blueprint.denoiser_name: network}),
        random_pairs(blueprint, 2, cpu),
    )
    t = backbone.timesteps(pairs.u, backbone.draws[0])
    # the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        backbone.predict(network, pairs.latents[:, 0], t, pairs.text)
    forward = counter.get_total_flops() / 2  # of an image
    # two images: forward of policy and reference, backward of the policy at twice its forward
    assert full_training.pair_flops(blueprint, lora=False) == pytest.approx(2 * 4 * forward, rel=0.01)
    assert 2 * 3 * forward < full_training.pair_flops(blueprint, lora=True) < 2 * 4 * forward


def test_figures_of_a_step():
    clock = Clock({"other": None}, None)
    clock.plain, clock.stepping, clock.peaks = [9.0, 1.0, 3.0], [9.0, 1.5, 3.5], {"capo": 7, "other": 8}
    clock.rounds = {"capo": [18.0, 2.5, 6.5], "other": [20.0, 5.0, 13.0]}
    found = step_figures(clock, micro_batch=4)
    assert found["pairs_per_second"] == 2  # 4 pairs in 2 s; the first round warms up
    assert found["pairs_per_second_256"] == pytest.approx(256 / 128.5)  # 64 passes of 2 s, then 0.5 s
    assert found["faster than other"] == 2 and found["other pairs_per_second"] == pytest.approx(8 / 9)
    assert (found["peak_bytes"], found["other peak_bytes"]) == (7, 8)


def test_figures_of_two_machines_do_not_mix(tmp_path):
    file = tmp_path / "figures.json"
    Records(file, {"device": "one", "what": "step"}).add(
        "a", {"status": "measured", "peak_bytes": 2_500_000_000}
    )
    assert "| a | measured | 2.50 GB |" in file.with_suffix(".md").read_text()
    with pytest.raises(InputError, match="has results of one, this is two"):
        Records(file, {"device": "two", "what": "step"})


def test_what_fails_is_a_row():
    def compiler() -> dict:
        raise RuntimeError("no compiler\nand much more")

    assert measured(compiler) == {"status": "failed: RuntimeError: no compiler"}


def test_parts_that_ended_well_start_again_and_measure_what_they_lack(tmp_path, monkeypatch):
    """A part whose minutes are spent ends well too, so its exit code does not say that it is complete."""
    begun = []

    def ran(part, *others):
        begun.append(part.name)
        return gpu.Outcome(0, 1.0)

    monkeypatch.setattr(gpu, "run", ran)
    for _ in range(2):
        gpu.main(["--results", str(tmp_path)])
    assert begun == 2 * [part.name for part in gpu.PARTS]
    assert all(outcome["code"] == 0 for outcome in json.loads((tmp_path / gpu.SUMMARY).read_text()).values())
