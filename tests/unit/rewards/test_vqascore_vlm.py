import json
import math
import shutil
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

from capo.errors import InputError
from capo.rewards.vqascore_vlm import VQAScoreVLM
from fixtures.configuration import composed_rewards
from fixtures.patches import cut
from fixtures.tiny_clip import noise_images

IMAGES = noise_images(5)
PROMPTS = [
    "a red square",
    "the circle of the red square, and somewhat more",
    "a red square",
    "",
    "{x} <|image_pad|>",
]
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
PATCH, MERGE, SMALLEST, LARGEST = 4, 2, 256, 1024  # pixels, patches, pixels in all
TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{% for part in turn.content %}{% if part.type == "
    "'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor "
    "%}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer():
    """Bytes, and of the four ways to say yes all but " yes" as one token."""
    from transformers import Qwen2Tokenizer

    merges = [("e", "s"), ("Y", "es"), ("y", "es"), ("Ġ", "Yes")]
    words = sorted(ByteLevel.alphabet()) + [first + second for first, second in merges]
    tokenizer = Qwen2Tokenizer(vocab={word: number for number, word in enumerate(words)}, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_qwen(folder):
    """A Qwen3-VL of random weights in a folder as the published one lies."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = tiny_tokenizer()
    number = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": len(tokenizer) + 7,
        "rope_parameters": rope,
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": PATCH,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
        "spatial_merge_size": MERGE,
    }
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=text,
            vision_config=vision,
            tie_word_embeddings=True,
            image_token_id=number["<|image_pad|>"],
            video_token_id=number["<|video_pad|>"],
            vision_start_token_id=number["<|vision_start|>"],
            vision_end_token_id=number["<|vision_end|>"],
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "size": {"longest_edge": LARGEST, "shortest_edge": SMALLEST},
                "patch_size": PATCH,
                "temporal_patch_size": 2,
                "merge_size": MERGE,
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
                "processor_class": "Qwen3VLProcessor",
                "image_processor_type": "Qwen2VLImageProcessorFast",
            }
        )
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def scorer(folder):
    return VQAScoreVLM(str(folder))


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def patches_by_hand(image):
    """(patches, 3 x 2 x PATCH x PATCH) and the numbers of rows and columns, as `cut` orders them.

    Sides to multiples of PATCH x MERGE.
    """
    factor, (width, height) = PATCH * MERGE, image.size
    sides = [round(side / factor) * factor for side in (height, width)]
    if sides[0] * sides[1] > LARGEST:
        shrink = math.sqrt(height * width / LARGEST)
        sides = [math.floor(side / shrink / factor) * factor for side in (height, width)]
    rows, columns = (side // PATCH for side in sides)
    pixels = (np.asarray(image.resize(sides[::-1], Image.Resampling.BICUBIC)) / 255 - 0.5) / 0.5
    return cut(pixels, PATCH, MERGE), (rows, columns)


@torch.no_grad()
def by_hand(folder, image, prompt, choice="yes or no", words=("Yes", "yes", "ĠYes")):
    """P(Yes) + P(yes) + P( Yes) of one conversation written out as a string, nothing padded."""
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

    model, tokenizer = (
        Qwen3VLForConditionalGeneration.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    patches, (rows, columns) = patches_by_hand(image)
    seen = "<|image_pad|>" * (rows * columns // MERGE**2)
    text = (
        f"<|im_start|>user\n<|vision_start|>{seen}<|vision_end|>"
        f'Does this figure show "{prompt}"? Please answer {choice}.<|im_end|>\n'
        "<|im_start|>assistant\n"
    )
    ids = tokenizer([text], return_tensors="pt").input_ids
    logits = (
        model(
            input_ids=ids,
            pixel_values=patches,
            image_grid_thw=torch.tensor([[1, rows, columns]]),
            mm_token_type_ids=(ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).long(),
        )
        .logits[0, -1]
        .double()
    )
    return logits.softmax(-1)[tokenizer.convert_tokens_to_ids(list(words))].sum().item()


def test_the_score_is_the_sum_of_the_ways_to_say_yes_one_image_at_a_time(folder, scorer):
    expected = [
        by_hand(folder, image, prompt.replace("<|image_pad|>", ""))
        for image, prompt in zip(IMAGES, PROMPTS, strict=True)
    ]
    scores = scorer(IMAGES, PROMPTS)
    assert scores.dtype == torch.float32 and scores.log().std() > 0.1
    assert (scores[0] / scores[2]).log().abs() > 0.01  # the same question of another image
    torch.testing.assert_close(
        scores.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-8
    )


def test_t2v_metrics_asks_yes_or_no_and_takes_yes_alone(folder):
    """Its Qwen3-VL class: question_template and answer_template, in one forward pass."""
    (reward,) = composed_rewards("rewards=vqascore_vlm_t2v_metrics", f"rewards.vqascore_vlm.weights={folder}")
    reward.setup("cpu")
    expected = [
        by_hand(folder, image, prompt, "Yes or No", ["Yes"])
        for image, prompt in zip(IMAGES[:2], PROMPTS[:2], strict=True)
    ]
    torch.testing.assert_close(
        reward.score(IMAGES[:2], PROMPTS[:2]), torch.tensor(expected), rtol=1e-4, atol=1e-8
    )


def test_only_single_tokens_count_each_once(scorer):
    words = scorer.chat.tokenizer
    assert sorted(scorer.chat.yes.tolist()) == sorted(words.convert_tokens_to_ids(["Yes", "yes", "ĠYes"]))
    assert len(words(" yes", add_special_tokens=False).input_ids) == 2


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_score_changes_neither_with_its_neighbors_nor_with_their_order(folder, batch):
    scorer, order = VQAScoreVLM(str(folder), batch=batch), [3, 0, 4, 2, 1]
    alone = torch.cat([scorer([image], [prompt]) for image, prompt in zip(IMAGES, PROMPTS, strict=True)])
    torch.testing.assert_close(scorer(IMAGES, PROMPTS), alone, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(
        scorer([IMAGES[i] for i in order], [PROMPTS[i] for i in order]), alone[order], rtol=1e-5, atol=1e-8
    )


def test_images_are_patches_of_their_own_shape(scorer):
    found = scorer.chat.inputs(IMAGES, PROMPTS)
    expected, sizes = zip(*map(patches_by_hand, IMAGES), strict=True)
    assert found["image_grid_thw"].tolist() == [[1, *size] for size in sizes] and len(set(sizes)) > 1
    torch.testing.assert_close(found["pixel_values"], torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert found["mm_token_type_ids"].sum(-1).tolist() == [rows * columns // 4 for rows, columns in sizes]
    assert (
        found["attention_mask"][:, -1].all() and not found["attention_mask"][:, 0].all()
    )  # padded on the left


def test_nothing_to_score_another_question_and_a_callers_precision(folder, scorer):
    assert scorer([], []).shape == (0,)
    plain = scorer(IMAGES, PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scorer(IMAGES, PROMPTS), plain)
    assert not torch.equal(VQAScoreVLM(str(folder), question="{prompt}?")(IMAGES, PROMPTS), plain)
    low = VQAScoreVLM(str(folder), precision="bfloat16")
    assert {value.dtype for value in low.module.parameters()} == {torch.bfloat16}
    assert (
        low(IMAGES, PROMPTS).dtype == torch.float32 and (low(IMAGES, PROMPTS) / plain).log().abs().max() < 0.5
    )


def test_a_chat_template_in_a_file_of_its_own(copied, scorer):
    (copied / "chat_template.jinja").unlink()
    with pytest.raises(
        InputError, match=r"rewards\.vqascore_vlm\.weights=.*no chat template with one <\|image_pad\|>"
    ):
        VQAScoreVLM(str(copied))
    (copied / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    assert torch.equal(VQAScoreVLM(str(copied))(IMAGES, PROMPTS), scorer(IMAGES, PROMPTS))


def test_a_chat_template_is_downloaded_with_the_weights(folder, monkeypatch):
    """The hub's part is played by a function that lays down the files that match the patterns."""
    asked = []

    def download(source, revision, allow_patterns):
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("capo.rewards.weights.snapshot_download", download)
    VQAScoreVLM("someone/something")
    needed = [path.name for path in folder.iterdir()]
    assert "chat_template.jinja" in needed
    assert [name for name in needed if not any(fnmatch(name, pattern) for pattern in asked[0])] == []


def test_names_of_tensors_are_those_of_the_published_checkpoint(folder):
    names = set(load_file(folder / "model.safetensors"))
    assert names >= {
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.1.self_attn.q_norm.weight",
        "model.language_model.norm.weight",
        "model.visual.patch_embed.proj.weight",
        "model.visual.blocks.1.attn.qkv.weight",
        "model.visual.merger.linear_fc2.bias",
        "model.visual.deepstack_merger_list.0.norm.weight",
    }
    assert "lm_head.weight" not in names  # the head is the table of words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("model.visual.pos_embed.weight"),
            r"it lacks model\.visual\.pos_embed\.weight; .*Qwen/Qwen3-VL-2B-Instruct",
        ),
        (lambda state: state.update(head=torch.zeros(1)), "it has unknown head;"),
        (
            lambda state: state.update({"model.language_model.norm.weight": torch.zeros(3)}),
            "weights do not load",
        ),
    ],
)
def test_another_models_weights(copied, change, message):
    state = load_file(copied / "model.safetensors")
    change(state)
    save_file(state, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        VQAScoreVLM(str(copied))


def test_a_folder_of_another_kind(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    with pytest.raises(InputError, match="a model of type llava, this reward reads a Qwen3-VL"):
        VQAScoreVLM(str(copied))
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="no tokenizer and image processor"):
        VQAScoreVLM(str(copied))
    (copied / "config.json").unlink()
    with pytest.raises(InputError, match=r"its config\.json is missing"):
        VQAScoreVLM(str(copied))
    with pytest.raises(InputError, match=r"that folder holds no model\*\.safetensors"):
        VQAScoreVLM(str(tmp_path))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({}, r"rewards\.vqascore_vlm\.weights=someone/nothing \(revision main\) is not here\n"),
        (
            {"precision": "half"},
            r"rewards\.vqascore_vlm\.scorer\.precision=half: unknown; choose one of float32, bfloat16",
        ),
        (
            {"question": "Good?"},
            r"rewards\.vqascore_vlm\.scorer\.question=Good\?: it does not say where the prompt goes",
        ),
        ({"batch": 0}, r"rewards\.vqascore_vlm\.scorer\.batch=0"),
        ({"answers": "Yes"}, r"rewards\.vqascore_vlm\.scorer\.answers=Yes: not a list of words"),
        ({"answers": [True]}, r"answers=\[True\]: not a list of words; write \[Yes\]"),
        ({"answers": []}, r"answers=\[\]: not a list of words"),
    ],
)
def test_what_is_refused_before_loading(setting, message):
    with pytest.raises(InputError, match=message):
        VQAScoreVLM("someone/nothing", **setting)


def test_the_yaml_reaches_the_scorer_from_both_places(folder, scorer):
    places = ("rewards", "evaluation.rewards")
    own = [f"{place}.vqascore_vlm.weights={folder}" for place in places]
    own += ["rewards=vqascore_vlm", "rewards@evaluation.rewards=vqascore_vlm"]
    for place in places:
        (reward,) = composed_rewards(*own, place=place)
        reward.setup("cpu")
        assert torch.equal(reward.score(IMAGES, PROMPTS), scorer(IMAGES, PROMPTS))
