"""Ways to compute the same steps: memory and speed change, losses do not."""

import csv
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from capo.backbones import UNetBackbone, parts
from capo.cli import train as train_script
from capo.cli.build import build_components, training_data
from capo.data.dataset import collate, stratified_u
from capo.errors import InputError
from capo.module import PreferenceModule
from capo.pairs import frs
from capo.training import fit as training
from capo.training.loader import PreferenceData
from fixtures.configuration import THREE_STEPS as RUN

MARGIN = re.compile(r"largest \|h\| of the first batch: (\S+),")


def rows_in(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in rows if "train/loss" in row]


def losses_in(folder: Path) -> list[float]:
    return [row["train/loss"] for row in rows_in(folder)]


@pytest.fixture
def losses(tiny_run, capsys):
    """Runs with some overrides; the losses of its steps, and the largest |h| of its first batch."""

    def run(name: str, *overrides: str) -> tuple[list[float], float]:
        train_script.run(tiny_run(name, *RUN, *overrides))
        return losses_in(tiny_run.folder / name), float(MARGIN.search(capsys.readouterr().out)[1])

    return run


@pytest.fixture(scope="module")
def plain(tiny_run):
    train_script.run(tiny_run("plain", *RUN))
    return tiny_run.folder / "plain"


@pytest.mark.parametrize(
    "option, tolerance",
    [
        ("trainer.gradient_checkpointing=true", 0),  # the same operations once more
        ("trainer.micro_batch=2", 1e-4),
        ("data.text=encode", 1e-4),
        (
            "trainer.channels_last=true",
            1e-3,
        ),  # other kernels: Adam moves weights with next to no gradient by its rounding
    ],
)
def test_memory_is_saved_without_another_loss(losses, plain, option, tolerance):
    expected = losses_in(plain)
    found, margin = losses(option.replace("=", "-"), option)
    assert margin == 0 and len(found) == 3 and found[0] != found[2]
    assert found == pytest.approx(expected, rel=tolerance, abs=0)


@pytest.mark.parametrize("lora", [[], ["+model.lora.rank=2", "+model.lora.alpha=2"]], ids=["full", "lora"])
def test_half_precision_begins_at_the_reference(losses, lora):
    found, margin = losses(f"half{len(lora)}", "trainer.precision=bf16-mixed", *lora)
    assert margin == 0 and all(loss > 0 for loss in found)


def test_times_and_anchor_of_the_configuration_reach_the_steps(tiny_run, monkeypatch):
    step, seen = PreferenceModule.training_step, []

    def watched(self, batch, index):
        seen.append((self.reduction, batch.times, batch.u.tolist()))
        return step(self, batch, index)

    monkeypatch.setattr(PreferenceModule, "training_step", watched)
    times = ["noise.times=stratified", "noise.times_per_pair=2", "noise.reduction=inside"]
    train_script.run(tiny_run("times", *RUN, *times, "anchor.weight=2", "seed=3", "trainer.micro_batch=2"))
    first = [stratified_u(3, place) for place in range(12)]  # three steps of four pairs
    assert [u for _, _, found in seen for u in found[::2]] == pytest.approx(first, abs=1e-6)
    assert {(reduction, times, len(u)) for reduction, times, u in seen} == {("inside", 2, 4)}
    rows = rows_in(tiny_run.folder / "times")
    # at the start policy = reference, so that the anchor is 0; later the winner's error is above somewhere
    assert rows[0]["train/anchor"] == 0 and max(row["train/anchor"] for row in rows) > 0


def test_a_row_averages_the_steps_since_the_last_one(tiny_run):
    """Also in a run that stopped between two rows; drift by time reaches the rows whatever their distance."""
    four = ["trainer.max_steps=4", "validation.every=4"]
    train_script.run(tiny_run("each", *RUN, *four))
    train_script.run(tiny_run("fourth", *RUN, *four, "trainer.log_every=4"))
    stopped = [*RUN, "trainer.log_every=4", "validation.every=3"]
    train_script.run(tiny_run("stopped", *stopped, "trainer.max_steps=3"))
    train_script.run(tiny_run("stopped", *stopped, "trainer.max_steps=4"))
    each = rows_in(tiny_run.folder / "each")
    (row,), (resumed,) = (rows_in(tiny_run.folder / name) for name in ("fourth", "stopped"))
    assert len(each) == 4 and row["step"] == 4
    for name in ("train/loss", "train/gradient_norm", "train/clipped", "train/drift_winner"):
        assert row[name] == pytest.approx(sum(step[name] for step in each) / 4, rel=1e-6), name
    drift = [name for name in row if name.startswith("drift/winner/")]
    assert drift  # 16 pairs, each counted in one fifth of the times
    row.pop("time/pairs_per_second"), resumed.pop("time/pairs_per_second")
    assert resumed == pytest.approx(row, rel=1e-6)


