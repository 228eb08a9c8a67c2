import os
from dataclasses import replace

import pytest

from capo.backbones.sampling import SamplerSettings
from capo.data.engines import LocalEngine
from capo.data.generation import ImageGenerator, PoolSpec, fill_pool, open_pool, stages_of, view_pool
from capo.data.pool import Shard
from capo.data.pool_state import faults_of, repair, states_of, told_age
from capo.data.prompts import make_prompt
from capo.errors import InputError
from capo.rewards import Reward
from fixtures.fake_backbone import FakeBackbone
from fixtures.fake_rewards import brightness

SETTINGS = SamplerSettings(steps=2, guidance=3.0, batch=4)


REWARD = Reward("brightness", brightness)


@pytest.fixture
def generator():
    return ImageGenerator.base(FakeBackbone(), SETTINGS)


@pytest.fixture
def spec(tmp_path):
    """Six prompts in three rows, 4 candidates."""
    prompts = [make_prompt(f"prompt {number}") for number in range(6)]
    return PoolSpec(tmp_path / "pools", "tiny", "train", 5, prompts, candidates=4, prompts_per_shard=2)


def stages(spec, generator, verify=False):
    pool = open_pool(spec, generator)
    return pool, stages_of(pool, spec, generator, [REWARD], verify)


def contents(pool):
    return {path: path.read_bytes() for path in pool.folder.rglob("*.*") if path.is_file()}


def test_what_is_done_is_counted_by_stage(spec, generator):
    fill_pool(spec, generator, stages=("text", "latents"), progress=False)
    pool, work = stages(spec, generator)
    (pool.folder / "latents" / "00001-00.safetensors").unlink()
    text, latents, scores = states_of(pool, work)
    assert (text.unit, text.done, text.total, text.files, text.seconds_left) == ("prompt", 6, 6, 3, 0)
    assert (latents.unit, latents.done, latents.total, latents.files) == ("image", 16, 24, 2)
    assert latents.size == sum(path.stat().st_size for path in (pool.folder / "latents").glob("*.safe*"))
    assert (scores.done, scores.total, scores.files, scores.rate, scores.newest) == (0, 24, 0, None, None)
    assert scores.seconds_left is None


def test_looking_at_a_pool_writes_nothing_and_counts_the_prompts_that_it_lacks(spec, generator):
    assert view_pool(spec, generator) is None and not spec.root.exists()
    fill_pool(replace(spec, prompts=spec.prompts[:4]), generator, stages=("text", "latents"), progress=False)
    before = {path: path.is_file() and path.read_bytes() for path in spec.root.rglob("*")}
    pool = view_pool(spec, generator)
    there = pool.present(spec.prompts)
    assert there == list(spec.prompts[:4])
    work = stages_of(pool, spec, generator, [REWARD], False, prompts=there)
    found = states_of(pool, work, absent=Shard(0, 0, range(2), range(4)))
    assert [(state.done, state.total) for state in found] == [(4, 6), (16, 24), (0, 24)]
    assert before == {path: path.is_file() and path.read_bytes() for path in spec.root.rglob("*")}
    with pytest.raises(InputError, match="was made with other settings: prompts_per_shard is 2"):
        view_pool(replace(spec, prompts_per_shard=3), generator)


@pytest.mark.parametrize("use", [view_pool, lambda *given: fill_pool(*given, progress=False)])
def test_what_is_no_pool_is_named(spec, generator, use):
    folder = spec.folder(generator.fingerprint)
    spec.root.write_text("a file")
    with pytest.raises(InputError, match=r"pools is no folder, but pools should stand there: move it away"):
        use(spec, generator)
    spec.root.unlink()
    spec.root.mkdir()
    folder.symlink_to(folder)
    with pytest.raises(InputError, match=f"{folder.name} is no folder, but a pool should stand there"):
        use(spec, generator)


@pytest.mark.parametrize("use", [view_pool, lambda *given: fill_pool(*given, progress=False)])
def test_a_root_that_is_a_pool_is_told_with_its_folder(spec, generator, use):
    pool = fill_pool(spec, generator, stages=("text",), progress=False)
    with pytest.raises(InputError, match=rf"is a pool itself: give .* pool.root={spec.root}$"):
        use(replace(spec, root=pool.folder), generator)


@pytest.mark.parametrize("name", ["text", "latents", "scores"])
def test_a_file_in_place_of_a_folder_of_a_pool_is_told_at_once(spec, generator, name):
    pool = open_pool(spec, generator)
    (pool.folder / name).write_text("mine")
    with pytest.raises(InputError, match=f"{name} is no folder, but files of a pool should stand there"):
        view_pool(spec, generator)


