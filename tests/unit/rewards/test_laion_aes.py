import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from capo.errors import InputError
from capo.rewards.laion_aes import FILE, LaionAesthetics, linear_stack
from fixtures.configuration import composed_rewards
from fixtures.tiny_clip import WIDTH, build_clip, by_hand, noise_images

IMAGES = noise_images(5)
PROMPTS = ["a red square", "", "a", "b", ""]
# as the published module prints them: (number, in, out)
PUBLISHED = [(0, 768, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("laion") / "clip"
    build_clip(folder, seed=3)
    return str(folder)


@pytest.fixture
def state():
    """A checkpoint under the published names, for an embedding of WIDTH numbers."""
    generator, found = torch.Generator().manual_seed(0), {}
    for number, width, out in PUBLISHED:
        width = WIDTH if number == 0 else width
        found[f"layers.{number}.weight"] = torch.randn(out, width, generator=generator) / width**0.5
        found[f"layers.{number}.bias"] = torch.randn(out, generator=generator)
    return found


@pytest.fixture
def file(state, tmp_path):
    torch.save(state, tmp_path / FILE)
    return tmp_path / FILE


@torch.no_grad()
def by_formula(clip, state, image):
    """One image, in float64: embedding, divided by its length, through five matrices."""
    from transformers import CLIPModel

    seen = (
        CLIPModel.from_pretrained(clip)
        .get_image_features(by_hand(image, round)[None])
        .pooler_output[0]
        .double()
        .numpy()
    )
    x = seen / np.sqrt((seen**2).sum())
    for number in (0, 2, 4, 6, 7):
        x = (
            state[f"layers.{number}.weight"].double().numpy() @ x
            + state[f"layers.{number}.bias"].double().numpy()
        )
    return float(x[0])


def test_the_score_is_the_published_formulas_one_image_at_a_time(file, clip, state):
    scores = LaionAesthetics(str(file), clip=clip)(IMAGES, PROMPTS)
    assert scores.dtype == torch.float32 and scores.shape == (5,) and scores.std() > 0.01
    torch.testing.assert_close(
        scores, torch.tensor([by_formula(clip, state, image) for image in IMAGES]), rtol=1e-5, atol=1e-5
    )


def test_the_score_is_that_of_the_features(file, clip):
    scorer, images = LaionAesthetics(str(file), clip=str(clip)), noise_images(2)
    seen = scorer.features(images)
    with torch.no_grad():
        expected = scorer.module["layers"](seen / seen.norm(dim=1, keepdim=True))[:, 0]
    assert seen.shape[0] == 2 and seen.std() > 0
    torch.testing.assert_close(scorer(images, ["", ""]), expected, rtol=1e-5, atol=1e-5)


def test_the_layers_are_those_of_the_published_checkpoint():
    with torch.device("meta"):
        found = {name: tuple(value.shape) for name, value in linear_stack(768).state_dict().items()}
    assert found == {f"{n}.weight": (out, width) for n, width, out in PUBLISHED} | {
        f"{n}.bias": (out,) for n, _, out in PUBLISHED
    }


def test_an_odd_rest_is_cropped_as_torchvision_does(file, clip):
    """16 x 23 (of 32 x 46) leaves 7 rows: 7 / 2 = 3.5 rounds to 4, where a floor would begin at row 3.

    At 832 x 1216 CLIP's 224 leave 327 - 224 = 103 rows, and 51.5 rounds to 52.
    """
    from transformers import CLIPModel

    scorer = LaionAesthetics(str(file), clip=clip)
    levels = np.random.default_rng(5).integers(0, 256, (46, 32, 3), dtype=np.uint8)
    small = Image.fromarray(levels).resize((16, 23), Image.Resampling.BICUBIC)
    rows = [small.crop((0, top, 16, top + 16)) for top in (3, 4)]
    floor, rounded = scorer(rows, ["", ""]).tolist()
    assert scorer([Image.fromarray(levels)], [""]).item() == pytest.approx(rounded, abs=1e-5)
    assert abs(floor - rounded) > 1e-3
    assert CLIPModel.from_pretrained(clip).config.vision_config.image_size == 16


def test_the_file_is_the_one_whose_digest_is_declared(file, clip):
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert LaionAesthetics(str(file), clip=clip, sha256=digest)(IMAGES[:1], [""]).isfinite().all()
    with pytest.raises(InputError, match=f"its sha256 is {digest}, .* is 21dd; .*sha256=null"):
        LaionAesthetics(str(file), clip=clip, sha256="21dd")


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_a_score_changes_neither_with_its_neighbors_nor_with_their_order_nor_with_prompts(file, clip, batch):
    scorer, order = LaionAesthetics(str(file), clip=clip, batch=batch), [3, 0, 4, 2, 1]
    alone = torch.cat([scorer([image], [""]) for image in IMAGES])
    torch.testing.assert_close(scorer(IMAGES, PROMPTS), alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        scorer([IMAGES[i] for i in order], ["other"] * 5), alone[order], rtol=1e-5, atol=1e-5
    )


def test_a_callers_precision_does_not_move_a_score(file, clip):
    scorer = LaionAesthetics(str(file), clip=clip)
    plain = scorer(IMAGES, PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scorer(IMAGES, PROMPTS), plain)


def test_clips_text_side_is_not_kept(file, clip):
    names = dict(LaionAesthetics(str(file), clip=clip).module.named_parameters())
    assert not [name for name in names if "text" in name or "token" in name] and "layers.7.bias" in names


def test_a_file_a_folder_and_safetensors_hold_the_same(file, clip, state, tmp_path):
    save_file(state, tmp_path / "converted.safetensors")
    scores = [
        LaionAesthetics(str(source), clip=clip)(IMAGES, PROMPTS)
        for source in (file, tmp_path, tmp_path / "converted.safetensors")
    ]
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])


