"""A pool from elsewhere is written to in its own folder alone, wherever links in it lead."""

import os

import pytest
import torch

from capo.data.pool import Manifest, Pool
from capo.data.pool.layout import reference_errors_path
from capo.data.pool.verified import VerifiedFiles
from capo.data.prompts import make_prompt
from capo.errors import InputError
from capo.runtime.locks import file_lock

MANIFEST = Manifest(prompts_per_shard=2, seed=0, generator="g" * 64, latent_space="l", text_encoders="t")


@pytest.fixture
def pool(tmp_path):
    """One row of two prompts with latents and scores of one reward."""
    (tmp_path / "away").mkdir()
    pool = Pool.create(tmp_path / "pool", MANIFEST)
    pool.append_prompts([make_prompt("a circle"), make_prompt("a square")], "train")
    for shard in pool.shards(1):
        pool.write_latents(shard, torch.zeros(2, 1, 2, 3, 3), {})
        pool.write_scores("looks-12345678", shard, torch.zeros(2, 1), {})
    return pool


@pytest.mark.parametrize(
    "name", ["text", "latents", "scores", "scores/looks-12345678", "reference", ".verified", ".locks"]
)
def test_a_folder_that_leads_out_of_the_pool_is_refused_before_anything_is_written(pool, tmp_path, name):
    place, away = pool.folder / name, tmp_path / "away"
    if place.exists():
        place.rename(tmp_path / "moved")
    place.symlink_to(away)
    told = rf"{name} is a link to {away}, outside of .*/pool, where .*the whole folder of a pool, may be"
    with pytest.raises(InputError, match=told):
        Pool.open(pool.folder)
    with pytest.raises(InputError, match=told):
        Pool.create(pool.folder, MANIFEST)
    (pool.folder / "manifest.json").unlink()  # a new pool takes a lock before it writes its manifest
    with pytest.raises(InputError, match=told):
        Pool.create(pool.folder, MANIFEST)
    assert not any(away.iterdir()) and not (pool.folder / "manifest.json").exists()


def test_a_file_of_errors_that_leads_out_of_the_pool_is_refused(pool, tmp_path):
    path = reference_errors_path(pool.folder, "f" * 64)
    path.parent.mkdir()
    path.symlink_to(tmp_path / "away" / "thesis.txt")
    with pytest.raises(InputError, match=r"ffff\.bin is a link to .*/away/thesis\.txt, outside of"):
        Pool.open(pool.folder)


def test_links_that_stay_in_the_pool_and_links_to_the_whole_of_it_are_followed(pool, tmp_path):
    (pool.folder / "latents").rename(pool.folder / "kept")
    (pool.folder / "latents").symlink_to("kept")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "pool").symlink_to(pool.folder)
    (tmp_path / "linked").symlink_to(tmp_path / "root")
    for folder in (pool.folder, tmp_path / "root" / "pool", tmp_path / "linked" / "pool"):
        opened = Pool.open(folder)
        assert all(opened.has_latents(shard) for shard in opened.shards(1))


def test_a_shard_that_is_a_link_is_replaced_and_not_written_through(pool, tmp_path):
    (shard,) = pool.shards(1)
    path, away = pool.folder / "latents" / "00000-00.safetensors", tmp_path / "away" / "file"
    path.unlink()
    away.write_text("thesis")
    path.symlink_to(away)
    Pool.open(pool.folder).write_latents(shard, torch.ones(2, 1, 2, 3, 3), {})
    assert away.read_text() == "thesis" and not path.is_symlink()


def test_locks_and_records_of_checksums_are_not_written_through_links(pool, tmp_path):
    away = tmp_path / "away" / "file"
    lock = pool.folder / ".locks" / "prompts"
    lock.symlink_to(away)
    with pytest.raises(InputError, match="is no ordinary file, as a lock is: remove it"), file_lock(lock):
        pass
    files = VerifiedFiles(pool.folder)
    files.path.parent.mkdir()
    files.path.symlink_to(away)
    files.open(pool.folder / "latents" / "00000-00.safetensors")
    assert not os.path.lexists(away)


def test_no_folder_of_shards_is_listed(pool, monkeypatch):
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path=".": listed.append(str(path)) or scandir(path))
    Pool.open(pool.folder)
    assert not [path for path in listed if path.endswith(("latents", "text", "looks-12345678"))]
    assert [path for path in listed if path.endswith("scores")]
