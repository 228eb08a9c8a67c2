"""How checkpoints are written, and how a run goes on from one."""

import hashlib
import io
import os
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from capo.cli import train as train_script
from capo.cli.run_config import Progress, open_run, run_id
from capo.errors import InputError
from capo.module import PreferenceModule
from capo.training.checkpoints import ValidatedCheckpoint, WholeCheckpoints, load_best, recount
from capo.training.choice import Choice
from fixtures.configuration import THREE_STEPS

MEGABYTE = 2**20
FILE = WholeCheckpoints()


def test_counts_become_those_of_as_many_steps():
    # three steps of one batch, saved before the last is completed; from now on two batches a step
    progress = {
        where: {"ready": 3, "started": 3, "processed": 3, "completed": 2} for where in ("total", "current")
    }
    recount(progress, 6)
    assert (
        progress["total"] == progress["current"] == {"ready": 6, "started": 6, "processed": 6, "completed": 5}
    )
    recount(progress, 6)
    assert progress["current"]["completed"] == 5


def state(value: float) -> dict:
    """A checkpoint of 96 MB in tensors of 4 MB."""
    return {"state_dict": {f"w{number}": torch.full((MEGABYTE,), value + number) for number in range(24)}}


def in_a_child(work) -> int:
    """Exit code of a process forked for `work`, which returns it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 255
    try:
        code = work()
    finally:
        os._exit(code)


def growth(work) -> int:
    """By how many MB, up to 255, `work` raises the resident memory of a process at its peak."""

    def resident(name: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(f"{name}:")) // 1024

    def measured() -> int:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forgets the peak
        before = resident("VmRSS")
        work()
        return min(resident("VmHWM") - before, 255)  # an exit code

    return in_a_child(measured)


def test_writing_takes_no_copy_in_memory(tmp_path):
    checkpoint = state(0)
    held = [value.sum().item() for value in checkpoint["state_dict"].values()]  # every page is there
    assert growth(lambda: torch.save(checkpoint, io.BytesIO())) > 90  # what a copy in memory shows
    assert growth(lambda: FILE.save_checkpoint(checkpoint, tmp_path / "last.ckpt")) < 20
    found = FILE.load_checkpoint(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert [value.sum().item() for value in found.values()] == held


def test_reading_takes_no_copy_in_memory(tmp_path):
    FILE.save_checkpoint(state(0), tmp_path / "last.ckpt")
    kept = []  # held, as by the trainer
    assert growth(lambda: kept.append(FILE.load_checkpoint(tmp_path / "last.ckpt", weights_only=True))) < 20


def test_a_kill_in_the_middle_leaves_the_previous_file(tmp_path):
    last, unfinished = tmp_path / "last.ckpt", tmp_path / ".last.ckpt.tmp"
    FILE.save_checkpoint({"state_dict": {"w": torch.ones(3)}}, last)
    before = last.read_bytes()

    def killed() -> int:
        """By the kernel, at the write that makes the file longer than a megabyte."""
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (MEGABYTE, MEGABYTE))
        FILE.save_checkpoint(state(1), last)
        return 0

    assert in_a_child(killed) == -signal.SIGXFSZ
    assert unfinished.stat().st_size == MEGABYTE and last.read_bytes() == before
    FILE.save_checkpoint({"state_dict": {"w": torch.zeros(3)}}, last)
    assert not unfinished.exists() and last.read_bytes() != before


def test_a_full_disk_is_named_and_the_previous_file_kept(tmp_path):
    last = tmp_path / "last.ckpt"
    FILE.save_checkpoint({"w": torch.ones(3)}, last)
    before = last.read_bytes()

    def limited() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MEGABYTE, MEGABYTE))
        try:
            FILE.save_checkpoint(state(0), last)
        except InputError as error:
            return 3 if f"{last} cannot be written (File too large): make room" in str(error) else 1
        return 0

    assert in_a_child(limited) == 3
    assert last.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.fixture(scope="module")
def finished(tiny_run):
    train_script.run(tiny_run("linked", *THREE_STEPS))
    return tiny_run.folder / "linked"


def test_best_and_last_of_a_step_are_one_file(finished):
    best, last = finished / "checkpoints/000003.ckpt", finished / "checkpoints/last.ckpt"
    assert best.samefile(last) and best.stat().st_nlink == 2
    assert sorted(path.name for path in best.parent.iterdir()) == ["000003.ckpt", "last.ckpt"]


def test_a_linked_run_that_was_moved_goes_on_and_keeps_its_best(tiny_run, finished):
    """Also where the copy has lost the link, and no byte of the best is touched by what follows."""
    for name, copy in (("moved", os.rename), ("copied", shutil.copytree)):
        origin = tiny_run.folder / f"{name}-from"
        shutil.copytree(finished, origin)
        copy(origin, tiny_run.folder / name)
        folder = tiny_run.folder / name / "checkpoints"
        before = hashlib.sha256((folder / "000003.ckpt").read_bytes()).digest()
        train_script.run(tiny_run(name, *THREE_STEPS, "trainer.max_steps=5"))
        assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 5
        if (folder / "000003.ckpt").exists():  # else step 5 was better
            assert hashlib.sha256((folder / "000003.ckpt").read_bytes()).digest() == before
            assert not (folder / "000003.ckpt").samefile(folder / "last.ckpt")
        else:
            assert (folder / "000005.ckpt").samefile(folder / "last.ckpt")


def test_a_finished_run_without_its_best_checkpoint_stays_finished(tiny_run, finished):
    run = shutil.copytree(finished, tiny_run.folder / "bestless")
    (run / "checkpoints/000003.ckpt").unlink()
    before = {path: path.read_bytes() for path in (run / "outcome.json", run / "config.yaml")}
    with pytest.raises(InputError, match=r"000003\.ckpt .*\(it is not there\); copy .*last\.ckpt"):
        train_script.run(tiny_run("bestless", *THREE_STEPS, "trainer.max_steps=4"))
    assert {path: path.read_bytes() for path in before} == before


def test_a_checkpoint_of_another_run_is_not_gone_on_from(tiny_run, finished):
    """One that only its seed, or a rate, tells from this run: all tensors fit."""
    last = "checkpoints/last.ckpt"
    other = torch.load(finished / last, weights_only=True)
    assert other["run"] == run_id(finished)
    begun = open_run(tiny_run.folder / "mixed", tiny_run("mixed", *THREE_STEPS, "seed=1"))
    assert begun is Progress.NEW and run_id(tiny_run.folder / "mixed") != run_id(finished)
    (tiny_run.folder / "mixed/checkpoints").mkdir()
    shutil.copy(finished / last, tiny_run.folder / "mixed" / last)
    with pytest.raises(InputError, match=r"last\.ckpt is a checkpoint of another run .*: remove it to start"):
        train_script.run(tiny_run("mixed", *THREE_STEPS, "seed=1"))
    # nor is its policy exported: a best checkpoint of another run
    with pytest.raises(InputError, match=r"is a checkpoint of another run .*: evaluate the policy as it was"):
        load_best(SimpleNamespace(run="another"), finished / "checkpoints/000003.ckpt")
    # a run of a version without such identities goes on, and keeps what its directory says
    del other["run"]
    older = shutil.copytree(finished, tiny_run.folder / "older")
    for name in (last, "checkpoints/000003.ckpt"):
        torch.save(other, older / name)
    train_script.run(tiny_run("older", *THREE_STEPS, "trainer.max_steps=4", "data.workers=0"))
    assert run_id(older) == run_id(finished) == torch.load(older / last, weights_only=True)["run"]


def test_the_best_stays_until_the_last_names_another(tiny_run, monkeypatch):
    """A run that is killed between the two resumes from a last checkpoint whose best is there."""
    seen, save = [], ValidatedCheckpoint._save_last_checkpoint

    def noted(self, trainer, candidates):
        seen.append(sorted(path.name for path in Path(self.dirpath).iterdir()))
        save(self, trainer, candidates)

    monkeypatch.setattr(ValidatedCheckpoint, "_save_last_checkpoint", noted)
    monkeypatch.setattr(Choice, "_better", lambda *_: True)
    train_script.run(tiny_run("two", *THREE_STEPS, "trainer.max_steps=2", "validation.every=1"))
    assert seen == [["000001.ckpt"], ["000001.ckpt", "000002.ckpt", "last.ckpt"]]
    left = tiny_run.folder / "two/checkpoints"
    assert sorted(path.name for path in left.iterdir()) == ["000002.ckpt", "last.ckpt"]


def test_without_links_there_are_two_files(tiny_run, monkeypatch, finished):
    def refuse(*arguments, **options):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    saved = []
    save = WholeCheckpoints.save_checkpoint

    def counted(self, checkpoint, path, storage_options=None):
        saved.append(str(path).rsplit("/", 1)[-1])
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(WholeCheckpoints, "save_checkpoint", counted)
    train_script.run(tiny_run("apart", *THREE_STEPS))
    folder = tiny_run.folder / "apart/checkpoints"
    assert saved == ["000003.ckpt", "last.ckpt"]
    assert not (folder / "000003.ckpt").samefile(folder / "last.ckpt")
    one, other = (
        torch.load(path / "last.ckpt", weights_only=True)["state_dict"]
        for path in (folder, finished / "checkpoints")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_last_checkpoint_of_its_own_step_is_a_file_of_its_own(tiny_run, monkeypatch):
    """Steps 1 and 2 are saved for resuming, 3 is the best: what is linked is never written into."""
    step = PreferenceModule.training_step

    def cut(self, batch, index):
        if self.global_step == 3:
            raise KeyboardInterrupt
        return step(self, batch, index)

    monkeypatch.setattr(PreferenceModule, "training_step", cut)
    changes = ["trainer.max_steps=5", "validation.every=2", "trainer.checkpoint_every=1"]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train_script.run(tiny_run("own", *THREE_STEPS, *changes))
    folder = tiny_run.folder / "own/checkpoints"
    best, last = folder / "000002.ckpt", folder / "last.ckpt"
    assert [torch.load(path, weights_only=True)["global_step"] for path in (best, last)] == [2, 3]
    assert not best.samefile(last)
