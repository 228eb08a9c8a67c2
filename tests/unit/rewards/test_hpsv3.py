import hashlib
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

from capo.errors import InputError
from capo.rewards.hpsv3 import FILE, HPSv3, asked, from_published, head
from fixtures.configuration import composed_rewards
from fixtures.patches import cut
from fixtures.tiny_clip import noise_images


def sized(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


IMAGES = [
    *noise_images(3),
    sized(300, 150, 7),
    sized(128, 128, 8),
]  # smaller, larger, and just as the model wants them
PROMPTS = [
    "a red square",
    "the circle of the red square, and somewhat more",
    "a red square",
    "",
    "{x} <|image_pad|> <|Reward|>",
]
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
PATCH, MERGE, WIDTH = 4, 2, 32
PIXELS = 256 * (PATCH * MERGE) ** 2
TAIL = (
    "\n\nEND\n<|im_end|>\n<|im_start|>assistant\n"  # of the published conversation, behind the reward's token
)


def build_base(folder):
    """A Qwen2-VL of random weights: its config, tokenizer and image processor in a folder, and the model."""
    from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tokenizer = Qwen2Tokenizer(
        vocab={word: number for number, word in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.add_tokens(
        sorted(set(re.findall("[A-Za-z]{4,}", asked(""))))
    )  # most words whole: a fifth of the tokens
    number = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer) + 9,
        "rope_parameters": rope,
    }
    vision = {
        "depth": 2,
        "embed_dim": 16,
        "hidden_size": WIDTH,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        image_token_id=number["<|image_pad|>"],
        video_token_id=number["<|video_pad|>"],
        vision_start_token_id=number["<|vision_start|>"],
        vision_end_token_id=number["<|vision_end|>"],
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "min_pixels": 64,
                "max_pixels": 999999,
                "patch_size": PATCH,
                "temporal_patch_size": 2,
                "merge_size": MERGE,
                "image_mean": [0.5, 0.4, 0.3],
                "image_std": [0.2, 0.3, 0.4],
                "processor_class": "Qwen2VLProcessor",
                "image_processor_type": "Qwen2VLImageProcessor",
            }
        )
    )
    config.text_config.vocab_size = len(tokenizer) + 1
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def published(model):
    """The names of HPSv3.safetensors: those of transformers 4.45, and the head's."""
    generator, found = torch.Generator().manual_seed(1), {}
    for name, value in model.state_dict().items():
        found[name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")] = (
            value.clone()
        )
    for number, width, out in ((0, WIDTH, 1024), (3, 1024, 16), (5, 16, 2)):
        found[f"rm_head.{number}.weight"] = torch.randn(out, width, generator=generator) / width**0.5
        found[f"rm_head.{number}.bias"] = torch.randn(out, generator=generator)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of the base, file of the weights, and the model that has them."""
    folder = tmp_path_factory.mktemp("qwen")
    model = build_base(folder)
    path = tmp_path_factory.mktemp("hpsv3") / FILE
    save_file(published(model), path)
    return str(folder), path, model


@pytest.fixture(scope="module")
def scorer(made):
    return HPSv3(str(made[1]), base=made[0])


def patches_by_hand(image):
    """(patches, 3 x 2 x PATCH x PATCH) and the numbers of rows and columns, as `cut` orders them.

    Sides to multiples of PATCH x MERGE whose product is about PIXELS.
    """
    factor, (width, height) = PATCH * MERGE, image.size
    sides, now = (
        [round(side / factor) * factor for side in (height, width)],
        math.sqrt(PIXELS / (height * width)),
    )
    if sides[0] * sides[1] != PIXELS:
        whole = math.floor if sides[0] * sides[1] > PIXELS else math.ceil
        sides = [whole(side * now / factor) * factor for side in (height, width)]
    rows, columns = (side // PATCH for side in sides)
    pixels = (np.asarray(image.resize(sides[::-1], Image.Resampling.BICUBIC)) / 255 - [0.5, 0.4, 0.3]) / [
        0.2,
        0.3,
        0.4,
    ]
    return cut(pixels, PATCH, MERGE), (rows, columns)


@torch.no_grad()
def by_hand(made, image, prompt, in_rows_and_columns=False):
    """One score.

    The whole published conversation as one string, the image's tokens put in, positions counted through.
    """
    from transformers import AutoTokenizer

    folder, path, model = made
    tokenizer, state = AutoTokenizer.from_pretrained(folder), load_file(path)
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL, "<|Reward|>"]})
    patches, (rows, columns) = patches_by_hand(image)
    text = (asked("PROMPT").replace("PROMPT", prompt) + TAIL).replace(
        "<|image_pad|>", "<|image_pad|>" * (rows * columns // MERGE**2)
    )
    ids = tokenizer([text], return_tensors="pt").input_ids
    is_image, grid = (
        ids == tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        torch.tensor([[1, rows, columns]]),
    )
    seen = model.model.visual(patches, grid_thw=grid).pooler_output
    words = model.model.language_model.embed_tokens(ids).masked_scatter(is_image[..., None], seen)
    places = torch.arange(ids.shape[1]).expand(3, 1, -1)
    if in_rows_and_columns:
        places = model.model.get_rope_index(ids, image_grid_thw=grid, mm_token_type_ids=is_image.long())[0]
    hidden = model.model.language_model(inputs_embeds=words, position_ids=places).last_hidden_state
    x = hidden[ids == tokenizer.convert_tokens_to_ids("<|Reward|>")].double().numpy()
    assert x.shape == (1, WIDTH)
    for number in (0, 3, 5):
        x = (
            x @ state[f"rm_head.{number}.weight"].double().numpy().T
            + state[f"rm_head.{number}.bias"].double().numpy()
        )
        x = x if number == 5 else np.maximum(x, 0)
    return float(x[0, 0])


def test_the_score_is_the_published_mean_one_image_at_a_time(made, scorer):
    cleaned = [prompt.replace("<|image_pad|>", "").replace("<|Reward|>", "") for prompt in PROMPTS]
    scores = scorer(IMAGES, PROMPTS)
    assert scores.dtype == torch.float32 and scores.std() > 0.05
    assert (scores[0] - scores[2]).abs() > 0.01  # the same prompt of another image
    expected = [by_hand(made, image, prompt) for image, prompt in zip(IMAGES, cleaned, strict=True)]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-3, atol=1e-3)


def test_positions_are_counted_through_where_qwen_would_give_an_image_rows_and_columns(made, scorer):
    score = scorer(IMAGES[3:4], PROMPTS[:1]).item()
    assert abs(score - by_hand(made, IMAGES[3], PROMPTS[0])) < 1e-3
    assert abs(score - by_hand(made, IMAGES[3], PROMPTS[0], in_rows_and_columns=True)) > 1e-2


def test_the_words_are_the_published_ones():
    """The hash is of INSTRUCTION + prompt_with_special_token in hpsv3 1.0.0, 2590 characters."""
    user = (asked("{text_prompt}") + "\n\nEND\n").split("<|vision_end|>")[1]
    assert len(user) == 2590
    assert (
        hashlib.sha256(user.encode()).hexdigest()
        == "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"
    )
    assert asked("a {prompt} <|image_pad|><|Reward|>b").count("<|image_pad|>") == 1
    assert "Textual prompt - a {prompt} b\n" in asked("a {prompt} <|image_pad|><|Reward|>b")


def test_images_are_patches_of_their_own_shape_and_about_256_tokens(scorer):
    found, last = scorer.asker.inputs(IMAGES, PROMPTS)
    expected, sizes = zip(*map(patches_by_hand, IMAGES), strict=True)
    assert found["image_grid_thw"].tolist() == [[1, *size] for size in sizes] and len(set(sizes)) > 3
    torch.testing.assert_close(found["pixel_values"], torch.cat(expected), rtol=1e-5, atol=2e-5)
    assert (32, 32) in sizes and (
        22,
        44,
    ) in sizes  # 128 x 128 as it is; 300 x 150 by 0.6034: 181.02 x 90.5, to 176 x 88
    images = (found["input_ids"] == scorer.asker.image).sum(-1).tolist()
    assert images == [rows * columns // 4 for rows, columns in sizes]
    ends = found["input_ids"][torch.arange(5), last]
    assert (ends == scorer.asker.reward).all() and len(set(last.tolist())) > 3


@pytest.mark.parametrize("batch", [1, 2])
def test_a_score_changes_neither_with_its_neighbors_nor_with_their_order(made, scorer, batch):
    apart, order = HPSv3(str(made[1]), base=made[0], batch=batch), [3, 0, 4, 2, 1]
    alone = torch.cat([apart([image], [prompt]) for image, prompt in zip(IMAGES, PROMPTS, strict=True)])
    torch.testing.assert_close(scorer(IMAGES, PROMPTS), alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        apart([IMAGES[i] for i in order], [PROMPTS[i] for i in order]), alone[order], rtol=1e-4, atol=1e-4
    )


def test_nothing_to_score_a_callers_precision_and_bfloat16(made, scorer):
    assert scorer([], []).shape == (0,)
    plain = scorer(IMAGES[:2], PROMPTS[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scorer(IMAGES[:2], PROMPTS[:2]), plain)
    low = HPSv3(str(made[1]), base=made[0], precision="bfloat16")
    assert {value.dtype for value in low.module["model"].parameters()} == {torch.bfloat16}
    assert {value.dtype for value in low.module["head"].parameters()} == {torch.float32}
    scores = low(IMAGES[:2], PROMPTS[:2])
    assert scores.dtype == torch.float32 and 0 < (scores - plain).abs().max() < 1


def test_names_of_the_published_architecture_fit_exactly():
    """The real sizes, without memory: 736 tensors, of which the table of what comes next is not read.

    2 bytes for 8,288,465,408 numbers of Qwen2-VL-7B with 151,658 words and 4 for 3,687,474 of the head: 16.59
    GB.
    """
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 151658,
    }
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(text_config=text, vision_config={"depth": 32}, tie_word_embeddings=False)
        )
        top = {f"head.{name}": value for name, value in head(3584).state_dict().items()}
        state = {
            name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value
            for name, value in model.state_dict().items()
        }
    state |= {f"rm_{name}": value for name, value in top.items()}
    assert len(state) == 736 and {
        "visual.merger.mlp.2.bias",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    } < set(state)
    expected = {f"model.{name}": value.shape for name, value in model.model.state_dict().items()}
    expected |= {name: value.shape for name, value in top.items()}
    assert {name: value.shape for name, value in from_published(state).items()} == expected
    sizes = [
        sum(value.numel() for name, value in state.items() if name.startswith("rm_") == is_head)
        for is_head in (False, True)
    ]
    assert sizes == [8_288_465_408, 3_687_474] and sum(map(math.prod, expected.values())) == 7_748_610_610


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("visual.merger.ln_q.weight"),
            r"rewards\.hpsv3\.weights=.*another model's weights: it lacks visual\.merger\.ln_q\.weight; "
            r".*MizzenAI/HPSv3 \(HPSv3\.safetensors\)",
        ),
        (lambda state: state.pop("rm_head.5.bias"), r"it lacks head\.5\.bias;"),
        (lambda state: state.update({"rm_head.7.bias": torch.zeros(1)}), r"it has unknown head\.7\.bias;"),
        (
            lambda state: state.update({"model.layers.0.extra": torch.zeros(1)}),
            r"it has unknown language_model\.layers\.0\.extra;",
        ),
        (lambda state: state.update({"score": torch.zeros(1)}), "it has unknown score;"),
        (
            lambda state: state.update({"rm_head.0.weight": torch.zeros(3, 3)}),
            "weights do not load .*size mismatch",
        ),
        (
            lambda state: state.update({"model.embed_tokens.weight": torch.zeros(9, WIDTH)}),
            "weights do not load",
        ),
    ],
)
def test_another_models_weights(made, tmp_path, change, message):
    state = load_file(made[1])
    change(state)
    save_file(state, tmp_path / FILE)
    with pytest.raises(InputError, match=f"(?s){message}"):
        HPSv3(str(tmp_path), base=made[0])


def test_a_base_of_another_kind(made, tmp_path):
    copied = shutil.copytree(made[0], tmp_path / "base")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_5_vl"}))
    with pytest.raises(
        InputError, match=r"hpsv3\.scorer\.base=.*a model of type qwen2_5_vl, this reward reads a Qwen2-VL"
    ):
        HPSv3(str(made[1]), base=str(copied))
    (copied / "config.json").unlink()
    with pytest.raises(InputError, match=r"its config\.json is missing"):
        HPSv3(str(made[1]), base=str(copied))
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="no tokenizer and image processor"):
        HPSv3(str(made[1]), base=str(copied))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({}, r"rewards\.hpsv3\.weights=someone/nothing \(revision main\) is not here\n"),
        (
            {"precision": "half"},
            r"rewards\.hpsv3\.scorer\.precision=half: unknown; choose one of float32, bfloat16",
        ),
        ({"batch": 0}, r"rewards\.hpsv3\.scorer\.batch=0"),
    ],
)
def test_what_is_refused_before_loading(setting, message):
    with pytest.raises(InputError, match=message):
        HPSv3("someone/nothing", **setting)


def test_a_base_that_is_nowhere(made):
    with pytest.raises(
        InputError, match=r"rewards\.hpsv3\.scorer\.base=someone/base \(revision abc\) is not here"
    ):
        HPSv3(str(made[1]), base="someone/base", base_revision="abc")


def test_the_yaml_reaches_the_scorer(made, scorer):
    (reward,) = composed_rewards(
        "rewards=hpsv3", f"rewards.hpsv3.weights={made[1].parent}", f"rewards.hpsv3.scorer.base={made[0]}"
    )
    assert reward.needs_prompt and reward.scorer["precision"] == "float32"
    reward.setup("cpu")
    assert torch.equal(reward.score(IMAGES[:2], PROMPTS[:2]), scorer(IMAGES[:2], PROMPTS[:2]))
