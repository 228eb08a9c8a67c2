import dataclasses
import errno
import logging
import os
import shutil
import threading
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from capo.backbones import UNetBackbone
from capo.backbones.sampling import SamplerSettings, candidate_noise, sample
from capo.backbones.unconditional import Unconditional
from capo.data.candidates import select_candidates
from capo.data.engines import local, progress
from capo.data.generation import ImageGenerator, PoolSpec, fill_pool, generator_fingerprint, open_pool
from capo.data.pool import PoolReader
from capo.data.prompts import candidate_seed, make_prompt
from capo.data.scoring import ScoreStage
from capo.data.stages import LatentStage, TextStage
from capo.errors import InputError
from capo.pairs import random_pair
from capo.rewards import Reward
from capo.runtime.fingerprints import content_fingerprint
from capo.runtime.launch import Launch
from fixtures.fake_backbone import FakeBackbone
from fixtures.fake_rewards import brightness

TEXTS = ("a red circle", "a blue square", "the green triangle", "a circle left of a square", "red and blue")
PROMPTS = [make_prompt(text) for text in TEXTS]
SETTINGS = SamplerSettings(steps=2, guidance=3.0, batch=3)


def length(images, prompts):
    return torch.tensor([float(len(prompt)) for prompt in prompts])


BRIGHTNESS, LENGTH = Reward("brightness", brightness), Reward("length", length, needs_prompt=True)


@pytest.fixture
def generator():
    return ImageGenerator.base(FakeBackbone(), SETTINGS)


@pytest.fixture
def tiny(tiny_backbone):
    return ImageGenerator.base(tiny_backbone, SETTINGS)


@pytest.fixture
def plan(tmp_path):
    """Three prompts in two rows, 10 candidates in blocks of 8 and 2: shards of 16, 4, 8 and 2 images."""
    return PoolSpec(tmp_path / "pools", "tiny", "train", 5, PROMPTS[:3], candidates=10, prompts_per_shard=2)


@pytest.fixture
def work(monkeypatch):
    """Counts how often each shard was made, by stage."""
    done = Counter()
    for stage in (TextStage, LatentStage, ScoreStage):

        def counted(self, shard, report, run=stage.run):
            run(self, shard, report)
            done[self.name, shard.name] += 1

        monkeypatch.setattr(stage, "run", counted)
    return done


def fill(plan, generator, rewards=(BRIGHTNESS,), **options):
    return fill_pool(plan, generator, rewards, progress=False, **options)


def contents(pool):
    return {
        str(path.relative_to(pool.folder)): path.read_bytes()
        for path in sorted(pool.folder.rglob("*"))
        if path.is_file()
    }


class Bar:
    """What a progress bar of a stage is told."""

    def __init__(self, total, disable, **options):
        self.total, self.disable, self.n = total, disable, 0

    def update(self, count=1):
        self.n += count

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def test_a_filled_pool(plan, generator, work):
    pool = fill(plan, generator, [BRIGHTNESS, LENGTH])
    assert pool.folder == plan.root / f"tiny-{generator.fingerprint[:8]}-5-train"
    assert pool.manifest.generator == generator.fingerprint
    assert {shard.name: shard.images for shard in pool.shards(10)} == {
        "00000-00": 16,
        "00000-01": 4,
        "00001-00": 8,
        "00001-01": 2,
    }
    shards = [(stage, shard.name) for stage in ("latents", "scores") for shard in pool.shards(10)]
    assert work == Counter([("text", "00000-00"), ("text", "00001-00"), *shards])
    scores = pool.scores([LENGTH.key, BRIGHTNESS.key], 10)
    assert scores.shape == (3, 10, 2)
    assert scores[..., 0].tolist() == [[len(text)] * 10 for text in TEXTS[:3]]


def test_candidates_are_the_samplers_from_their_own_seeds(plan, tiny):
    """Candidate 6 of prompt 1 is the 15th image of its shard and shares a batch of three with 13 and 14."""
    pool = fill(plan, tiny, [])
    backbone = tiny.backbone
    noise = candidate_noise([candidate_seed(5, PROMPTS[1].id, c) for c in (4, 5, 6)], backbone.latent_shape)
    text = {name: value[[1, 1, 1]] for name, value in backbone.encode_prompts(list(TEXTS[:2])).items()}
    expected = sample(backbone, backbone.denoiser, text, noise, SETTINGS).half()
    assert torch.equal(PoolReader(pool).latents(1, [4, 5, 6]), expected)