def test_a_pool_whose_prompts_are_gone_or_of_another_split_is_refused(spec, generator):
    pool = fill_pool(spec, generator, stages=("text",), progress=False)
    table = pool.folder / "prompts.parquet"
    other = open_pool(replace(spec, split="test"), generator).folder / "prompts.parquet"
    before = contents(pool)
    table.write_bytes(other.read_bytes())
    for use in (view_pool, open_pool):
        with pytest.raises(InputError, match="it holds prompts of split test, not of train"):
            use(spec, generator)
    table.unlink()
    for use in (view_pool, open_pool):
        with pytest.raises(InputError, match=r"it is not there, but files of its prompts are, such as 0000"):
            use(replace(spec, prompts=[make_prompt("another")]), generator)
    assert contents(pool) == {path: data for path, data in before.items() if path != table}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_in_place_of_a_shard_is_told_before_anything_is_made(spec, generator, make):
    pool = fill_pool(spec, generator, progress=False)
    shards = [pool.folder / "latents" / f"0000{row}-00.safetensors" for row in (0, 1)]
    for shard in shards:
        shard.unlink()
    shards[0].write_bytes(b"damaged")
    make(shards[1])
    told = r"00001-00.safetensors is no ordinary file, which alone is replaced: move it away$"
    with pytest.raises(InputError, match=told):
        fill_pool(spec, generator, progress=False)
    pool, work = stages(spec, generator)
    faults = faults_of(pool, work, progress=False)
    assert {fault.file for fault in faults} == set(shards)
    with pytest.raises(InputError, match=told):
        repair(pool, work, faults, LocalEngine())
    assert shards[0].read_bytes() == b"damaged" and shards[1].exists()


def test_a_pool_without_its_manifest_is_not_taken_for_none(spec, generator):
    pool = fill_pool(spec, generator, stages=("text",), progress=False)
    (pool.folder / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"is not a pool \(no manifest.json\); generate.py makes one"):
        view_pool(spec, generator)
    for path in pool.folder.iterdir():
        if not path.name.startswith("."):
            path.rename(spec.root / path.name)
    assert view_pool(spec, generator) is None  # locks alone are left of it


def test_the_rate_is_that_of_the_last_ten_minutes_of_work(spec, generator):
    spec = replace(spec, prompts=[make_prompt(f"prompt {number}") for number in range(10)])
    fill_pool(spec, generator, stages=("text", "latents"), progress=False)
    pool, work = stages(spec, generator)
    files = sorted((pool.folder / "latents").glob("*.safetensors"))
    for file, moment in zip(files, (0, 5000, 5100, 5200, 5300), strict=True):
        os.utime(file, (moment, moment))
    files[0].unlink()
    state = states_of(pool, work)[1]
    assert state.newest == 5300 and state.rate == pytest.approx(3 * 8 / 300)
    assert state.seconds_left == pytest.approx(8 / (3 * 8 / 300))


def test_each_bad_file_is_named_once_and_made_again(spec, generator):
    pool = fill_pool(spec, generator, [REWARD], progress=False)
    before = contents(pool)
    latents = pool.folder / "latents" / "00001-00.safetensors"
    damaged = bytearray(latents.read_bytes())
    damaged[-1] ^= 1
    latents.write_bytes(damaged)
    scores = pool.folder / "scores" / REWARD.key / "00002-00.parquet"
    scores.write_bytes(b"no table")
    (pool.folder / "text" / "00000.safetensors").unlink()  # missing, which is no fault
    pool, work = stages(spec, generator)
    faults = faults_of(pool, work, progress=False)
    assert [(fault.stage, fault.row, fault.file) for fault in faults] == [
        ("latents", 1, latents),
        ("scores", 2, scores),
    ]
    assert "checksum" in faults[0].reason and "parquet" in faults[1].reason
    pool, work = stages(spec, generator)
    repair(pool, work, faults, LocalEngine())
    del before[pool.folder / "text" / "00000.safetensors"]  # its row had no fault
    assert contents(pool) == before


def test_latents_that_are_not_finite_are_a_fault(spec, generator, monkeypatch):
    pool = fill_pool(spec, generator, [REWARD], progress=False)
    pool, work = stages(spec, generator)
    read = pool.read_latents
    spoiled = lambda shard: read(shard) * (float("nan") if shard.row == 2 else 1)  # noqa: E731
    monkeypatch.setattr(pool, "read_latents", spoiled)
    (fault,) = faults_of(pool, work, progress=False)
    assert (fault.row, fault.file.name, fault.reason) == (
        2,
        "00002-00.safetensors",
        "its latents are not finite",
    )


@pytest.mark.parametrize(("seconds", "said"), [(3, "3 s"), (150, "2 min"), (7300, "2 h"), (200_000, "2 d")])
def test_ages_are_told_in_words(monkeypatch, seconds, said):
    monkeypatch.setattr("time.time", lambda: 1e9 + seconds)
    assert told_age(1e9) == f"{said} ago"