@pytest.mark.slow
def test_compiled_blocks_take_the_same_steps(losses, plain):
    compiled, margin = losses("compiled", "trainer.compile=true")
    assert compiled == pytest.approx(losses_in(plain), rel=1e-3) and margin < 1e-5


def test_text_encoded_aside_is_the_stored_one(tiny_run):
    """Bit for bit where the same prompts are encoded together, as here: a shard's."""
    components = build_components(tiny_run("text"))
    dataset = training_data(tiny_run("text"), components).select(frs, "win_rate", 0, False).dataset
    stored = collate([{**dataset[row, 0]} for row in range(4)])
    data = PreferenceData(dataset, 4, encode=partial(training.encode_aside, components.backbone))
    assert dataset[0, 0]["text"] == {}
    encoded = collate([dataset[row, 0] for row in range(4)], data.encode)
    assert encoded.text.keys() == stored.text.keys()
    assert all(torch.equal(encoded.text[name], stored.text[name]) for name in stored.text)
    assert encoded.prompt_ids == stored.prompt_ids


CONDITIONING = ("vae", "text_encoder", "text_encoder_2")


def placed(
    patch: pytest.MonkeyPatch, modules: dict[str, torch.nn.Module], where: dict[str, torch.device]
) -> None:
    """Makes the backbone take modules to be where `where` has them, and its moves change that.

    Their weights stay where they are.
    """
    names = {id(module): name for name, module in modules.items()}

    def place(module):
        return where[names[id(module)]] if id(module) in names else next(module.parameters()).device

    def move(module, device):
        where[names[id(module)]] = device

    patch.setattr(parts, "_place", place)
    patch.setattr(parts, "_move", move)


def test_no_autoencoder_and_no_text_encoder_is_on_the_device_during_steps(tiny_run, monkeypatch):
    """Even where all of the base was there before; in validation they work on the trainer's device."""
    fit, step, decode, visiting = (
        training.fit,
        PreferenceModule.training_step,
        UNetBackbone.decode,
        UNetBackbone.visiting,
    )
    where, seen = {}, []

    def watched_fit(module, data, validation, *args, **options):
        modules = {name: getattr(module.backbone.pipeline, name) for name in (*CONDITIONING, "unet")}
        with monkeypatch.context() as patch:
            where.update(dict.fromkeys(modules, torch.device("cuda")))
            placed(patch, modules, where)
            best = fit(module, data, validation, *args, **options)
            seen.append(("after", *sorted({str(device) for device in where.values()})))
        return best

    def watched_step(self, batch, index):
        seen.append(("step", *(str(where[name]) for name in CONDITIONING)))
        return step(self, batch, index)

    @contextmanager
    def watched_visiting(self, device):
        seen.append(("called to", str(device)))
        with visiting(self, device) as found:
            yield found
        seen.append(("gone",))

    def watched_decode(self, latents, batch=8):
        seen.append(("decode",))
        return decode(self, latents, batch)

    monkeypatch.setattr("capo.cli.tune.fit", watched_fit)
    monkeypatch.setattr(PreferenceModule, "training_step", watched_step)
    monkeypatch.setattr(UNetBackbone, "visiting", watched_visiting)
    monkeypatch.setattr(UNetBackbone, "decode", watched_decode)
    train_script.run(tiny_run("placed", *RUN))  # three steps, then validation
    steps = [event for event in seen if event[0] == "step"]
    assert steps == [("step", "cpu", "cpu", "cpu")] * 3
    last = max(index for index, event in enumerate(seen) if event[0] == "step")
    validation = [("called to", "cpu"), ("decode",), ("gone",)]  # to the trainer's device, here the CPU
    assert seen[last + 1 : last + 5] == [*validation, ("after", "cpu")]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["trainer.micro_batch=2"],
            "smaller trainer.micro_batch (now 2); trainer.gradient_checkpointing=true",
        ),
        (["trainer.micro_batch=1", "trainer.gradient_checkpointing=true"], "memory: experiment=lora"),
    ],
)
def test_a_step_that_does_not_fit_names_what_takes_less(tiny_run, monkeypatch, overrides, told):
    def full(self, batch, index):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nof 80")

    monkeypatch.setattr(PreferenceModule, "training_step", full)
    with pytest.raises(InputError) as refused:
        train_script.run(tiny_run(f"full{len(overrides)}", *RUN, *overrides))
    assert told in str(refused.value) and "Tried to allocate 2.00 GiB)" in str(refused.value)
