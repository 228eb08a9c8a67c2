"""What a run says before it begins."""

from types import SimpleNamespace

import pytest

from capo.cli import parts
from capo.cli import train as train_script
from capo.errors import InputError
from capo.training.summary import unused_devices


def test_devices_that_are_not_used_are_told():
    assert unused_devices(0, 1) is None and unused_devices(8, 8) is None
    assert "8 GPUs seen, 1 used: torchrun --nproc-per-node 8 train.py" in unused_devices(8, 1)


def test_what_is_optimized_is_told_before_any_image_is_drawn(tiny_run, monkeypatch, capsys):
    def refuse(*args, **options):
        raise InputError("no image is drawn here")

    monkeypatch.setattr(parts, "GeneratedImages", SimpleNamespace(fill=refuse))
    with pytest.raises(InputError, match="no image is drawn here"):
        train_script.run(tiny_run("told", "objective.beta=17"))
    told = capsys.readouterr().out
    assert "what is being optimized" in told and "17, on mean errors" in told
