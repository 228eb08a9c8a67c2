import errno
import json
import logging
import os
import pickle
import resource

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

from capo.data.pool import DamagedShard, Manifest, Pool, PoolReader, pool_name
from capo.data.pool.files import TensorFile
from capo.data.pool.layout import plan_blocks
from capo.data.pool.reader import most_handles
from capo.data.pool.score_files import read_score_file
from capo.data.prompts import make_prompt
from capo.errors import InputError

SHAPE = (2, 3, 3)  # C, H, W
PROMPTS = [make_prompt(text) for text in ("a circle", "a square", "a star", "a cross", "a ring")]
SETTINGS = {"batch": 4, "threads": 1}


def manifest(**changes):
    return Manifest(
        **{
            "prompts_per_shard": 2,
            "seed": 0,
            "generator": "g" * 64,
            "latent_space": "l",
            "text_encoders": "t",
        }
        | changes
    )


def values(shard):
    """Latents of a shard, each filled with 100 * position + candidate: what is read tells where it was."""
    numbers = 100.0 * torch.tensor(shard.positions)[:, None] + torch.tensor(shard.candidates)
    return numbers[..., None, None, None].expand(-1, -1, *SHAPE)


def write_candidates(pool, candidates):
    for shard in pool.shards(candidates):
        if not pool.has_latents(shard):
            pool.write_latents(shard, values(shard), SETTINGS)


@pytest.fixture
def pool(tmp_path):
    """Three prompts in two rows, 10 candidates in blocks of 8 and 2, with latents."""
    pool = Pool.create(tmp_path / "pool", manifest())
    pool.append_prompts(PROMPTS[:3], "train")
    write_candidates(pool, 10)
    return pool


def reopened(pool):
    return Pool.open(pool.folder)


def flip(path, byte, bit=0):
    with path.open("r+b") as file:
        file.seek(byte, os.SEEK_END if byte < 0 else os.SEEK_SET)
        value = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([value ^ 1 << bit]))


# --- layout ---


@pytest.mark.parametrize(
    ("existing", "candidates", "expected"),
    [
        ({}, 16, [(0, 8), (8, 16)]),
        ({}, 4, [(0, 4)]),
        ({0: (0, 4)}, 16, [(0, 4), (4, 12), (12, 16)]),  # what is there keeps its range
        ({0: (0, 8), 1: (8, 16)}, 4, [(0, 8)]),
        ({1: (4, 12)}, 12, [(0, 4), (4, 12)]),  # block 0 is lost and ends where block 1 begins
        ({1: (8, 16)}, 4, [(0, 8)]),  # even if fewer are asked for, or there would be a gap
        ({2: (16, 20)}, 20, [(0, 8), (8, 16), (16, 20)]),
        (
            {2: (8, 16)},
            16,
            [(0, 7), (7, 8), (8, 16)],
        ),  # each of the two that are lost had one candidate at least
        ({0: (0, 4), 1: (5, 9)}, 9, [(0, 4), (4, 9)]),  # block 1 does not follow on block 0: it is made again
    ],
)
def test_plan_blocks(existing, candidates, expected):
    planned = plan_blocks({number: range(*block) for number, block in existing.items()}, candidates)
    assert [(block.start, block.stop) for block in planned] == expected


def test_pool_name():
    assert pool_name("sdxl", "0123456789abcdef", 7, "train") == "sdxl-01234567-7-train"


def test_file_names(pool):
    names = sorted(str(path.relative_to(pool.folder)) for path in pool.folder.rglob("*") if path.is_file())
    shards = ["00000-00", "00000-01", "00001-00", "00001-01"]
    latents = [f"latents/{shard}.safetensors" for shard in shards]
    assert names == [*latents, "manifest.json", "prompts.parquet"]


# --- manifest ---