def test_the_text_is_what_the_backbone_encoded(plan, tiny):
    pool = fill(plan, tiny, [])
    expected = tiny.backbone.encode_prompts(list(TEXTS[:2]))
    stored = PoolReader(pool).text(1)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name][1]) for name in expected)
    assert all(stored[name].dtype == expected[name].dtype for name in expected)


def test_rewards_see_the_stored_latents_decoded(plan, tiny):
    pool = fill(plan, tiny)
    shard = pool.shards(10)[1]
    images = tiny.backbone.decode(pool.read_latents(shard).flatten(0, 1), SETTINGS.batch)
    assert torch.equal(pool.scores([BRIGHTNESS.key], 10)[:2, 8:, 0], brightness(images, []).view(2, 2))


def test_batches_in_lanes_give_the_same_pool(plan, tiny, tmp_path):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = fill(plan, tiny)
        torch.set_num_threads(3)
        settings = dataclasses.replace(SETTINGS, parallel="batches")
        shared = fill(
            dataclasses.replace(plan, root=tmp_path / "lanes"), dataclasses.replace(tiny, settings=settings)
        )
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(alone.shards(10), shared.shards(10), strict=True):
        assert torch.equal(alone.read_latents(one), shared.read_latents(other))
    assert torch.equal(alone.scores([BRIGHTNESS.key], 10), shared.scores([BRIGHTNESS.key], 10))


def test_nothing_is_made_twice(plan, generator, work):
    before = contents(fill(plan, generator))
    work.clear()
    assert contents(fill(plan, generator)) == before
    assert not work


def test_a_pool_that_was_cut_off_becomes_the_uninterrupted_one(plan, generator, tmp_path, monkeypatch):
    """Cut off before every shard of every stage: each run makes one shard and is stopped at the next."""
    whole = contents(fill(dataclasses.replace(plan, root=tmp_path / "whole"), generator))
    budget = {"left": 0}
    for stage in (TextStage, LatentStage, ScoreStage):

        def limited(self, shard, report, run=stage.run):
            if budget["left"] == 0:
                raise KeyboardInterrupt
            budget["left"] -= 1
            run(self, shard, report)

        monkeypatch.setattr(stage, "run", limited)
    runs = 0
    while runs < 20:
        budget["left"] = 1
        runs += 1
        try:
            pool = fill(plan, generator)
            break
        except KeyboardInterrupt:
            pass
    assert runs == 2 + 4 + 4  # a row of text, a shard of latents or of scores each; the last run ends
    assert contents(pool) == whole


def test_more_prompts_and_more_candidates(plan, generator, work):
    first = contents(fill(dataclasses.replace(plan, candidates=4), generator))
    work.clear()
    pool = fill(dataclasses.replace(plan, prompts=PROMPTS, candidates=10), generator)
    assert pool.positions(PROMPTS) == [0, 1, 2, 4, 5]
    grown = contents(pool)
    assert all(grown[name] == data for name, data in first.items() if name != "prompts.parquet")
    sampled = sorted(name for stage, name in work if stage == "latents")
    assert sampled == ["00000-01", "00001-01", "00002-00", "00002-01"]
    # the images are those of a pool that was made at once, but for rounding in other batches
    at_once = fill(dataclasses.replace(plan, root=plan.root / "other"), generator)
    readers = PoolReader(pool), PoolReader(at_once)
    ours, theirs = (reader.latents(2, range(10)).float() for reader in readers)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    assert len({tuple(latent.flatten().tolist()) for latent in ours}) == 10


def test_a_reward_is_added_without_sampling(plan, generator, work):
    before = contents(fill(plan, generator, [BRIGHTNESS]))
    work.clear()
    after = contents(fill(plan, generator, [LENGTH, BRIGHTNESS]))
    assert {stage for stage, _ in work} == {"scores"}
    assert {name for name in after if name not in before} == {
        f"scores/{LENGTH.key}/{shard}.parquet" for shard in ("00000-00", "00000-01", "00001-00", "00001-01")
    }
    assert all(after[name] == data for name, data in before.items())


