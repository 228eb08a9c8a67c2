import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from capo.errors import InputError
from capo.rewards.cropping import cropped
from capo.rewards.imagereward import FILE, ImageReward, from_published, network
from fixtures.configuration import composed_rewards
from fixtures.tiny_clip import noise_images

IMAGES = noise_images(5)
PROMPTS = ["a red square", "The blue CIRCLE, of the square zebra", "a red square", "", "red blue " * 30]
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    ",",
    "a",
    "red",
    "blue",
    "square",
    "circle",
    "the",
    "of",
]
SIDE, PATCH = 16, 4
SEEN, READ, HEAD = 192, 128, 64  # widths: three heads that see, two that read
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
MLP = [
    (0, None, 1024),
    (2, 1024, 128),
    (4, 128, 64),
    (6, 64, 16),
    (7, 16, 1),
]  # as the published module prints them


def published_shapes(seen, read, side, patch, words, positions, depths, wide=4):
    """Names and sizes of a checkpoint, after THUDM's ImageReward 1.5 (timm's ViT, BLIP's BERT)."""
    eye, book = "blip.visual_encoder.", "blip.text_encoder."
    found = {
        f"{eye}cls_token": (1, 1, seen),
        f"{eye}pos_embed": (1, 1 + (side // patch) ** 2, seen),
        f"{eye}patch_embed.proj.weight": (seen, 3, patch, patch),
        f"{eye}patch_embed.proj.bias": (seen,),
        f"{book}embeddings.word_embeddings.weight": (words, read),
        f"{book}embeddings.position_embeddings.weight": (positions, read),
        "blip.vision_proj.weight": (256, seen),
        "blip.vision_proj.bias": (256,),
        "blip.text_proj.weight": (256, read),
        "blip.text_proj.bias": (256,),
    }
    norms = [(f"{eye}norm", seen), (f"{book}embeddings.LayerNorm", read)]
    linear = [(f"mlp.layers.{number}", width or read, out) for number, width, out in MLP]
    for layer in range(depths[0]):
        at = f"{eye}blocks.{layer}."
        norms += [(f"{at}norm1", seen), (f"{at}norm2", seen)]
        linear += [(f"{at}attn.qkv", seen, 3 * seen), (f"{at}attn.proj", seen, seen)]
        linear += [(f"{at}mlp.fc1", seen, wide * seen), (f"{at}mlp.fc2", wide * seen, seen)]
    for layer in range(depths[1]):
        at = f"{book}encoder.layer.{layer}."
        for name, source in (("attention", read), ("crossattention", seen)):
            linear += [(f"{at}{name}.self.query", read, read), (f"{at}{name}.output.dense", read, read)]
            linear += [(f"{at}{name}.self.{part}", source, read) for part in ("key", "value")]
            norms.append((f"{at}{name}.output.LayerNorm", read))
        norms.append((f"{at}output.LayerNorm", read))
        linear += [(f"{at}intermediate.dense", read, wide * read), (f"{at}output.dense", wide * read, read)]
    found |= {f"{name}.{part}": (width,) for name, width in norms for part in ("weight", "bias")}
    return (
        found
        | {f"{name}.weight": (out, width) for name, width, out in linear}
        | {f"{name}.bias": (out,) for name, _, out in linear}
    )


@pytest.fixture(scope="module")
def state():
    generator, found = torch.Generator().manual_seed(0), {}
    for name, shape in published_shapes(SEEN, READ, SIDE, PATCH, len(WORDS) + 2, 40, (2, 2), wide=2).items():
        found[name] = torch.randn(shape, generator=generator) * (
            3 / shape[-1] ** 0.5 if len(shape) == 2 and "embed" not in name else 0.5
        )
    found["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return found


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The vocabulary alone, as old folders have it."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    return str(folder)


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("imagereward") / FILE
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def scorer(file, bert):
    return ImageReward(str(file), bert=bert)


def attended(q, k, v):
    """softmax(q k' / 8) v, head by head of 64 columns."""
    parts = []
    for start in range(0, q.shape[-1], HEAD):
        at = slice(start, start + HEAD)
        parts.append((q[:, at] @ k[:, at].T / math.sqrt(HEAD)).softmax(-1) @ v[:, at])
    return torch.cat(parts, -1)


def seen_by_hand(state, image):
    """(1 + patches, SEEN): timm's ViT with norms before, in float64, one image."""
    w = {name.removeprefix("blip.visual_encoder."): value.double() for name, value in state.items()}

    def norm(x, name):
        return F.layer_norm(x, (SEEN,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    pixels = torch.from_numpy(pixels_by_hand(image))
    squares = (
        pixels.unfold(1, PATCH, PATCH)
        .unfold(2, PATCH, PATCH)
        .permute(1, 2, 0, 3, 4)
        .reshape(-1, 3 * PATCH**2)
    )
    x = squares @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"][0], x]) + w["pos_embed"][0]
    for layer in range(2):
        q, k, v = linear(norm(x, f"blocks.{layer}.norm1"), f"blocks.{layer}.attn.qkv").chunk(3, -1)
        x = x + linear(attended(q, k, v), f"blocks.{layer}.attn.proj")
        inner = linear(norm(x, f"blocks.{layer}.norm2"), f"blocks.{layer}.mlp.fc1")
        x = x + linear(inner * (1 + torch.erf(inner / math.sqrt(2))) / 2, f"blocks.{layer}.mlp.fc2")
    return norm(x, "norm")


def pixels_by_hand(image, side=SIDE):
    """(3, side, side): shortest side to `side`, rounded down; the middle, half a pixel to the even side.

    Normalized.
    """
    shortest = min(image.size)
    image = image.resize([int(side * length / shortest) for length in image.size], Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in image.size)
    levels = np.asarray(image)[top : top + side, left : left + side] / 255
    return ((levels - MEAN) / STD).transpose(2, 0, 1)


def ids_by_hand(prompt):
    words = prompt.lower().replace(",", " ,").split()[:33]
    return [WORDS.index(word) if word in WORDS else 1 for word in ["[CLS]", *words, "[SEP]"]]


def by_hand(state, image, prompt):
    """One standardized score, in float64: BLIP's BERT with norms after, nothing padded."""
    w = {name.removeprefix("blip.text_encoder."): value.double() for name, value in state.items()}

    def norm(x, name):
        return F.layer_norm(x, (READ,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    seen, ids = seen_by_hand(state, image), ids_by_hand(prompt)
    x = norm(
        w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)],
        "embeddings.LayerNorm",
    )
    for layer in range(2):
        at = f"encoder.layer.{layer}."
        for name, source in (("attention", None), ("crossattention", seen)):
            q, (k, v) = (
                linear(x, f"{at}{name}.self.query"),
                (
                    linear(x if source is None else source, f"{at}{name}.self.{part}")
                    for part in ("key", "value")
                ),
            )
            x = norm(
                linear(attended(q, k, v), f"{at}{name}.output.dense") + x, f"{at}{name}.output.LayerNorm"
            )
        inner = linear(x, f"{at}intermediate.dense")
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        x = norm(linear(inner, f"{at}output.dense") + x, f"{at}output.LayerNorm")
    score = x[0]
    for number, _, _ in MLP:
        score = linear(score, f"mlp.layers.{number}")
    return (score.item() - 0.16717362830052426) / 1.0333394966054072


def test_the_score_is_the_published_formulas_one_image_at_a_time(state, scorer):
    scores = scorer(IMAGES, PROMPTS)
    expected = torch.tensor(
        [by_hand(state, image, prompt) for image, prompt in zip(IMAGES, PROMPTS, strict=True)]
    )
    assert scores.dtype == torch.float32 and scores.shape == (5,) and scores.std() > 0.1
    assert (scores[0] - scores[2]).abs() > 0.05  # the same prompt of another image
    torch.testing.assert_close(scores, expected.float(), rtol=1e-4, atol=1e-4)


def test_prompts_are_cut_to_35_tokens_begin_with_cls_and_end_with_sep(scorer):
    found = scorer.tokens(PROMPTS)
    assert found["input_ids"].shape == found["attention_mask"].shape == (5, 35)
    for prompt, ids, mask in zip(PROMPTS, found["input_ids"], found["attention_mask"], strict=True):
        assert ids[mask.bool()].tolist() == ids_by_hand(prompt)
    assert found["input_ids"][4, -1] == WORDS.index("[SEP]")  # of the prompt of 60 words
    assert scorer.tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [13, 14]  # behind bert's own


@pytest.mark.parametrize("size", [(40, 21), (21, 40), (19, 16), (16, 19), (16, 16), (5, 9), (17, 30)])
def test_images_are_resized_and_cropped_as_torchvision_does(size):
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    np.testing.assert_allclose(cropped(image, SIDE).numpy(), pixels_by_hand(image), atol=1e-5)


def test_a_margin_of_three_columns_leaves_two_on_the_left():
    """(19 - 16) / 2 = 1.5 is rounded to 2, where rounding down would leave 1.

    Of columns 0..18 the crop begins with column 2.
    """
    image = Image.fromarray(
        np.repeat(np.arange(0, 190, 10, dtype=np.uint8)[None, :, None], 16, axis=0).repeat(3, axis=2)
    )
    first = cropped(image, 16)[0, 0, 0].item() * STD[0] + MEAN[0]
    assert first * 255 == pytest.approx(20, abs=1e-3)


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_a_score_changes_neither_with_its_neighbors_nor_with_their_order(file, bert, batch):
    scorer, order = ImageReward(str(file), bert=bert, batch=batch), [3, 0, 4, 2, 1]
    alone = torch.cat([scorer([image], [prompt]) for image, prompt in zip(IMAGES, PROMPTS, strict=True)])
    torch.testing.assert_close(scorer(IMAGES, PROMPTS), alone, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        scorer([IMAGES[i] for i in order], [PROMPTS[i] for i in order]), alone[order], rtol=1e-5, atol=1e-4
    )


def test_nothing_to_score_and_a_callers_precision(scorer):
    assert scorer([], []).shape == (0,)
    plain = scorer(IMAGES, PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scorer(IMAGES, PROMPTS), plain)


def test_a_folder_safetensors_nested_and_half_precision(file, bert, state, scorer, tmp_path):
    save_file(state, tmp_path / "converted.safetensors")
    torch.save(
        {
            "state_dict": {
                name: value.half() if value.is_floating_point() else value for name, value in state.items()
            }
        },
        tmp_path / "half.pt",
    )
    plain = scorer(IMAGES, PROMPTS)
    for source in (file.parent, tmp_path / "converted.safetensors"):
        assert torch.equal(ImageReward(str(source), bert=bert)(IMAGES, PROMPTS), plain)
    half = ImageReward(str(tmp_path / "half.pt"), bert=bert)
    assert {parameter.dtype for parameter in half.module.parameters()} == {torch.float32}
    torch.testing.assert_close(half(IMAGES, PROMPTS), plain, rtol=0, atol=0.2)


def test_names_and_shapes_of_the_published_architecture_fit_exactly():
    """The real sizes, without memory: ViT-L/16 at 224 and BERT-base with attention to the image, 12 layers.

    446,206,689 numbers are read. With the two projections that are not (459,264) and 512 positions of 8 bytes
    a file holds 4 x 446,665,953 + 4,096 = 1,786,667,908 bytes, and names and headers.
    """
    published = published_shapes(1024, 768, 224, 16, 30524, 512, (24, 12))
    with torch.device("meta"):
        state = from_published({name: torch.empty(shape) for name, shape in published.items()})
        model = network(state)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in state.items()} == expected
    assert (
        sum(map(math.prod, published.values())) == 446_665_953
        and sum(map(math.prod, expected.values())) == 446_206_689
    )
    assert (model["vision"].config.num_attention_heads, model["text"].config.num_attention_heads) == (16, 12)
    assert (model["vision"].config.image_size, model["vision"].config.num_hidden_layers) == (224, 24)
    epsilons = {module.eps for module in model["vision"].modules() if isinstance(module, torch.nn.LayerNorm)}
    assert epsilons == {1e-6} and model["text"].embeddings.LayerNorm.eps == 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("mlp.layers.6.bias"),
            r"rewards\.imagereward\.weights=.*another model's weights: it lacks layers\.6\.bias; "
            r".* those of THUDM/ImageReward",
        ),
        (
            lambda state: state.pop("blip.visual_encoder.patch_embed.proj.weight"),
            r"it lacks vision\.embeddings\.patch_embedding\.weight;",
        ),
        (
            lambda state: state.pop("blip.visual_encoder.blocks.1.attn.qkv.bias"),
            r"it lacks vision\.encoder\.layers\.1\.self_attn\.qkv\.bias;",
        ),
        (
            lambda state: state.update({"blip.itm_head.weight": torch.zeros(1)}),
            r"it has unknown blip\.itm_head\.weight;",
        ),
        (
            lambda state: state.update({"mlp.layers.0.weight": torch.zeros(3, 3)}),
            "weights do not load .*size mismatch",
        ),
        (
            lambda state: state.update(
                {"blip.visual_encoder.patch_embed.proj.weight": torch.zeros(100, 3, 4, 4)}
            ),
            "widths 100 and 128 are not multiples of the head width 64",
        ),
        (
            lambda state: state.update({"module": torch.nn.Linear(1, 1)}),
            "a pickled module can run any code when loaded",
        ),
    ],
)
def test_another_models_weights(state, bert, tmp_path, change, message):
    state = dict(state)
    change(state)
    torch.save(state, tmp_path / FILE)
    with pytest.raises(InputError, match=f"(?s){message}"):
        ImageReward(str(tmp_path / FILE), bert=bert)


def test_a_checkpoint_of_no_layers(bert, tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / FILE)
    with pytest.raises(InputError, match="it lacks vision"):
        ImageReward(str(tmp_path), bert=bert)


def test_weights_and_tokenizer_that_are_nowhere_or_another_models(file, bert, tmp_path):
    with pytest.raises(
        InputError, match=r"rewards\.imagereward\.weights=someone/nothing \(revision main\) is not here"
    ):
        ImageReward("someone/nothing", bert=bert)
    with pytest.raises(
        InputError, match=r"rewards\.imagereward\.scorer\.bert=someone/bert \(revision abc\) is not here"
    ):
        ImageReward(str(file), bert="someone/bert", bert_revision="abc")
    with pytest.raises(InputError, match=r"rewards\.imagereward\.scorer\.batch=0"):
        ImageReward(str(file), bert=bert, batch=0)
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS[:-1]))
    with pytest.raises(
        InputError,
        match=r"its tokenizer has 14 tokens with \[DEC\] and \[ENC\], the model 15; give google-bert",
    ):
        ImageReward(str(file), bert=str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"rewards\.imagereward\.scorer\.bert=.*no BERT tokenizer"):
        ImageReward(str(file), bert=str(tmp_path))


def test_the_yaml_reaches_the_scorer(file, bert, scorer):
    (reward,) = composed_rewards(
        "rewards=imagereward",
        f"rewards.imagereward.weights={file.parent}",
        f"rewards.imagereward.scorer.bert={bert}",
    )
    assert reward.needs_prompt and reward.license == "Apache-2.0"
    reward.setup("cpu")
    assert torch.equal(reward.score(IMAGES, PROMPTS), scorer(IMAGES, PROMPTS))