class Head(torch.nn.Module):
    pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("layers.6.bias"),
            r"rewards\.laion_aes\.weights=.*another model's weights: it lacks layers\.6\.bias; .* those of "
            r"sac\+logos\+ava1-l14-linearMSE",
        ),
        (
            lambda state: state.update({"layers.1.weight": torch.zeros(1)}),
            r"it has unknown layers\.1\.weight;",
        ),
        (
            lambda state: state.update({"layers.0.weight": torch.zeros(1024, 768)}),
            r"size mismatch for layers\.0\.weight.*reward reads sac",
        ),
        (lambda state: state.update({"module": Head()}), "a pickled module can run any code when loaded"),
    ],
)
def test_another_models_weights(state, clip, tmp_path, change, message):
    change(state)
    torch.save(state, tmp_path / FILE)
    with pytest.raises(InputError, match=f"(?s){message}"):
        LaionAesthetics(str(tmp_path / FILE), clip=clip)


def test_weights_and_clip_that_are_nowhere(file, clip, tmp_path):
    with pytest.raises(
        InputError, match=r"rewards\.laion_aes\.weights=someone/nothing \(revision main\) is not here"
    ):
        LaionAesthetics("someone/nothing", clip=clip)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"that folder holds no sac\+logos\+ava1-l14-linearMSE\.pth"):
        LaionAesthetics(str(tmp_path / "empty"), clip=clip)
    with pytest.raises(
        InputError, match=r"rewards\.laion_aes\.scorer\.clip=someone/clip \(revision abc\) is not here"
    ):
        LaionAesthetics(str(file), clip="someone/clip", clip_revision="abc")


def test_a_batch_of_nothing(file, clip):
    with pytest.raises(InputError, match=r"rewards\.laion_aes\.scorer\.batch=0"):
        LaionAesthetics(str(file), clip=clip, batch=0)


def test_the_yaml_reaches_the_scorer(file, clip):
    (published,) = composed_rewards("rewards=laion_aes")
    assert published.scorer["sha256"].startswith("21dd590f") and published.license == "Apache-2.0"
    (reward,) = composed_rewards(
        "rewards=laion_aes",
        "rewards.laion_aes.scorer.sha256=null",
        f"rewards.laion_aes.weights={file.parent}",
        f"rewards.laion_aes.scorer.clip={clip}",
    )
    assert not reward.needs_prompt and reward.scorer["weights"] == str(file.parent)
    reward.setup("cpu")
    assert torch.equal(reward.score(IMAGES, PROMPTS), LaionAesthetics(str(file), clip=clip)(IMAGES, PROMPTS))