def test_a_reward_sees_only_what_it_has_not_scored(plan, generator):
    seen = []

    def counting(images, prompts):
        seen.append(len(images))
        return torch.zeros(len(images))

    fill(plan, generator, [BRIGHTNESS])
    pool = fill(plan, generator, [BRIGHTNESS, Reward("counting", counting)])
    assert sum(seen) == 30
    (pool.folder / "scores" / BRIGHTNESS.key / "00001-00.parquet").unlink()
    fill(plan, generator, [BRIGHTNESS, Reward("counting", counting)])
    assert sum(seen) == 30


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
@pytest.mark.parametrize(
    "name", ["latents/00000-01.safetensors", "text/00001.safetensors", "scores/{}/00001-00.parquet"]
)
def test_damaged_files_are_named_and_made_again(plan, generator, work, caplog, name, damage):
    pool = fill(plan, generator)
    whole = contents(pool)
    name = name.format(BRIGHTNESS.key)
    data = bytearray(whole[name])
    if damage == "flipped":  # data of the tensor files, the prompt's name in the scores
        data[data.index(PROMPTS[2].id.encode()) if "scores" in name else -1] ^= 4
    path = pool.folder / name
    path.unlink() if damage == "gone" else path.write_bytes(data[:-3] if damage == "truncated" else data)
    work.clear()
    with caplog.at_level(logging.WARNING):
        fill(plan, generator)
    assert contents(pool) == whole
    assert len(work) == 1
    assert (name in caplog.text) == (damage != "gone")


def test_without_verification_only_headers_are_read(plan, generator, work):
    pool = fill(plan, generator)
    path = pool.folder / "latents" / "00000-01.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)
    work.clear()
    fill(plan, generator, verify=False)
    assert not work
    path.write_bytes(data[:-3])
    fill(plan, generator, verify=False)
    assert list(work) == [("latents", "00000-01")]


def test_two_at_a_time_share_the_work(plan, generator, tmp_path, work, monkeypatch):
    """Two fillers in one process: the locks are of the file system and do not know that."""
    monkeypatch.setattr(local, "WAIT", 0.02)
    alone = contents(fill(dataclasses.replace(plan, root=tmp_path / "alone", prompts=PROMPTS), generator))
    work.clear()
    plans = [dataclasses.replace(plan, prompts=PROMPTS, candidates=candidates) for candidates in (10, 10, 8)]
    with ThreadPoolExecutor(len(plans)) as threads:
        list(threads.map(lambda plan: fill(plan, generator), plans))
    assert set(work.values()) == {1}
    pool = open_pool(plans[0], generator)
    assert len(work) == 3 + 2 * len(pool.shards(10))
    shared = contents(pool)
    assert shared == alone


def test_a_stage_that_fails_lets_its_models_go(plan, generator, monkeypatch):
    closed = []

    def failing(self, shard, report):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(LatentStage, "run", failing)
    monkeypatch.setattr(LatentStage, "close", lambda self: closed.append(self))
    with pytest.raises(RuntimeError, match="out of luck"):
        fill(plan, generator)
    assert [stage.name for stage in closed] == ["latents"]


def test_blocks_follow_on_what_another_process_made_meanwhile(plan, generator, monkeypatch):
    """A process that plans 10 candidates finds, once it holds the lock, a first block of 4."""
    run, small = LatentStage.run, dataclasses.replace(plan, candidates=4)
    intruded = []

    def late(self, shard, report):
        if not intruded:
            intruded.append(shard)
            monkeypatch.setattr(LatentStage, "run", run)
            fill_other_rows()
        run(self, shard, report)

    def fill_other_rows():  # the first row is locked by the caller, the second is free
        monkeypatch.setattr(local, "WAIT", 0.0)
        pool = open_pool(small, generator)
        stage = LatentStage(pool, [1], generator.backbone, SETTINGS, True, 4, generator.denoiser)
        local.run_stage(stage, progress=False)

    monkeypatch.setattr(LatentStage, "run", late)
    pool = fill(plan, generator)
    assert [shard.candidates for shard in pool.row_shards(1, 10)] == [range(4), range(4, 10)]
    assert [shard.candidates for shard in pool.row_shards(0, 10)] == [range(8), range(8, 10)]
    assert pool.scores([BRIGHTNESS.key], 10).isfinite().all()


def test_the_first_process_shows_what_all_have_made(plan, generator, monkeypatch):
    """Another process makes every shard of the second row while the first one is at work.

    The bar ends with the images of both, and another process than the first shows none.
    """
    attempt, bars = local._attempt, []
    monkeypatch.setattr(progress, "tqdm", lambda **options: bars.append(Bar(**options)) or bars[-1])

    def helped(stage, shard, made, bar):
        if stage.name == "latents" and shard.row == 1 and shard in stage.missing(1):
            stage.run(shard, lambda count: None)
        return attempt(stage, shard, made, bar)

    monkeypatch.setattr(local, "_attempt", helped)
    fill_pool(plan, generator)
    assert len(bars) == 2 and all(bar.n == bar.total > 0 and not bar.disable for bar in bars)
    monkeypatch.setattr(local, "launch", lambda: Launch(1, 2, 1, 2))
    fill_pool(dataclasses.replace(plan, split="other"), generator)
    assert all(bar.disable for bar in bars[2:]) and len(bars) == 4