def test_manifest_is_created_once_and_never_rewritten(pool):
    path = pool.folder / "manifest.json"
    assert json.loads(path.read_text()) == {
        "schema": 1,
        "prompts_per_shard": 2,
        "seed": 0,
        "generator": "g" * 64,
        "latent_space": "l",
        "text_encoders": "t",
    }
    before = path.stat()
    Pool.create(pool.folder, manifest())
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_create_lists_what_differs(pool):
    message = (
        r"made with other settings: seed is 0, this configuration has 3; latent_space is l, "
        r"this configuration has v\. .*another pool\.root"
    )
    with pytest.raises(InputError, match=message):
        Pool.create(pool.folder, manifest(seed=3, latent_space="v"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"is not a pool \(no manifest.json\); generate.py makes one"),
        ('{"schema": 99}', "has schema 99, but this version reads 1"),
        ('{"schema": 1}', "manifest.json cannot be read"),
        ("[]", "manifest.json cannot be read"),
        ("{", "manifest.json cannot be read"),
    ],
)
def test_open_refuses(tmp_path, content, message):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=message):
        Pool.open(tmp_path)


def test_a_root_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(
        InputError, match=r"file is no folder, but pools should stand there: .*another pool\.root"
    ):
        Pool.create(tmp_path / "file" / "pool", manifest())


# --- prompts ---


def test_appended_prompts_begin_a_row_and_move_no_position(pool):
    assert pool.prompts == list(zip(PROMPTS[:3], (0, 1, 2), strict=True))
    # the second row has one prompt and stays so: the next position of a new row is 4
    assert pool.append_prompts([PROMPTS[3], PROMPTS[1], PROMPTS[4], PROMPTS[3]], "more") == [4, 1, 5, 4]
    assert reopened(pool).positions(PROMPTS) == [0, 1, 2, 4, 5]
    assert pool.text_shards() == [0, 1, 2]
    assert pool.text_shards([5, 1]) == [0, 2]
    assert [list(shard.positions) for shard in pool.shards(1)] == [[0, 1], [2], [4, 5]]
    assert pq.read_table(pool.folder / "prompts.parquet").to_pydict() == {
        "prompt_id": [prompt.id for prompt in PROMPTS],
        "prompt": [prompt.text for prompt in PROMPTS],
        "split": ["train"] * 3 + ["more"] * 2,
        "position": [0, 1, 2, 4, 5],
    }


def test_append_sees_what_another_process_has_appended(pool):
    other = reopened(pool)
    pool.append_prompts([PROMPTS[3]], "train")
    assert other.append_prompts([PROMPTS[4], PROMPTS[3]], "train") == [6, 4]
    assert [position for _, position in reopened(pool).prompts] == [0, 1, 2, 4, 6]


def test_nothing_is_written_when_all_prompts_are_there(pool):
    before = (pool.folder / "prompts.parquet").stat()
    pool.append_prompts(PROMPTS[1:3], "train")
    assert (pool.folder / "prompts.parquet").stat().st_ino == before.st_ino


def test_position_of_a_prompt_that_is_not_there(pool):
    with pytest.raises(InputError, match=r'lacks prompt "a ring": generate.py adds it'):
        pool.positions([PROMPTS[0], PROMPTS[4]])


# --- text and latents ---


def test_latents_are_plain_safetensors_with_their_origin_in_the_header(pool):
    shard = pool.shards(10)[1]
    with safe_open(pool.folder / "latents" / "00000-01.safetensors", "pt") as file:
        metadata, latents = file.metadata(), file.get_tensor("latents")
    assert torch.equal(latents, values(shard).half())
    assert latents.shape == (2, 2, *SHAPE)
    assert metadata["fingerprint"] == "g" * 64
    assert metadata["candidates"] == "8-10"
    assert json.loads(metadata["settings"]) == SETTINGS
    assert len(metadata["checksum"]) == 64
    assert torch.equal(pool.read_latents(shard), latents)


def test_equal_content_gives_equal_bytes(pool):
    path = pool.folder / "latents" / "00001-00.safetensors"
    before = path.read_bytes()
    shard = pool.shards(10)[2]
    pool.write_latents(shard, values(shard), SETTINGS)
    assert path.read_bytes() == before


