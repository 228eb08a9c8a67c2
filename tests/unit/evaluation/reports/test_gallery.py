import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from capo.evaluation.reports.gallery import chosen_prompts, data_uri, gains, image_grid, ranking, wrapped

RED, GREEN, BLUE = (200, 0, 0), (0, 150, 0), (0, 0, 250)


def image(color, size=(8, 8)):
    return Image.new("RGB", size, color)


def test_gain_is_the_win_rate_less_a_half_over_rewards():
    policy = {"a": torch.tensor([[1.0, 2.0], [0.0, 0.0]]), "b": torch.tensor([[5.0, 5.0], [1.0, 0.0]])}
    base = {"a": torch.tensor([[0.0, 1.0], [0.0, 0.0]]), "b": torch.tensor([[5.0, 6.0], [0.0, 0.0]])}
    # prompt 0: a: 1>0, 1=1, 2>0, 2>1 = 3.5/4; b: 5=5, 5<6 twice = 1/4; mean 0.5625.
    # prompt 1: a: all tie = 1/2; b: (2+1)/4 = 3/4
    assert gains(policy, base).tolist() == [0.0625, 0.125]


def test_ranking_breaks_ties_by_the_score_change_then_by_place():
    base = {"a": torch.zeros(4, 2)}
    base["a"][:, 1] = 1.0
    policy = {"a": torch.tensor([[2.0, 2.0], [9.0, 9.0], [0.0, 1.0], [0.0, 1.0]])}
    # prompts 0 and 1 both win every comparison, 1 by more; 2 and 3 are the base itself
    assert ranking(policy, base) == [1, 0, 2, 3]


def test_ranking_weighs_rewards_by_their_spread():
    # both win all comparisons of one reward and lose all of the other: the change in deviations decides
    base = {
        "small": torch.tensor([[0.0, 0.01], [0.0, 0.01]]),
        "large": torch.tensor([[0.0, 100.0], [0.0, 100.0]]),
    }
    policy = {
        "small": base["small"] + torch.tensor([[0.05], [-0.02]]),
        "large": base["large"] + torch.tensor([[-150.0], [150.0]]),
    }
    # deviations of the base are 0.01 / sqrt(3) and 100 / sqrt(3): in units of sqrt(3)
    # prompt 0 changes by +5 and -1.5, prompt 1 by -2 and +1.5
    assert ranking(policy, base) == [0, 1]


def test_chosen_prompts():
    order = [3, 1, 4, 0, 2, 5]
    assert chosen_prompts(order, 2) == {"gain": [3, 1], "loss": [5, 2], "plain": [0, 3]}
    assert chosen_prompts(order, 99)["plain"] == [0, 1, 2, 3, 4, 5]
    assert chosen_prompts(order, 0) == {"gain": [], "loss": [], "plain": []}


def decoded(uri):
    kind, data = uri.removeprefix("data:image/").split(";base64,")
    return kind, Image.open(io.BytesIO(base64.b64decode(data)))


def test_small_images_are_embedded_without_loss_and_large_ones_small():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    kind, small = decoded(data_uri(Image.fromarray(noise)))
    assert kind == "png" and np.array_equal(np.asarray(small), noise)
    kind, large = decoded(data_uri(image(RED, (1024, 512))))
    assert kind == "jpeg" and large.size == (384, 192)
    assert np.abs(np.asarray(large).astype(int) - RED).max() <= 3


def test_grid_has_the_base_above_the_policy_in_each_column(tmp_path):
    path = tmp_path / "validation" / "step000000.png"
    image_grid(
        [image(RED), image(GREEN)], [image(BLUE), image(RED)], ["a red square", "two circles"], path, cell=64
    )
    pixels = np.asarray(Image.open(path))
    # cells of 64 begin at 50 (names of the rows) + 72 per column and 8 + 72 per row
    centers = [
        [tuple(pixels[8 + 72 * row + 32, 50 + 72 * column + 32].tolist()) for column in (0, 1)]
        for row in (0, 1)
    ]
    assert centers == [[RED, GREEN], [BLUE, RED]]
    assert pixels.shape[1] == 50 + 2 * 72
    # 8 pixels fill 64: eight times
    assert pixels[8, 50].tolist() == list(RED) and pixels[71, 113].tolist() == list(RED)
    assert (pixels[2 * 72 :, 50:] < 128).any()  # the prompts stand below
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_grid_of_the_base_alone_breaks_into_equal_bands(tmp_path):
    colors = [RED, GREEN, BLUE]
    image_grid(
        [image(c) for c in colors], None, ["one", "two", "three"], tmp_path / "grid.png", columns=2, cell=32
    )
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    band = 8 + 32 + 8 + 8 + 15  # margin, image, gap, margin, one line of text
    assert pixels.shape[:2] == (2 * band - 2 * 8 + 2 * 8, 50 + 2 * 40)
    assert [
        tuple(pixels[24, 66].tolist()),
        tuple(pixels[24, 106].tolist()),
        tuple(pixels[band + 24, 66].tolist()),
    ] == colors


def test_grid_shrinks_large_images(tmp_path):
    image_grid([image(RED, (512, 256))], None, ["wide"], tmp_path / "grid.png", cell=64)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels[8 + 32, 50 + 32].tolist() == list(RED)
    assert pixels[8 + 8, 50 + 32].tolist() == [255, 255, 255]  # 64 x 32, centered in the cell


@pytest.mark.parametrize(("base", "policy", "prompts"), [(1, 2, 1), (2, 2, 1), (0, 0, 0)])
def test_grid_refuses_numbers_that_do_not_agree(tmp_path, base, policy, prompts):
    with pytest.raises(ValueError, match=f"{prompts} prompts"):
        image_grid([image(RED)] * base, [image(RED)] * policy, ["a"] * prompts, tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()


def test_labels_are_wrapped_to_the_cell():
    font = ImageFont.load_default(12)
    lines = wrapped("a large red circle above a blue square on a white background", font, 100)
    assert " ".join(lines) == "a large red circle above a blue square on a white background"
    assert len(lines) > 2 and all(font.getlength(line) <= 100 for line in lines)
    assert "".join(wrapped("x" * 60, font, 100)) == "x" * 60  # a word that fits no line is cut, not lost
    cut = wrapped("word " * 200, font, 100, lines=3)
    assert len(cut) == 3 and cut[2].endswith("...")
    assert wrapped("", font, 100) == [""]


@pytest.mark.parametrize(
    "text", ["x" * 2_000_000, "x" * 20_000, "word " * 100_000, "a " + "x" * 20_000 + " b"]
)
def test_a_label_takes_no_longer_for_a_longer_text(text):
    font, measured = ImageFont.load_default(12), []

    class Counting:
        def getlength(self, part):
            measured.append(len(part))
            return font.getlength(part)

    lines = wrapped(text, Counting(), 100)
    assert len(lines) == 6 and lines[5].endswith("...") and lines[0].startswith(text[0])
    assert sum(measured) < 400_000  # characters; to measure every rest of 20 000 took 27 million
