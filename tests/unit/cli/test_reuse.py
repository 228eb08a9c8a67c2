"""Runs that reuse the reference's errors: the same weights, without its passes, and never by mistake."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from capo import module
from capo.backbones import networks
from capo.backbones.parallel import place
from capo.cli import train as train_script
from capo.cli.build import build_components, training_data
from capo.cli.parts import module_of
from capo.cli.readiness import check_objective
from capo.cli.reuse import reference_settings, reused_reference
from capo.data.dataset import Times
from capo.data.reference_errors import ReferenceErrors
from capo.errors import InputError
from capo.module import PreferenceModule
from capo.pairs import frs
from capo.training.loader import PreferenceData
from fixtures.configuration import THREE_STEPS, composed

REUSE = "trainer.reuse_reference=true"
RUN = [*THREE_STEPS, "trainer.micro_batch=2"]  # six passes
LORA = ["+model.lora.rank=2", "+model.lora.alpha=2", "+model.lora.seed=0"]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def trained(tiny_run, monkeypatch, capsys):
    """Trains a run; its weights, passes of the reference, networks on the device, and what was said."""
    reference = PreferenceModule.reference
    asked, placed = [], []

    def counted(self):
        asked.append(self)
        return reference(self)

    def noted(network, *where):
        placed.append(network)
        place(network, *where)

    monkeypatch.setattr(PreferenceModule, "reference", counted)
    for home in (module, networks):  # of the policy, and of the reference
        monkeypatch.setattr(home, "place", noted)

    def run(name: str, *overrides: str):
        asked.clear()
        placed.clear()
        train_script.run(tiny_run(name, *RUN, *overrides))
        return weights_of(tiny_run.folder / name), len(asked), len(placed), capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    "lora", [pytest.param([], id="full"), pytest.param(LORA, id="lora", marks=pytest.mark.slow)]
)
def test_a_second_run_has_the_same_weights_without_a_pass(trained, lora):
    kind, separate = f"r{len(lora)}", not lora
    plain, passes, placed, _ = trained(f"{kind}-plain", *lora, "objective.beta=50")
    assert passes == 6 and placed == 1 + separate  # the policy, and beside it the reference
    _, passes, placed, said = trained(f"{kind}-first", *lora, REUSE, "objective.beta=100")
    assert passes == 6 and placed == 1 + separate and "0 reused, 6 made; known now: 6 passes" in said
    reused, passes, placed, said = trained(f"{kind}-second", *lora, REUSE, "objective.beta=50")
    assert passes == 0 and placed == 1 and "6 reused, 0 made" in said and "bytes a pair" in said
    assert same(reused, plain)


def test_a_run_that_stops_midway_leaves_what_it_made(trained, tiny_run, monkeypatch):
    plain, *_ = trained("m-plain", "seed=5")
    step, steps = PreferenceModule.training_step, []

    def stopping(self, batch, index):
        steps.append(index)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(PreferenceModule, "training_step", stopping)
        with pytest.raises(BaseException):  # noqa: B017  # Lightning ends the process
            trained("m-stopped", REUSE, "seed=5")
    whole, passes, _, said = trained("m-whole", REUSE, "seed=5")
    assert passes == 3 and "3 reused, 3 made" in said and same(whole, plain)


@pytest.fixture(scope="module")
def recalled(tiny_run):
    """Whether the first pass of a run with some overrides is one that an earlier such call has kept."""
    components = {}

    def ask(*overrides: str) -> bool:
        cfg = tiny_run("unused", "seed=77", *overrides)
        made_of = cfg.pool.seed, cfg.model.backbone.get("scheduler"), cfg.model.backbone.get("dtype")
        if made_of not in components:
            components[made_of] = build_components(cfg)
        built, data = module_of(cfg, components[made_of].backbone), training_data(cfg, components[made_of])
        options = {"group": cfg.selection.group, "source": cfg.noise.source}
        dataset = data.select(frs, cfg.calibration, cfg.seed, cfg.noise.shared, **options).dataset
        times = Times(cfg.noise.times, cfg.noise.times_per_pair)
        batches = PreferenceData(dataset, cfg.trainer.batch, 0, times=times, digests=True)
        batch = next(iter(batches.train_dataloader()))
        built.known = ReferenceErrors(data.pool.folder, reference_settings(cfg, built))
        with torch.autocast("cpu", torch.bfloat16, enabled=cfg.trainer.precision == "bf16-mixed"):
            built.pair_errors(batch)
        built.known.close()
        assert built.known.recalled + built.known.computed == 1
        return bool(built.known.recalled)

    assert not ask() and ask()
    return ask


@pytest.mark.parametrize(
    "setting",
    [
        "seed=1",
        "pool.seed=1",
        "noise.draw=logsnr_normal",
        "noise.source=prior noise.shared=false",
        "noise.shared=false",
        "noise.times=stratified",
        "noise.times_per_pair=2",
        "trainer.precision=bf16-mixed",
        "trainer.batch=3",
        "trainer.channels_last=true",
        "+model.backbone.dtype=bfloat16",
        "+model.backbone.scheduler=DDPMScheduler",
    ],
)
def test_another_setting_is_another_pass(recalled, setting):
    assert not recalled(*setting.split())


def test_the_policy_with_its_adapter_off_is_another_reference(recalled):
    assert not recalled(*LORA) and recalled(*LORA)
    other_rank = ["+model.lora.rank=1", "+model.lora.alpha=1", "+model.lora.seed=3"]
    assert recalled(*other_rank)  # the adapter is off: any will do


@pytest.mark.parametrize(
    "setting",
    [
        "objective.beta=7",
        "objective=ipo",
        "trainer.lr=1e-3",
        "noise.bias=2",
        "noise.weighting=constant",
        "anchor.weight=1",
    ],
)
def test_what_the_reference_does_not_see_shares_its_passes(recalled, setting):
    assert recalled(setting)


def test_an_objective_without_a_reference_has_nothing_to_reuse(tiny_run, tiny_backbone, tmp_path, capsys):
    cfg = tiny_run("unused", REUSE, "objective=sft")
    built = module_of(cfg, tiny_backbone)
    with reused_reference(cfg, built, tmp_path, Console()):
        assert built.known is None
    assert "objective=sft reads no reference" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["noise.source=inverted"], "noise.source=inverted"),
        (["trainer.pinned=0.1"], "pinned pairs"),
        (["trainer=fsdp"], "every pass together"),
    ],
)
def test_a_configuration_that_cannot_reuse_is_refused(settings, told):
    check_objective(composed(*settings))
    with pytest.raises(InputError, match=rf"trainer\.reuse_reference.* must be false, since .*{told}"):
        check_objective(composed(*settings, REUSE))