def test_text_keeps_its_dtypes_and_stores_constants_once(pool):
    text = {
        "embeds": torch.randn(2, 4, 5, dtype=torch.bfloat16),
        "pooled": torch.randn(2, 3),
        "time_ids": torch.tensor([[64, 0, 7]]).repeat(2, 1),
    }
    assert not pool.has_text(0)
    pool.write_text(0, text, SETTINGS)
    assert pool.has_text(0, verify=True)
    with safe_open(pool.folder / "text" / "00000.safetensors", "pt") as file:
        assert [len(file.get_tensor(name)) for name in ("embeds", "pooled", "time_ids")] == [2, 2, 1]
    reader = PoolReader(pool)
    singly = {name: torch.stack([reader.text(position)[name] for position in (0, 1)]) for name in text}
    for read in (pool.read_text(0), singly):
        assert {name: tensor.dtype for name, tensor in read.items()} == {n: t.dtype for n, t in text.items()}
        assert all(torch.equal(read[name], text[name]) for name in text)


def test_latents_that_are_not_finite_in_float16_are_named(pool):
    shard = pool.shards(10)[3]
    latents = values(shard).clone()
    latents[0, 1, 1, 2, 2] = 70000.0  # the largest float16 is 65504
    with pytest.raises(InputError, match=r'prompt 2 \("a star"\), candidate 9: the latent is not finite'):
        pool.write_latents(shard, latents, SETTINGS)


def test_latents_of_another_model_are_refused(pool):
    pool.check_latent_shape(SHAPE)
    with pytest.raises(InputError, match=r"latents of shape \(2, 3, 3\), but the model works on \(4, 8, 8\)"):
        pool.check_latent_shape((4, 8, 8))


def test_more_candidates_add_blocks_and_touch_no_file(pool):
    before = {path: path.stat().st_mtime_ns for path in pool.folder.rglob("*.safetensors")}
    write_candidates(pool, 19)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [(s.name, s.candidates.start, s.candidates.stop) for s in pool.shards(19)[:3]] == [
        ("00000-00", 0, 8),
        ("00000-01", 8, 10),
        ("00000-02", 10, 18),
    ]
    reader = PoolReader(pool)
    assert [reader.latents(2, [c])[0, 0, 0, 0].item() for c in range(19)] == [200 + c for c in range(19)]


# --- damage ---


def test_every_flipped_bit_of_a_shard_is_found(pool):
    shard = pool.shards(10)[3]  # the smallest: one prompt, two candidates
    path = pool.folder / "latents" / f"{shard.name}.safetensors"
    TensorFile(path, verify=True)
    for byte in range(path.stat().st_size):
        flip(path, byte, bit=byte % 8)
        with pytest.raises(DamagedShard):
            TensorFile(path, verify=True)
        flip(path, byte, bit=byte % 8)
    TensorFile(path, verify=True)
    flip(path, -1)
    assert not pool.has_latents(shard, verify=True)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_shard_is_named_and_does_not_count(pool, size, caplog):
    path = pool.folder / "latents" / "00000-00.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    first, second, *_ = pool.shards(10)
    with caplog.at_level(logging.WARNING):
        assert not reopened(pool).has_latents(first)
    assert "latents/00000-00.safetensors is not valid: it" in caplog.text
    # its block is planned with the range that it had: the one after it, which is whole, begins there
    assert (first.candidates, second.candidates) == (range(8), range(8, 10))
    assert pool.has_latents(second)
    with pytest.raises(
        DamagedShard, match=r"00000-00.safetensors is damaged: .*; run generate.py with the same"
    ):
        pool.read_latents(first)


