"""Runs whose reference follows the policy: what they train, save and resume from."""

import pytest
import torch

from capo.cli import train as train_script
from capo.errors import InputError
from capo.training.checkpoints import read_checkpoint
from fixtures.configuration import THREE_STEPS as RUN

FOUR = [*RUN, "trainer.max_steps=4", "trainer.checkpoint_every=1"]
ADAPTER = ["+model.lora={rank: 2, alpha: 2, seed: 0}"]


def last_of(folder):
    return read_checkpoint(folder / "checkpoints" / "last.ckpt", "")


def test_a_checkpoint_holds_the_reference_as_it_is_after_its_step(tiny_run):
    """A copy renewed at the step at which it is saved is the policy of that step."""
    copied = ["reference=ema", "reference.decay=0", "reference.interval=3"]
    train_script.run(tiny_run("copied", *RUN, *copied))
    end = last_of(tiny_run.folder / "copied")
    assert end["reference"].keys() == end["state_dict"].keys()
    assert all(torch.equal(value, end["state_dict"][key]) for key, value in end["reference"].items())


@pytest.mark.slow
@pytest.mark.parametrize("lora", [[], ADAPTER], ids=["full", "lora"])
def test_it_resumes_bit_for_bit(tiny_run, lora):
    moving = [*FOUR, *lora, "reference=ema", "reference.decay=0.5", "reference.interval=2"]
    name = f"moving{len(lora)}"
    train_script.run(tiny_run(f"{name}-whole", *moving))
    for steps in (3, 4):  # ends between two updates of the reference
        train_script.run(tiny_run(name, *moving, f"trainer.max_steps={steps}"))
    whole, resumed = (last_of(tiny_run.folder / folder) for folder in (f"{name}-whole", name))
    for part in ("state_dict", "reference"):
        assert whole[part].keys() == resumed[part].keys()
        assert all(torch.equal(value, resumed[part][key]) for key, value in whole[part].items())
    trained = {key for key in whole["state_dict"] if not lora or "lora_" in key}
    assert whole["reference"].keys() <= trained and any(
        not value.equal(whole["state_dict"][key]) for key, value in whole["reference"].items()
    )
    with pytest.raises(InputError, match=r"reference\.decay: 0\.5 -> 0\.9"):
        train_script.run(tiny_run(name, *moving, "reference.decay=0.9"))


@pytest.mark.slow
def test_it_changes_the_steps_after_its_first_update_alone(tiny_run):
    """The exported policy is the trained one; a frozen reference is in no checkpoint."""
    ends = {}
    choices = {
        "frozen": [],
        "late": ["reference=ema", "reference.interval=4"],
        "early": ["reference=ema", "reference.decay=0"],
    }
    for name, chosen in choices.items():
        train_script.run(tiny_run(f"{name}-reference", *FOUR, *chosen))
        ends[name] = last_of(tiny_run.folder / f"{name}-reference")
    frozen, late, early = (end["state_dict"] for end in ends.values())
    assert all(torch.equal(value, late[key]) for key, value in frozen.items())
    assert any(not torch.equal(value, early[key]) for key, value in frozen.items())
    assert "reference" not in ends["frozen"]
    policy, other = (tiny_run.folder / f"{name}-reference" / "policy" for name in ("late", "frozen"))
    weights = sorted(path.relative_to(policy) for path in policy.rglob("*.safetensors"))
    assert weights and all((policy / path).read_bytes() == (other / path).read_bytes() for path in weights)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (["objective=sft"], r"reference\.decay=0\.99: must be null \(reference=frozen\), since this"),
        (["trainer.pinned=0.1"], r"reference\.decay=0\.99: must be null .* with trainer\.pinned=0\.1"),
        (["trainer.strategy=fsdp"], r"does not support a reference that follows the policy \(reference="),
    ],
)
def test_what_it_does_not_go_with_is_refused_early(tiny_run, monkeypatch, choice, message):
    monkeypatch.setattr("capo.cli.tune.complete_run", lambda *_: pytest.fail("training began"))
    with pytest.raises(InputError, match=message):
        train_script.run(tiny_run("refused", *RUN, "reference=ema", *choice))
