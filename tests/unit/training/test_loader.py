"""Loader processes: how many there are, and whom they obey."""

import errno
import logging
import multiprocessing
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from capo.cli.schema import check_values
from capo.data.dataset import PairDataset
from capo.data.pool import DamagedShard
from capo.data.prompts import make_prompt
from capo.data.selection import select
from capo.errors import InputError, ParameterError
from capo.pairs import frs
from capo.training import loader as loading
from capo.training.loader import PreferenceData
from fixtures.configuration import composed


class Shelf:
    def latents(self, position, candidates):
        return torch.zeros(len(candidates), 4, 2, 2).half()

    def text(self, position):
        return {"prompt_embeds": torch.zeros(3, 5)}


def data(workers, device, **options) -> PreferenceData:
    scores = torch.tensor([[3.0, 2, 1, 0]])[..., None]
    dataset = PairDataset(Shelf(), [5], [make_prompt("a")], select(frs, scores, scores / 4), 0)
    made = PreferenceData(dataset, 2, workers, **options)
    progress = SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=0)))
    made.trainer = SimpleNamespace(
        global_rank=0,
        world_size=1,
        fit_loop=SimpleNamespace(epoch_loop=progress),
        strategy=SimpleNamespace(root_device=torch.device(device)),
    )
    return made


def encode(prompts):
    return {"prompt_embeds": torch.zeros(len(prompts), 3, 5)}


@pytest.mark.parametrize(
    ("workers", "device", "options", "expected"),
    [
        (None, "cuda", {}, 4),
        (None, "cpu", {}, 0),
        (None, "cuda", {"encode": encode}, 0),
        (0, "cuda", {}, 0),
        (3, "cpu", {}, 3),
        (3, "cuda", {"encode": encode}, 3),
    ],
)
def test_workers_are_those_of_the_device_unless_given(workers, device, options, expected):
    found = data(workers, device, **options).train_dataloader()
    assert found.num_workers == expected and found.prefetch_factor == (2 if expected else None)
    assert found.pin_memory == (device == "cuda")


@pytest.mark.parametrize("seen", [0, 2])
def test_a_dataset_of_a_later_round_begins_after_the_batches_before_it(seen):
    """Batch `seen` of the round, when the training has seen 5 before it."""
    alone, later = data(0, "cpu"), data(0, "cpu", begun=5)
    for loaded, ready in ((alone, seen), (later, 5 + seen)):
        loaded.trainer.fit_loop.epoch_loop.batch_progress.current.ready = ready
    one, other = (next(iter(loaded.train_dataloader())) for loaded in (alone, later))
    assert torch.equal(one.noise, other.noise) and torch.equal(one.u, other.u)


def test_too_little_shared_memory_for_workers_is_said(monkeypatch, caplog):
    """A batch of two pairs: latents and noise of 2 x 2 x 16 float32 each, u, 2 x 2 rewards, text 2 x 15.

    That is 2 x 256 + 8 + 16 + 120 = 656 bytes; 12 batches for each of two processes are 15744.
    """
    monkeypatch.setattr(loading, "launch", lambda: SimpleNamespace(local_world_size=2))
    for free, expected in ((15744, 4), (15743, 0)):
        monkeypatch.setattr(loading.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert data(None, "cuda").train_dataloader().num_workers == expected
        assert ("docker run --shm-size=1g" in caplog.text) == (not expected)
    assert data(2, "cuda").train_dataloader().num_workers == 2


def test_the_key_takes_a_number_or_null():
    assert composed().data.workers is None
    for given in ("null", "0", "3"):
        check_values(composed(f"data.workers={given}"))
    with pytest.raises(InputError, match=r"data\.workers"):
        check_values(composed("data.workers=-1"))


def test_workers_end_when_the_training_process_says_so_and_at_no_other_signal():
    others = set(multiprocessing.active_children())  # such as joblib's workers of another test
    stream = iter(data(2, "cpu").train_dataloader())
    for _ in range(2):  # a batch of each, so that both have begun
        next(stream)
    children = set(multiprocessing.active_children()) - others
    assert len(children) == 2
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        subprocess.run(["kill", f"-{number}", *(str(child.pid) for child in children)], check=True)
    for _ in range(20):
        next(stream)
    assert all(child.is_alive() for child in children)
    for child in children:  # as Python does when it exits
        child.terminate()
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "error",
    [
        DamagedShard(Path("text/00003.safetensors"), "its checksum is not that of its data"),
        ParameterError("times", "late", "must be early"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "latents/00003-00.safetensors"),
    ],
    ids=["damaged", "refused", "missing"],
)
def test_what_a_worker_is_refused_is_raised_as_it_was(monkeypatch, workers, error):
    def unreadable(self, position):
        raise error

    monkeypatch.setattr(Shelf, "text", unreadable)
    loader = data(workers, "cpu").train_dataloader()
    with pytest.raises(type(error)) as raised:
        next(iter(loader))
    if workers:  # as Lightning does; collected as garbage, a worker would first wait 5 s for its next batch
        loader._iterator._shutdown_workers()
    assert str(raised.value) == str(error) and vars(raised.value) == vars(error)
    if isinstance(error, OSError):  # from which its message is made
        assert (raised.value.errno, raised.value.filename) == (error.errno, error.filename)