def test_shards_of_another_model_or_other_prompts_do_not_count(pool, tmp_path, caplog):
    shard = pool.shards(10)[0]
    for name, changes, prompts in (("model", {"generator": "h"}, PROMPTS[:3]), ("prompts", {}, PROMPTS[1:4])):
        other = Pool.create(tmp_path / name, manifest(**changes))
        other.append_prompts(prompts, "train")
        (other.folder / "latents").mkdir()
        for path in (pool.folder / "latents").iterdir():
            (other.folder / "latents" / path.name).write_bytes(path.read_bytes())
        assert not other.has_latents(shard)
    assert "its fingerprint differ from the pool's" in caplog.text
    assert "its prompts differ from the pool's" in caplog.text


def test_nothing_stays_under_the_final_name_when_the_disk_is_full(pool, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pool.append_prompts(PROMPTS[3:], "train")
    shard = pool.shards(2)[-1]
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"00002-00.safetensors cannot be written \(No space left on device"):
        pool.write_latents(shard, values(shard), SETTINGS)
    assert not [path for path in (pool.folder / "latents").iterdir() if "00002" in path.name]


# --- locks ---


def test_a_lock_is_for_one_and_leaves_nothing(pool):
    with pool.lock("latents", 0) as first, reopened(pool).lock("latents", 0) as second:
        assert (first, second) == (True, False)
        with pool.lock("latents", 1) as other_row, pool.lock("text", 0) as other_kind:
            assert other_row and other_kind
    with reopened(pool).lock("latents", 0) as again:
        assert again
    assert list((pool.folder / ".locks").iterdir()) == []


# --- reader ---


def test_reader_finds_each_candidate(pool):
    reader = PoolReader(pool)
    latents = reader.latents(1, [9, 0, 7, 8, 9])
    assert latents.dtype == torch.float16
    assert latents.shape == (5, *SHAPE)
    assert latents[:, 1, 2, 2].tolist() == [109, 100, 107, 108, 109]
    assert reader.latents(2, [3])[0].unique().tolist() == [203]


def test_reader_keeps_a_bounded_number_of_files_open(pool):
    reader = PoolReader(pool, handles=2)
    for _ in range(2):
        for position in range(3):
            for candidate in range(10):
                assert reader.latents(position, [candidate])[0, 0, 0, 0] == 100 * position + candidate
                assert len(reader._open) <= 2


def test_reader_travels_to_another_process(pool):
    reader = PoolReader(pool, handles=3)
    reader.latents(0, [0])
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.handles == 3
    assert copy.latents(2, [9])[0, 0, 0, 0] == 209


def test_reader_verifies_a_file_when_it_is_first_opened(pool):
    path = pool.folder / "latents" / "00000-00.safetensors"
    flip(path, -1)
    assert pool.has_latents(pool.shards(10)[0])  # header and size are right
    reader = PoolReader(pool)
    with pytest.raises(InputError, match=r"00000-00.safetensors is damaged: its checksum is not that of its"):
        reader.latents(0, [3])
    with pytest.raises(FileNotFoundError):
        reader.text(0)


# --- scores ---


def write_scores(pool, key, factor):
    for shard in pool.shards(10):
        pool.write_scores(key, shard, factor * values(shard)[..., 0, 0, 0], SETTINGS)


def test_scores_are_plain_parquet(pool):
    write_scores(pool, "looks-1a2b3c4d", 0.5)
    table = pq.read_table(pool.folder / "scores" / "looks-1a2b3c4d" / "00000-01.parquet").to_pydict()
    assert table == {
        "prompt_id": [PROMPTS[0].id] * 2 + [PROMPTS[1].id] * 2,
        "candidate": [8, 9, 8, 9],
        "score": [4.0, 4.5, 54.0, 54.5],
    }


def test_scores_come_by_position_candidate_and_reward(pool):
    write_scores(pool, "a-0", 0.5)
    write_scores(pool, "b-0", -1.0)
    positions = torch.tensor([2, 0, 1, 0])
    expected = 100.0 * positions[:, None] + torch.arange(9)
    scores = pool.scores(["b-0", "a-0"], 9, positions.tolist())
    assert scores.dtype == torch.float32
    assert torch.equal(scores, torch.stack([-expected, 0.5 * expected], dim=-1))
    everything = 100.0 * torch.arange(3)[:, None] + torch.arange(10)
    assert torch.equal(pool.scores(["a-0"], 10)[..., 0], 0.5 * everything)
    assert pool.scores(["a-0"], 10, []).shape == (0, 10, 1)


