"""Runs in which the policy draws candidates anew: rounds, their pools, and resuming."""

import csv
import os
import shutil
from pathlib import Path

import pytest
import torch

from capo.cli import rounds
from capo.cli import train as train_script
from capo.cli.build import build_components
from capo.cli.outlook import followed
from capo.data.dataset import VisitSampler
from capo.data.pool import Pool
from capo.data.rounds import Round
from capo.errors import DamagedFile, InputError
from capo.metrics import largest_margin
from capo.module import PreferenceModule
from capo.training import loader
from capo.training.checkpoints import read_checkpoint
from fixtures.configuration import FOUR_STEPS

ADAPTER = ["+model.lora={rank: 2, alpha: 2, seed: 0}"]
ROUNDS = [*FOUR_STEPS, "online.every=2"]  # two rounds of two steps


class Cut(BaseException):
    """Stands for whatever ends a process."""


def weights(folder: Path, part: str = "state_dict") -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / "checkpoints" / "last.ckpt", "")[part]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)]


def files(folder: Path) -> dict[str, bytes]:
    """Contents of the rounds' files, without locks and notes of what was verified.

    Policies, whose fingerprints are in their pools' names, are left out: an adapter's header has no order.
    """
    skipped = {".locks", ".verified", "policy"}
    found = (path for path in folder.rglob("*") if path.is_file() and not skipped & {*path.parts})
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def samplers():
    """Seed and first batch of the visits of each round of `whole`."""
    return []


@pytest.fixture(scope="module")
def whole(tiny_run, samplers):
    """Folder of a run in two rounds that nothing has cut off."""

    def noted(rows, seed, batch, rank, world, start):
        samplers.append((seed, start))
        return VisitSampler(rows, seed, batch, rank, world, start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "VisitSampler", noted)
        train_script.run(tiny_run("whole", *ROUNDS))
    return tiny_run.folder / "whole"


def test_a_round_that_never_ends_is_the_run_without(tiny_run):
    two = [*FOUR_STEPS, "trainer.max_steps=2", "validation.every=2"]
    train_script.run(tiny_run("without", *two))
    train_script.run(tiny_run("never", *two, "online.every=2"))
    without, never = tiny_run.folder / "without", tiny_run.folder / "never"
    assert same(weights(without), weights(never)) and not (never / "online").exists()
    assert table(without / "metrics.csv") == table(never / "metrics.csv")
    [row] = table(never / "rounds.csv")
    assert (row["first step"], row["last step"]) == ("1", "2") and not (without / "rounds.csv").exists()


def test_each_round_begins_its_visits_anew(whole, samplers):
    assert samplers == [(0, 0), (Round(1, 2, 4).seed(0), 0)]


def test_the_second_round_has_candidates_of_the_policy(whole, tiny_run):
    """Drawn by the exported policy and scored, in a pool that has its fingerprint; the steps differ."""
    first, second = table(whole / "rounds.csv")
    [pool] = [path for path in (whole / "online" / "step000002").iterdir() if path.name.startswith("tiny-")]
    assert pool.name == second["pool"] != first["pool"] and first["drawn by"] != second["drawn by"]
    opened = Pool.open(pool)
    assert opened.manifest.seed == 1 and len(opened.prompts) == 4
    base = Pool.open(tiny_run.folder / "pools" / first["pool"])
    assert base.manifest.seed == 0 and base.manifest.generator != opened.manifest.generator
    assert (first["last step"], second["first step"], second["last step"]) == ("2", "3", "4")
    assert all(0 <= float(row["val/win_rate/r"]) <= 1 for row in (first, second))
    curves = [row for row in table(whole / "metrics.csv") if row.get("val/win_rate")]
    assert [row["step"] for row in curves] == ["2", "4"]  # each round ends with a validation
    assert float(curves[0]["val/win_rate/r"]) == pytest.approx(float(first["val/win_rate/r"]))
    assert (whole / "online" / "step000002" / "calibration" / "calibration.html").is_file()


PLACES = {
    "exporting": (rounds, "export_policy", 1),
    "drawing": (Pool, "write_scores", 2),
    "training": (PreferenceModule, "training_step", 6),  # the second step of the second round
}


def cut_off(monkeypatch, cfg, where: str) -> None:
    """Run `cfg` until the call of a function that PLACES names, and end it there."""
    owner, name, count = PLACES[where]
    function, calls = getattr(owner, name), []

    def counted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == count:
            raise Cut
        return function(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counted)
        with pytest.raises(Cut):
            train_script.run(cfg)


@pytest.mark.parametrize(
    "where",
    [pytest.param(place, marks=[] if place == "training" else [pytest.mark.slow]) for place in PLACES],
)
def test_a_run_cut_off_in_its_second_round_goes_on_to_the_same_pool_and_weights(
    tiny_run, whole, monkeypatch, where
):
    cfg, folder = tiny_run(where, *ROUNDS), tiny_run.folder / where
    cut_off(monkeypatch, cfg, where)
    assert (folder / "checkpoints" / "last.ckpt").is_file() and not (folder / "outcome.json").exists()
    train_script.run(cfg)
    assert same(weights(folder), weights(whole))
    assert files(folder / "online") == files(whole / "online")
    for name in ("metrics.csv", "rounds.csv"):
        assert table(folder / name) == table(whole / name)


