"""Records of W&B in the jobs of a sweep from elsewhere: read as what they are, or named."""

import json
import os

import pytest

from capo.cli.dashboard import tracked_sweep
from capo.cli.sweep import Job
from capo.errors import InputError

LOGGER = {"_target_": "capo.training.loggers.wandb_logger", "project": "p", "group": "g"}
RECORD = {"id": "a", "config": {"run": {"logger": {"wandb": LOGGER}}}, "summary": {}}


def tracked(folder, record, metrics=b"step,train/h\n"):
    (folder / "wandb.json").write_text(record if isinstance(record, str) else json.dumps(record))
    (folder / "metrics.csv").write_bytes(metrics)
    return tracked_sweep(folder, [Job(folder, {}, "finished")])


def test_a_record_says_where_its_run_went(tmp_path):
    found = tracked(tmp_path, RECORD)
    assert (found.project, found.group, found.curves) == ("p", "g", ["train/h"])


@pytest.mark.parametrize(("record", "metrics"), [
    ("[" * 10**5, b""),
    ("[1]", b""),
    (RECORD | {"id": 3}, b""),
    (RECORD | {"config": {"run": {"logger": {"w": LOGGER | {"entity": ["x"]}}}}}, b""),
    (RECORD, b"\xff\xfe\n"),
])  # fmt: skip
def test_damaged_records_and_curves_are_named(tmp_path, record, metrics):
    with pytest.raises(InputError, match=r"(wandb.json|metrics.csv) cannot be read .*; restore it, or move"):
        tracked(tmp_path, record, metrics)


@pytest.mark.parametrize("run", ["x", {"logger": [1]}, {"logger": "x"}])
def test_a_record_without_a_logger_has_no_group(tmp_path, run):
    with pytest.raises(InputError, match="its jobs went to own/None, group None of W&B"):
        tracked(tmp_path, RECORD | {"config": {"run": run}})


def test_curves_in_a_pipe_are_not_waited_for(tmp_path):
    (tmp_path / "wandb.json").write_text(json.dumps(RECORD))
    os.mkfifo(tmp_path / "metrics.csv")
    assert tracked_sweep(tmp_path, [Job(tmp_path, {}, "finished")]).curves == []