def test_scores_that_are_missing_are_named(pool):
    write_scores(pool, "a-0", 1.0)
    (pool.folder / "scores" / "a-0" / "00001-01.parquet").unlink()
    assert pool.scores(["a-0"], 8).shape == (3, 8, 1)
    with pytest.raises(InputError, match="reward 'a-0' has not scored candidates 8-9 of this row's prompts"):
        pool.scores(["a-0"], 10)


def test_latents_that_vanish_while_they_are_scored_are_named(pool):
    shard = pool.shards(1)[0]
    (pool.folder / "latents" / f"{shard.name}.safetensors").unlink()
    with pytest.raises(
        InputError, match=rf"{shard.name}.safetensors is gone, or was changed, while its images"
    ):
        pool.write_scores("a-0", shard, torch.zeros(len(shard.positions), len(shard.candidates)), SETTINGS)


def test_scores_belong_to_the_latents_that_lie_there(pool, caplog):
    write_scores(pool, "a-0", 1.0)
    first, *others = pool.shards(10)
    pool.write_latents(first, values(first) + 1, SETTINGS)
    assert not pool.has_scores("a-0", first)
    assert all(pool.has_scores("a-0", shard) for shard in others)
    assert "its latents differ from the pool's" in caplog.text


def test_damaged_scores_are_found_or_the_same(pool):
    write_scores(pool, "a-0", 1.0)
    path = pool.folder / "scores" / "a-0" / "00001-01.parquet"
    whole, found = path.read_bytes(), 0
    assert read_score_file(path)[1].tolist() == [208, 209]
    for byte in range(0, len(whole), 3):
        flip(path, byte, bit=byte % 8)
        try:
            assert read_score_file(path)[1].tolist() == [208, 209], f"byte {byte}"  # ids: not read
        except DamagedShard:
            found += 1
        flip(path, byte, bit=byte % 8)
    assert found > len(whole) / 3 / 2
    path.write_bytes(whole[:-10])
    assert not pool.has_scores("a-0", pool.shards(10)[3])
    with pytest.raises(DamagedShard, match=r"00001-01.parquet is damaged: it cannot be read as parquet"):
        pool.scores(["a-0"], 10)


def test_scores_are_read_again_only_when_their_file_has_changed(pool, monkeypatch):
    write_scores(pool, "a-0", 1.0)
    first, read = pool.shards(10)[0], []

    def counted(path):
        read.append(path.name)
        return read_score_file(path)

    monkeypatch.setattr("capo.data.pool.store.read_score_file", counted)
    assert all(pool.has_scores("a-0", first) for _ in range(3))
    assert pool.has_scores("a-0", first, verify=True)  # another question: the names of the rows too
    assert read == ["00000-00.parquet"] * 2
    path = pool.folder / "scores" / "a-0" / "00000-00.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    os.utime(path, ns=(0, 0))  # whatever the clock's grain
    assert not pool.has_scores("a-0", first) and not pool.has_scores("a-0", first)
    assert len(read) == 4  # what does not count is looked at again


def test_an_empty_file_is_damaged(pool):
    (pool.folder / "latents" / "00000-00.safetensors").write_bytes(b"")
    with pytest.raises(DamagedShard, match=r"00000-00.safetensors is damaged: it is empty"):
        PoolReader(pool).latents(0, [0])
    assert not pool.has_latents(pool.shards(10)[0])


def test_a_reader_leaves_open_files_to_others(monkeypatch):
    for allowed, expected in ((1024, 256), (20_000, 4096), (resource.RLIM_INFINITY, 4096), (3, 1)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, allowed=allowed: (allowed, allowed))
        assert most_handles() == expected