def test_a_busy_shard_is_waited_for(plan, generator, work, monkeypatch):
    monkeypatch.setattr(local, "WAIT", 0.02)
    pool = open_pool(plan, generator)
    thread = threading.Thread(target=fill, args=(plan, generator))
    with pool.lock("latents", 0):
        thread.start()
        thread.join(timeout=0.5)
        assert thread.is_alive()
        assert {name for stage, name in work if stage == "latents"} <= {"00001-00", "00001-01"}
    thread.join(timeout=600)
    assert len(pool.scores([BRIGHTNESS.key], 10)) == 3


def test_stages_apart(plan, generator, work):
    with pytest.raises(
        InputError, match=r"4 shards lack their latents, which stage=score needs: run generate.py"
    ):
        fill(plan, generator, stages=["text", "scores"])
    fill(plan, generator, stages=["latents", "text"])
    assert {stage for stage, _ in work} == {"text", "latents"}
    work.clear()
    fill(plan, generator, stages=["scores"])
    assert {stage for stage, _ in work} == {"scores"}
    with pytest.raises(InputError, match="stage score is unknown; choose from text, latents, scores"):
        fill(plan, generator, stages=["score"])


def test_a_policy_has_a_pool_of_its_own(plan, tiny):
    policy = tiny.backbone.trainable_copy()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05)
    plan = dataclasses.replace(plan, prompts=PROMPTS[:1], candidates=2)
    base = fill(plan, tiny)
    other = fill(plan, ImageGenerator(tiny.backbone, policy, "another fingerprint", SETTINGS))
    assert base.folder != other.folder
    assert base.prompts == other.prompts
    assert not torch.equal(PoolReader(base).latents(0, [0]), PoolReader(other).latents(0, [0]))


def test_the_unconditional_network_is_part_of_a_policys_fingerprint_alone(tiny_backbone):
    def fingerprint(unconditional=None, source="policy"):
        settings = dataclasses.replace(SETTINGS, unconditional=source)
        return ImageGenerator(tiny_backbone, tiny_backbone.denoiser, "d", settings, unconditional).fingerprint

    one, other = (Unconditional(tiny_backbone.denoiser, name) for name in ("a", "b"))
    assert len({fingerprint(), fingerprint(one), fingerprint(other)}) == 3
    # of the base and of a policy by itself, pools stay valid: what `generator_fingerprint` always hashed
    known = {"denoiser": "d", "sampler": tiny_backbone.sampler_identity(), "steps": 2, "guidance": 3.0}
    assert fingerprint() == content_fingerprint(known)
    base, words = (
        ImageGenerator.base(tiny_backbone, dataclasses.replace(SETTINGS, unconditional=source))
        for source in ("policy", "base")
    )
    assert base.fingerprint == words.fingerprint and words.unconditional is None


def test_fingerprint_of_what_generates(tiny_backbone, tiny_folder):
    def fingerprint(denoiser="d", backbone=tiny_backbone, **changes):
        return generator_fingerprint(backbone, denoiser, dataclasses.replace(SETTINGS, **changes))

    assert fingerprint(batch=32) == fingerprint()  # the batch moves a latent by rounding only
    other = UNetBackbone(str(tiny_folder), name="tiny", scheduler="EulerDiscreteScheduler")
    assert (
        len(
            {
                fingerprint(),
                fingerprint(steps=3),
                fingerprint(guidance=1.0),
                fingerprint("e"),
                fingerprint(backbone=other),
            }
        )
        == 5
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": 1}, "split 'train': 1 candidates per prompt; fewer than 2 cannot be compared"),
        ({"prompts": []}, "split 'train': its prompt set is empty"),
        ({"prompts_per_shard": 0}, "prompts_per_shard=0 must be at least 1"),
    ],
)
def test_plans_that_cannot_be_filled(plan, changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(plan, **changes)


def test_a_pool_made_otherwise_is_refused(plan, generator):
    fill(plan, generator, stages=["text"])
    with pytest.raises(
        InputError, match="made with other settings: prompts_per_shard is 2, this configuration has 4"
    ):
        fill(dataclasses.replace(plan, prompts_per_shard=4), generator)


def test_a_score_that_is_not_finite_is_named_and_the_rest_stays(plan, generator, work):
    def broken(images, prompts):
        return torch.tensor([float("nan") if prompt == TEXTS[2] else 1.0 for prompt in prompts])

    message = (
        r'^prompt 2 \("the green triangle"\), candidate 0: reward \'broken\' is nan, which cannot be '
        r"compared; check its weights and precision, then run generate\.py again"
    )
    with pytest.raises(InputError, match=message):
        fill(plan, generator, [Reward("broken", broken)])
    assert {name for stage, name in work if stage == "scores"} == {"00000-00", "00000-01"}


def test_a_scorer_that_removes_scores_is_told(plan, generator):
    def wipes(images, prompts):
        for folder in plan.root.glob("*/scores"):
            shutil.rmtree(folder)
        return torch.ones(len(images))

    message = (
        r"^scores 00000-00 in \S+ was written but is missing: .* or something removes them, such as a scorer"
    )
    with pytest.raises(InputError, match=message):
        fill(plan, generator, [Reward("wipes", wipes)])


def test_a_latent_that_is_not_finite_is_named(plan):
    class Overflowing(FakeBackbone):
        def predict(self, denoiser, noisy, t, text):
            return torch.where(text["embeds"][:, :, None, None] > 0.45, 1e30 * noisy, noisy)

    # of the lengths 12, 13 and 18 only the last is above 0.45 * 30
    with pytest.raises(InputError, match=r'prompt 2 \("the green triangle"\), candidate 0: the latent'):
        fill(plan, ImageGenerator.base(Overflowing(), SETTINGS))


def test_too_little_disk_space_is_said_before_any_work(plan, generator, work, monkeypatch):
    usage = namedtuple("usage", "free")
    # 30 latents of 4 float16, 3 texts of 4 float32, 30 scores of 64 bytes: 240 + 48 + 1920
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free=2207))
    with pytest.raises(InputError, match=r"needs 0\.0 MiB more, 0\.0 MiB are free: make room"):
        fill(plan, generator)
    assert not work
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free=2208))
    fill(plan, generator)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free=0))
    fill(plan, generator)  # nothing is missing, so nothing is needed


