"""Batches that fit: halved where memory runs out, remembered, the same results."""

import logging

import pytest
import torch
from PIL import Image

from capo.backbones.sampling import SamplerSettings
from capo.data.generation import ImageGenerator, PoolSpec, fill_pool
from capo.data.prompts import Prompt
from capo.errors import InputError
from capo.rewards import Reward
from capo.rewards.isolated import WorkerOutOfMemory
from capo.runtime.batching import FittingBatch
from capo.training.validation import ValidationSet, WinRateValidation
from fixtures.fake_backbone import FakeBackbone


class Hungry:
    """Mean gray value, of at most `room` images at once.

    `asked` keeps the size of every batch that it was given.
    """

    def __init__(self, room: int, error=torch.OutOfMemoryError):
        self.room, self.error, self.asked = room, error, []

    def __call__(self, images, prompts):
        assert len(images) == len(prompts)
        self.asked.append(len(images))
        if len(images) > self.room:
            raise self.error("CUDA out of memory. Tried to allocate 2.00 GiB")
        return torch.tensor([float(image.getpixel((0, 0))[0]) for image in images])


def grays(count):
    return [Image.new("RGB", (2, 2), (10 * index,) * 3) for index in range(count)]


def of_the_machine(message):
    """What torch raises where the memory of the machine runs out: no process has addresses for 2^48 bytes."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**48, dtype=torch.uint8)
    return raised.value


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, WorkerOutOfMemory, MemoryError, of_the_machine])
def test_every_image_is_scored_and_the_large_batch_is_never_tried_again(error, caplog):
    scorer = Hungry(3, error)
    reward = Reward("hungry", scorer)
    with caplog.at_level(logging.WARNING):
        first = reward.score(grays(10), [""] * 10)
    # 10 and its half 5 are refused, 2 fit: ten images are five batches of two
    assert scorer.asked == [10, 5, 2, 2, 2, 2, 2]
    assert first.tolist() == [10.0 * index for index in range(10)]
    scorer.asked.clear()
    assert reward.score(grays(5), [""] * 5).tolist() == [0, 10, 20, 30, 40]
    assert scorer.asked == [2, 2, 1]
    assert [record.message.split(":")[0] for record in caplog.records] == ["reward 'hungry'"]
    assert "5 images at once do not fit" in caplog.text and "it gets 2" in caplog.text
    machine = error in (MemoryError, of_the_machine)
    assert ("fit into this machine's memory" in caplog.text) == machine


def test_without_need_the_batch_stays_whole():
    scorer = Hungry(8)
    Reward("hungry", scorer).score(grays(8), [""] * 8)
    assert scorer.asked == [8]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, WorkerOutOfMemory])
def test_one_image_that_does_not_fit_is_the_users_to_know(error):
    scorer = Hungry(0, error)
    with pytest.raises(
        InputError,
        match=r"reward 'hungry': a single image does not fit into .*memory.*stage=score.*Tried to allocate",
    ):
        Reward("hungry", scorer).score(grays(5), [""] * 5)
    assert scorer.asked == [5, 2, 1]


class Heavy:
    """Half of it fits onto the device, which is another name of the only one there is.

    Says where it was taken.
    """

    def __init__(self, precision="float32"):
        self.where = []

    def to(self, device):
        self.where.append(str(device))
        if device != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def __call__(self, images, prompts):
        raise AssertionError("it was never moved")


def test_weights_that_do_not_fit_leave_the_device_and_say_what_helps():
    heavy = Heavy()
    with pytest.raises(
        InputError,
        match=r"reward 'heavy': its weights \(4\.0 GB\) do not fit into the device's memory: score apart .*"
        r"stage=score\) or on a device with more memory.*Tried to allocate",
    ) as refused:
        Reward("heavy", heavy, memory=4e9).setup("cpu:0")
    assert heavy.where == ["cpu:0", "cpu"] and refused.value.__context__ is None


@pytest.mark.parametrize(
    ("precision", "size", "helps"), [("float32", "4.0 GB", True), ("bfloat16", "2.0 GB", False)]
)
def test_half_precision_is_advised_where_the_scorer_has_it_and_it_is_not_used(precision, size, helps):
    with pytest.raises(InputError) as refused:
        Reward("heavy", {"_target_": f"{__name__}.Heavy", "precision": precision}, memory=4e9).setup("cpu:0")
    assert size in str(refused.value)
    assert ("set rewards.heavy.scorer.precision=bfloat16" in str(refused.value)) == helps


def test_other_errors_are_not_tried_again():
    scorer = Hungry(0, ZeroDivisionError)
    with pytest.raises(InputError, match="failed: ZeroDivisionError"):
        Reward("hungry", scorer).score(grays(5), [""] * 5)
    assert scorer.asked == [5]


def test_no_images_are_one_empty_batch_and_most_is_kept():
    assert FittingBatch("x", "y")(lambda part: (part.start, part.stop), 0) == [(0, 0)]
    assert FittingBatch("x", "y")(lambda part: (part.start, part.stop), 5, most=2) == [(0, 2), (2, 4), (4, 5)]


def test_a_pool_is_scored_alike_however_little_fits(tmp_path):
    backbone, prompts = FakeBackbone(), [Prompt("1", "a ring"), Prompt("2", "a red ring")]
    generator = ImageGenerator.base(backbone, SamplerSettings(steps=2, guidance=1.0, batch=8))
    scores = {}
    for room in (8, 3):
        scorer = Hungry(room)
        reward = Reward("hungry", scorer)
        pool = fill_pool(
            PoolSpec(tmp_path / str(room), "fake", "train", 0, prompts, 8),
            generator,
            [reward],
            progress=False,
        )
        scores[room] = pool.scores([reward.key], 8, pool.positions(prompts))
        assert scorer.asked == ([8, 8] if room == 8 else [8, 4] + [2] * 8)
    assert torch.equal(scores[8], scores[3])
    assert scores[8].unique().numel() > 8


def test_the_vae_decodes_what_fits(tiny_backbone, monkeypatch):
    latents = torch.randn(5, *tiny_backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    whole = tiny_backbone.decode(latents, 4)
    decode, asked = tiny_backbone.vae.decode, []

    def small(raw, **options):
        asked.append(len(raw))
        if len(raw) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return decode(raw, **options)

    monkeypatch.setattr(tiny_backbone.vae, "decode", small)
    monkeypatch.setitem(tiny_backbone.__dict__, "_decoding", FittingBatch("the VAE", "none"))
    images = tiny_backbone.decode(latents, 4)
    assert asked == [4, 2, 1, 1, 1, 1, 1]
    for image, other in zip(images, whole, strict=True):  # rounding to 8 bits may tip by one
        assert max(abs(a - b) for a, b in zip(image.tobytes(), other.tobytes(), strict=True)) <= 1


DEVICE = "cpu:0"  # another name of the only one there is


class Traveller:
    """Says where it was taken, and scores on the device alone."""

    def __init__(self):
        self.where = []

    def to(self, device):
        self.where.append(str(device))

    def __call__(self, images, prompts):
        assert self.where[-1] == DEVICE
        return torch.arange(float(len(images)))


class Elsewhere(FakeBackbone):
    device = torch.device(DEVICE)


def test_a_reward_is_on_the_device_while_it_scores_and_leaves_the_memory_to_training(tmp_path):
    backbone, prompts, traveller = (
        Elsewhere(),
        [Prompt("1", "a ring"), Prompt("2", "a red ring")],
        Traveller(),
    )
    reward, settings = Reward("traveller", traveller), SamplerSettings(steps=2, guidance=1.0, batch=4)
    pool = fill_pool(
        PoolSpec(tmp_path, "fake", "train", 0, prompts, 2),
        ImageGenerator.base(backbone, settings),
        [reward],
        progress=False,
    )
    assert traveller.where == [DEVICE, "cpu"]
    base = ValidationSet(
        prompts,
        backbone.encode_prompts(["a ring", "a red ring"]),
        [[1], [2]],
        {"traveller": torch.zeros(2, 1)},
        [],
    )
    validation = WinRateValidation(base, backbone, [reward], settings, 1, tmp_path)
    figures, _, _ = validation._figures([Image.new("RGB", (2, 2))] * 2, [0, 1], "step 1", backbone.device)
    assert traveller.where == [DEVICE, "cpu"] * 2
    assert (
        figures["val/win_rate/traveller"] == 0.75 and pool.folder.is_dir()
    )  # scores 0 and 1 against 0: a tie and a win