@pytest.mark.slow
@pytest.mark.parametrize("where", PLACES)
def test_so_does_one_of_an_adapter_with_averaged_weights(tiny_run, monkeypatch, where):
    choices = [*ROUNDS, *ADAPTER, "trainer.ema=0.5", "trainer.max_steps=6", "online.keep=true"]
    reference = tiny_run.folder / "whole-adapter"
    if not reference.exists():
        train_script.run(tiny_run("whole-adapter", *choices))
    cfg, folder = tiny_run(f"adapter-{where}", *choices), tiny_run.folder / f"adapter-{where}"
    cut_off(monkeypatch, cfg, where)
    train_script.run(cfg)
    assert same(weights(folder), weights(reference))
    assert same(weights(folder, "average"), weights(reference, "average"))
    assert files(folder / "online") == files(reference / "online")
    assert table(folder / "rounds.csv") == table(reference / "rounds.csv")


@pytest.mark.slow
def test_a_policy_that_is_gone_is_missed_in_the_middle_of_its_round(tiny_run, monkeypatch):
    cfg, folder = tiny_run("gone", *ROUNDS, "trainer.checkpoint_every=1"), tiny_run.folder / "gone"
    with monkeypatch.context() as patch:
        patch.setitem(PLACES, "training", (PreferenceModule, "training_step", 8))
        cut_off(patch, cfg, "training")
    policy = folder / "online" / "step000002" / "policy"
    weights = next((policy / "unet").glob("*.safetensors"))
    os.truncate(weights, 1000)
    with pytest.raises(
        DamagedFile, match=r"step000002/policy/unet/.*; restore it, or train again in another"
    ):
        train_script.run(cfg)
    shutil.rmtree(policy)
    with pytest.raises(InputError, match=r"step000002/policy is not there: .* steps 3 to 4, .* at step 3"):
        train_script.run(cfg)


@pytest.mark.slow
def test_pools_of_earlier_rounds_are_dropped_unless_kept(tiny_run):
    three = [*ROUNDS, "trainer.max_steps=6", "online.prompts=3"]
    train_script.run(tiny_run("dropped", *three))
    train_script.run(tiny_run("kept", *three, "online.keep=true"))
    dropped, kept = tiny_run.folder / "dropped", tiny_run.folder / "kept"
    assert [path.name for path in (dropped / "online").iterdir()] == ["step000004"]
    assert sorted(path.name for path in (kept / "online").iterdir()) == ["step000002", "step000004"]
    assert table(dropped / "rounds.csv") == table(kept / "rounds.csv")
    prompts = (tiny_run.folder / "train.txt").read_text().splitlines()
    for part, drawn in (("step000002", prompts[:3]), ("step000004", [prompts[3], *prompts[:2]])):
        [pool] = (kept / "online" / part).glob("tiny-*")
        assert sorted(prompt.text for prompt, _ in Pool.open(pool).prompts) == sorted(drawn)
    assert same(weights(dropped), weights(kept))


@pytest.fixture
def first_margins(tiny_run, monkeypatch):
    """Trains, and returns the largest |h| of the first batch of each step."""
    pair_errors, found = PreferenceModule.pair_errors, {}

    def measured(self, batch):
        errors = pair_errors(self, batch)
        found.setdefault(self.global_step, largest_margin(errors, 1.0)[0])
        return errors

    def train(name: str, *overrides: str) -> dict[int, float]:
        found.clear()
        with monkeypatch.context() as patch:
            patch.setattr(PreferenceModule, "pair_errors", measured)
            train_script.run(tiny_run(name, *ROUNDS, *overrides))
        return dict(found)

    return train


@pytest.mark.parametrize(
    "lora", [pytest.param([], id="full"), pytest.param(ADAPTER, id="lora", marks=pytest.mark.slow)]
)
def test_the_generator_as_reference_has_no_margin_when_a_round_begins(first_margins, lora):
    found = first_margins(f"generator{len(lora)}", "reference=generator", *lora)
    assert found[0] == found[2] == 0 and found[1] > 0 and found[3] > 0


@pytest.mark.slow
def test_the_base_as_reference_keeps_the_margin_when_a_round_begins(first_margins):
    found = first_margins("frozen")
    assert found[0] == 0 and found[2] > 0


@pytest.mark.slow
def test_the_generator_without_rounds_is_the_base_bit_for_bit(tiny_run):
    for name, chosen in (("base", []), ("generated", ["reference=generator"])):
        train_script.run(tiny_run(f"{name}-reference", *FOUR_STEPS, *chosen))
    one, other = (weights(tiny_run.folder / f"{name}-reference") for name in ("base", "generated"))
    assert same(one, other)


@pytest.mark.slow
def test_a_resumed_run_has_the_pools_of_later_rounds_left(tiny_run):
    train_script.run(tiny_run("resumed", *ROUNDS))
    cfg = tiny_run("resumed", *ROUNDS, "trainer.max_steps=8", "planning.flops=1e9")
    with followed(cfg, build_components(cfg), tiny_run.folder / "resumed", []) as outlook:
        # rounds that begin after steps 4 and 6; each draws 4 images of 4 prompts
        assert outlook.left["latents", "latents"] == 2 * 16
        assert outlook.left["text", "text"] == 2 * 4
        assert outlook.left["training", "training"] == 4 * 4
        assert outlook.left["validation", "latents"] == 2 * 4  # of steps 6 and 8