def test_a_full_disk_ends_the_run_and_loses_nothing(plan, generator, monkeypatch, work):
    sync, synced = os.fsync, []

    def filling_up(handle):
        synced.append(handle)
        if len(synced) > 6:  # manifest, prompts, two of text, two of latents
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", filling_up)
    with pytest.raises(InputError, match=r"00001-00.safetensors cannot be written \(No space left"):
        fill(plan, generator)
    monkeypatch.setattr(os, "fsync", sync)
    work.clear()
    fill(plan, generator)
    assert {name for stage, name in work if stage == "latents"} == {"00001-00", "00001-01"}


def test_a_complete_pool_is_used_without_writing(plan, generator, monkeypatch):
    pool = fill(plan, generator)

    opened = os.open

    def forbidden(*args, **kwargs):
        raise AssertionError("written to")

    def only_read(path, flags, *arguments, **options):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            forbidden()
        return opened(path, flags, *arguments, **options)

    shutil.rmtree(pool.folder / ".locks")
    monkeypatch.setattr(os, "open", only_read)
    monkeypatch.setattr(os, "fsync", forbidden)
    before = {path: path.stat().st_mtime_ns for path in pool.folder.rglob("*")}
    fill(plan, generator)
    assert {path: path.stat().st_mtime_ns for path in pool.folder.rglob("*")} == before


def test_progress_counts_images_within_a_batch(plan, generator):
    """Batches of 3, 2 steps each: 16 images are 32 image-steps, reported as whole images as they come."""
    pool = open_pool(plan, generator)
    text = TextStage(pool, [0], generator.backbone, SETTINGS, True)
    text.run(text.todo()[0], int)
    stage = LatentStage(pool, [0], generator.backbone, SETTINGS, True, 10, generator.denoiser)
    reported = []
    stage.run(stage.todo()[0], reported.append)
    # after the steps of five batches of 3 (1.5 images each, floored in total) and one of 1
    assert reported[:6] == [1, 2, 1, 2, 1, 2]
    assert sum(reported) == 16


def test_prior_noise_is_what_the_sampler_began_with(plan, generator, monkeypatch, tmp_path):
    """A sampler without steps stores its noise, which is then the noise of the training samples."""
    monkeypatch.setattr(
        "capo.backbones.sampling.sample", lambda backbone, network, text, noise, *rest: noise.clone()
    )
    pool = fill(plan, generator)
    options = {"group": 10, "source": "prior"}
    rest = PROMPTS[:3], 10, [BRIGHTNESS], random_pair, "win_rate", 0, False
    dataset = select_candidates(pool, *rest, **options).dataset
    for row in range(3):
        item = dataset[row, 0]
        assert (
            torch.equal(item["noise"].half().float(), item["latents"])
            and item["noise"].dtype == torch.float32
        )
    (pool.folder / "imported.parquet").touch()
    with pytest.raises(InputError, match="source must be drawn, since nobody knows"):
        select_candidates(pool, *rest, **options)
