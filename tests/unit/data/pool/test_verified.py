"""Checksums are compared once on a machine: by the process that opens a file first."""

import os
import shutil
import time

import pytest
import torch
from torch.utils.data import DataLoader

from capo.data.dataset import PairDataset, VisitSampler
from capo.data.pool import DamagedShard, Manifest, Pool, PoolReader
from capo.data.pool.files import TensorFile
from capo.data.prompts import make_prompt
from capo.data.selection import select
from capo.pairs import frs

PROMPTS = [make_prompt(text) for text in ("a circle", "a square", "a star", "a cross", "a ring", "a line")]
FILES = 3 * (1 + 2)  # rows of two prompts: each has its text, and blocks of 8 and 2 candidates


@pytest.fixture
def pool(tmp_path):
    manifest = Manifest(prompts_per_shard=2, seed=0, generator="g" * 64, latent_space="l", text_encoders="t")
    pool = Pool.create(tmp_path / "pool", manifest)
    pool.append_prompts(PROMPTS, "train")
    for shard in pool.shards(10):
        pool.write_latents(shard, torch.randn(len(shard.positions), len(shard.candidates), 2, 3, 3), {})
    for row in pool.text_shards():
        pool.write_text(row, {"embeds": torch.randn(2, 5)}, {})
    return pool


@pytest.fixture
def verified(tmp_path, monkeypatch):
    """Names of the files whose checksums were compared, by any process that was forked from this one."""
    log, verify = tmp_path / "log", TensorFile.verify

    def counted(self):
        with log.open("a") as file:
            file.write(f"{self.path.relative_to(tmp_path / 'pool')}\n")
        return verify(self)

    monkeypatch.setattr(TensorFile, "verify", counted)
    return lambda: log.read_text().split() if log.exists() else []


def read_all(pool):
    reader = PoolReader(pool)
    for position in range(len(PROMPTS)):
        reader.latents(position, range(10))
        reader.text(position)
    return reader


def flip_last_byte(path):
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        value = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([value ^ 1]))


def test_a_second_reader_goes_by_the_first_ones_record(pool, verified):
    read_all(pool)
    assert len(verified()) == len(set(verified())) == FILES
    read_all(pool)
    assert len(verified()) == FILES


def test_ranks_and_workers_verify_every_file_once(pool, verified):
    scores = torch.arange(60.0).view(6, 10, 1)
    selection = select(frs, scores, scores / 60)
    for rank in (0, 1):  # of two processes, each with two workers and a reader of its own
        dataset = PairDataset(PoolReader(pool), range(6), PROMPTS, selection, seed=0)
        stream = iter(VisitSampler(range(6), 0, 1, rank, 2))
        visits = [next(stream) for _ in range(12)]
        loader = DataLoader(dataset, batch_sampler=visits, num_workers=2, collate_fn=list)
        assert len(list(loader)) == 12
    assert len(verified()) == len(set(verified())) == FILES


def test_processes_that_open_a_file_at_once_verify_it_once(pool, verified, monkeypatch):
    """Four processes wait for one that takes its time."""
    verify = TensorFile.verify

    def slow(self):
        verify(self)
        time.sleep(0.3)

    monkeypatch.setattr(TensorFile, "verify", slow)
    children = []
    for _ in range(4):
        child = os.fork()
        if not child:
            code = 1
            try:
                PoolReader(pool).text(0)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert verified() == ["text/00000.safetensors"]


def test_a_changed_file_is_verified_again(pool, verified):
    reader = read_all(pool)
    path = pool.folder / "text" / "00001.safetensors"
    flip_last_byte(path)
    with pytest.raises(DamagedShard, match="checksum"):
        PoolReader(pool).text(2)
    assert verified()[FILES:] == ["text/00001.safetensors"]
    # also by a reader that has opened it before, once it opens it anew
    reader._open.clear()
    with pytest.raises(DamagedShard, match="checksum"):
        reader.text(2)
    # a damaged file is not noted: it is found again
    with pytest.raises(DamagedShard, match="checksum"):
        PoolReader(pool).text(2)


def test_a_copy_of_a_pool_is_verified_by_itself(pool, tmp_path):
    """Also where the copy has the record, the sizes and the times of the original."""
    read_all(pool)
    shutil.copytree(pool.folder, tmp_path / "copy")
    path = tmp_path / "copy" / "text" / "00001.safetensors"
    times = path.stat()
    flip_last_byte(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DamagedShard, match="checksum"):
        PoolReader(Pool.open(tmp_path / "copy")).text(2)


def test_a_pool_that_cannot_be_written_is_verified_by_every_process(pool, verified):
    (pool.folder / ".verified").write_text("no folder")
    read_all(pool)
    reader = read_all(pool)
    reader._open.clear()
    reader.text(0)
    assert len(verified()) == 2 * FILES


def test_a_line_that_a_killed_process_left_half_spoils_no_other(pool, verified):
    reader = PoolReader(pool)
    reader.text(0)
    record = next((pool.folder / ".verified").iterdir())
    with record.open("ab") as file:
        file.write(b"\n123 45")
    reader.text(2)
    read = PoolReader(pool)
    for position in (0, 2):
        read.text(position)
    assert verified() == ["text/00000.safetensors", "text/00001.safetensors"]


@pytest.mark.parametrize("what", [os.mkfifo, os.mkdir])
def test_a_record_that_is_no_ordinary_file_is_none(pool, verified, what):
    path = PoolReader(pool)._files.path
    path.parent.mkdir(exist_ok=True)
    what(path)
    read_all(pool)
    assert len(verified()) == FILES
