import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from capo.errors import InputError
from capo.rewards import Reward
from capo.rewards.hpsv2 import FILE, HPSv2, cleaned, fitted
from fixtures.configuration import composed_rewards
from fixtures.tiny_clip import SIDE, WIDTH, build_clip, noise_images
from fixtures.tiny_pipelines import CONTEXT

MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
IMAGES = noise_images(5)
PROMPTS = ["a red square", "the blue circle and a green triangle", "a red square", "", "left of the circle"]
SEEN, SEEN_HEADS, READ_HEADS, PATCH = 12, 2, 2, 4  # as tiny_clip has them


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hpsv2") / "clip"
    build_clip(folder, seed=2)
    return str(folder)


@pytest.fixture(scope="module")
def state(clip):
    """A checkpoint of random weights under open_clip's names, which is no transformers' model renamed."""
    from transformers import CLIPConfig, CLIPTokenizer

    text = CLIPConfig.from_pretrained(clip).text_config
    assert (text.hidden_size, text.num_attention_heads) == (WIDTH, READ_HEADS)
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "positional_embedding": (CONTEXT, WIDTH),
        "text_projection": (WIDTH, WIDTH),
        "logit_scale": (),
        "token_embedding.weight": (len(CLIPTokenizer.from_pretrained(clip)), WIDTH),
        "visual.class_embedding": (SEEN,),
        "visual.positional_embedding": (1 + (SIDE // PATCH) ** 2, SEEN),
        "visual.proj": (SEEN, WIDTH),
        "visual.conv1.weight": (SEEN, 3, PATCH, PATCH),
    }
    for name, width in (("visual.ln_pre", SEEN), ("visual.ln_post", SEEN), ("ln_final", WIDTH)):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for tower, width, wide in (("visual.", SEEN, 24), ("", WIDTH, text.intermediate_size)):
        layers = 2 if tower else text.num_hidden_layers
        for part, shape in {
            "ln_1": (width,),
            "ln_2": (width,),
            "attn.in_proj": (3 * width, width),
            "attn.out_proj": (width, width),
            "mlp.c_fc": (wide, width),
            "mlp.c_proj": (width, wide),
        }.items():
            mark = "_" if part == "attn.in_proj" else "."
            for layer in range(layers):
                at = f"{tower}transformer.resblocks.{layer}.{part}{mark}"
                shapes |= {f"{at}weight": shape, f"{at}bias": shape[:1]}
    return {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def file(state, tmp_path):
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / FILE)
    return str(tmp_path / FILE)


def below(state, prefix):
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def through(state, x, heads, act, mask=None):
    """Blocks as open_clip has them, on torch's own attention layer."""
    for layer in range(len({name.split(".")[1] for name in state})):
        part = below(state, f"resblocks.{layer}.")
        attention = nn.MultiheadAttention(x.shape[-1], heads, batch_first=True)
        attention.load_state_dict(below(part, "attn."))
        y = F.layer_norm(x, x.shape[-1:], part["ln_1.weight"], part["ln_1.bias"])
        x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        y = F.layer_norm(x, x.shape[-1:], part["ln_2.weight"], part["ln_2.bias"])
        y = act(F.linear(y, part["mlp.c_fc.weight"], part["mlp.c_fc.bias"]))
        x = x + F.linear(y, part["mlp.c_proj.weight"], part["mlp.c_proj.bias"])
    return x


@torch.no_grad()
def by_open_clip(clip, state, image, prompt):
    """One image's cosine, by open_clip's own forward pass."""
    from transformers import CLIPConfig, CLIPTokenizer
    from transformers.activations import ACT2FN

    config, tokenizer = CLIPConfig.from_pretrained(clip), CLIPTokenizer.from_pretrained(clip)

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    x = (
        F.conv2d(torch.from_numpy(by_pillow(image)).float()[None], state["visual.conv1.weight"], stride=PATCH)
        .flatten(2)
        .transpose(1, 2)
    )
    x = norm(
        torch.cat([state["visual.class_embedding"][None, None], x], 1) + state["visual.positional_embedding"],
        "visual.ln_pre",
    )
    x = through(below(state, "visual.transformer."), x, SEEN_HEADS, ACT2FN[config.vision_config.hidden_act])
    seen = norm(x[0, 0], "visual.ln_post") @ state["visual.proj"]
    ids = tokenizer([prompt]).input_ids[0]
    ids = ids + [0] * (CONTEXT - len(ids))  # open_clip pads with zeros; nothing looks at them
    x = state["token_embedding.weight"][ids][None] + state["positional_embedding"]
    mask = torch.full((CONTEXT, CONTEXT), -math.inf).triu(1)
    x = norm(
        through(below(state, "transformer."), x, READ_HEADS, ACT2FN[config.text_config.hidden_act], mask),
        "ln_final",
    )
    read = x[0, ids.index(tokenizer.eos_token_id)] @ state["text_projection"]
    return float((seen * read).sum() / (seen.norm() * read.norm()))


def by_pillow(image, side=SIDE):
    """(3, side, side): resized by Pillow as floating point numbers, which neither rounds nor clips.

    Zeros around; normalized.
    """
    longest = max(image.size)
    width, height = (round(length * side / longest) for length in image.size)
    canvas = np.zeros((3, side, side))
    left, top = (side - width) // 2, (side - height) // 2
    for channel, level in enumerate(np.moveaxis(np.asarray(image, dtype=np.float32) / 255, -1, 0)):
        resized = Image.fromarray(level).resize((width, height), Image.Resampling.BICUBIC)
        canvas[channel, top : top + height, left : left + width] = np.asarray(resized)
    return (canvas - MEAN[:, None, None]) / STD[:, None, None]


def test_the_score_is_open_clips_cosine_one_image_at_a_time(file, clip, state):
    scores = HPSv2(file, clip=clip)(IMAGES, PROMPTS)
    expected = torch.tensor(
        [by_open_clip(clip, state, image, prompt) for image, prompt in zip(IMAGES, PROMPTS, strict=True)]
    )
    assert scores.dtype == torch.float32 and scores.std() > 0.02 and scores.abs().max() <= 1
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


def test_projections_and_biases_of_queries_move_a_score_and_the_logit_scale_does_not(clip, state, tmp_path):
    def scores(changed):
        save_file(changed, tmp_path / "changed.safetensors")
        return HPSv2(str(tmp_path / "changed.safetensors"), clip=clip)(IMAGES[:2], PROMPTS[:2])

    plain, still = scores(state), []
    for name in (
        "text_projection",
        "visual.proj",
        "visual.transformer.resblocks.1.attn.in_proj_bias",
        "logit_scale",
    ):
        changed = {key: value.clone() for key, value in state.items()}
        changed[name] += torch.randn(changed[name].shape, generator=torch.Generator().manual_seed(0))
        still += [name] * torch.equal(scores(changed), plain)
    assert still == ["logit_scale"]


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("\uff52\uff45\uff44", "red"),  # wide letters
        ("schÃ¶n", "schön"),  # UTF-8 that was read as Latin-1
        ("a \u201cred\u201d fox\u2019s", 'a "red" fox\'s'),
        # three levels of escaping less two are one; beside a "<" the mending itself resolves no entity
        ("< &amp;amp;amp;", "< &amp;"),
        (" a  red\nsquare ", "a  red\nsquare"),  # the tokenizer joins what is left
    ],
)
def test_prompts_are_cleaned_as_open_clip_does(prompt, read):
    assert cleaned(prompt) == read


def test_a_score_is_the_cleaned_prompts(file, clip):
    scorer = HPSv2(file, clip=clip)
    raw = ["\uff52\uff45\uff44&amp;nbsp;circle", " the  square"]
    assert torch.equal(scorer.inputs.tokens(raw), scorer.inputs.tokens(["red circle", "the square"]))
    assert torch.equal(scorer(IMAGES[:2], raw), scorer(IMAGES[:2], ["red circle", "the square"]))


def test_without_ftfy_the_package_is_named(file, clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    reward = Reward(
        "hpsv2", {"_target_": "capo.rewards.hpsv2.HPSv2", "weights": file, "clip": clip}, version=2
    )
    with pytest.raises(InputError, match="'hpsv2' needs ftfy, which is not installed: pip install ftfy"):
        reward.setup("cpu")


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (37, 16), (5, 9), (16, 11), (16, 16)])
def test_images_are_seen_whole_with_zeros_around(size):
    levels = np.random.default_rng(4).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(levels)
    np.testing.assert_allclose(fitted(image, SIDE).numpy(), by_pillow(image), atol=2e-5)


def test_a_line_keeps_one_row_of_pixels():
    """500 x 3 would be 16 x 0, at which the published code fails; row 7 of 16 holds it."""
    found = fitted(Image.new("RGB", (500, 3), (255, 255, 255)), 16)[0]
    assert (found > 0).any(dim=1).nonzero().tolist() == [[7]] and found.isfinite().all()


def test_a_hand_made_image_twice_as_wide_as_high():
    """Red 40 x 20 becomes 16 x 8, with 4 rows of zeros above and below.

    Level 0 normalized is -mean / std, level 1 (1 - mean) / std.
    """
    found = fitted(Image.new("RGB", (40, 20), (255, 0, 0)), 16).numpy()
    for channel, level in enumerate((1, 0, 0)):
        rim, inside = -MEAN[channel] / STD[channel], (level - MEAN[channel]) / STD[channel]
        expected = np.repeat([rim] * 4 + [inside] * 8 + [rim] * 4, 16).reshape(16, 16)
        np.testing.assert_allclose(found[channel], expected, atol=1e-5)


def test_an_odd_rest_is_larger_below_and_on_the_right():
    """White 8 x 5 stays as it is on 8 x 8: of three rows one is above."""
    found = fitted(Image.new("RGB", (8, 5), (255, 255, 255)), 8)[0].numpy()
    inside = (1 - MEAN[0]) / STD[0]
    white = [False, True, True, True, True, True, False, False]
    assert (np.abs(found - inside) < 1e-5).all(axis=1).tolist() == white
    found = fitted(Image.new("RGB", (5, 8), (255, 255, 255)), 8)[0].numpy()
    assert (np.abs(found - inside) < 1e-5).all(axis=0).tolist() == white


def test_without_smoothing_a_row_is_interpolated_from_its_four_neighbors():
    """Each new point takes its four neighbors by cubic weights.

    Halved, new point i lies between 2i and 2i + 1, so cubic weights at distances 1.5, 0.5, 0.5, 1.5 for a =
    -0.75: 0.5: 1.25 x 0.125 - 2.25 x 0.25 + 1 = 0.59375; 1.5: -0.75 x (3.375 - 5 x 2.25 + 8 x 1.5 - 4) =
    -0.09375.
    """
    levels = [0, 255, 0, 0, 255, 255, 0, 0]
    image = Image.fromarray(
        np.repeat(np.array(levels, dtype=np.uint8)[None, :, None], 8, axis=0).repeat(3, axis=2)
    )
    found = fitted(image, 4, antialias=False)[0].numpy()[1] * STD[0] + MEAN[0]
    row = [0, 0, 1, 0, 0, 1, 1, 0, 0, 0]  # with a copy of each end outside
    expected = [
        np.dot([-0.09375, 0.59375, 0.59375, -0.09375], row[start : start + 4]) for start in (0, 2, 4, 6)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(fitted(image, 4)[0].numpy()[1] * STD[0] + MEAN[0] - expected).max() > 0.05


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_a_score_changes_neither_with_its_neighbors_nor_with_their_order(file, clip, batch):
    scorer, order = HPSv2(file, clip=clip, batch=batch), [3, 0, 4, 2, 1]
    alone = torch.cat([scorer([image], [prompt]) for image, prompt in zip(IMAGES, PROMPTS, strict=True)])
    torch.testing.assert_close(scorer(IMAGES, PROMPTS), alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        scorer([IMAGES[i] for i in order], [PROMPTS[i] for i in order]), alone[order], rtol=1e-5, atol=1e-5
    )


def test_a_callers_precision_does_not_move_a_score(file, clip):
    scorer = HPSv2(file, clip=clip)
    plain = scorer(IMAGES, PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scorer(IMAGES, PROMPTS), plain)


def test_a_checkpoint_nested_flat_in_half_precision_or_with_its_mask(file, clip, state, tmp_path):
    rounded = {name: value.half() for name, value in state.items()}
    torch.save(rounded | {"attn_mask": torch.zeros(CONTEXT, CONTEXT)}, tmp_path / "half.pt")
    torch.save({name: value.float() for name, value in rounded.items()}, tmp_path / "flat.pt")
    half, flat = (HPSv2(str(tmp_path / name), clip=clip) for name in ("half.pt", "flat.pt"))
    assert torch.equal(half(IMAGES, PROMPTS), flat(IMAGES, PROMPTS))
    assert {parameter.dtype for parameter in half.module.parameters()} == {torch.float32}
    from_folder = HPSv2(str(tmp_path), clip=clip)
    assert torch.equal(from_folder(IMAGES, PROMPTS), HPSv2(file, clip=clip)(IMAGES, PROMPTS))
    torch.testing.assert_close(from_folder(IMAGES, PROMPTS), half(IMAGES, PROMPTS), rtol=0, atol=0.05)


def test_names_and_shapes_of_the_published_architecture_fit_exactly():
    """The real sizes, without memory: open_clip's ViT-H-14 has 32 blocks that see, 24 that read."""
    from transformers import CLIPConfig, CLIPModel

    from capo.rewards.hpsv2 import from_open_clip

    published = {
        "positional_embedding": (77, 1024),
        "text_projection": (1024, 1024),
        "logit_scale": (),
        "token_embedding.weight": (49408, 1024),
        "visual.class_embedding": (1280,),
        "visual.positional_embedding": (257, 1280),
        "visual.proj": (1280, 1024),
        "visual.conv1.weight": (1280, 3, 14, 14),
    }
    for name, width in (("visual.ln_pre", 1280), ("visual.ln_post", 1280), ("ln_final", 1024)):
        published |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for tower, width, layers in (("visual.", 1280, 32), ("", 1024, 24)):
        for layer in range(layers):
            at = f"{tower}transformer.resblocks.{layer}."
            published |= {f"{at}ln_{i}.{kind}": (width,) for i in (1, 2) for kind in ("weight", "bias")}
            published |= {
                f"{at}attn.in_proj_weight": (3 * width, width),
                f"{at}attn.in_proj_bias": (3 * width,),
            }
            published |= {f"{at}attn.out_proj.weight": (width, width), f"{at}attn.out_proj.bias": (width,)}
            published |= {f"{at}mlp.c_fc.weight": (4 * width, width), f"{at}mlp.c_fc.bias": (4 * width,)}
            published |= {f"{at}mlp.c_proj.weight": (width, 4 * width), f"{at}mlp.c_proj.bias": (width,)}
    with torch.device("meta"):
        state = from_open_clip({name: torch.empty(shape) for name, shape in published.items()})
        model = CLIPModel(
            CLIPConfig(
                text_config={
                    "hidden_size": 1024,
                    "intermediate_size": 4096,
                    "num_hidden_layers": 24,
                    "num_attention_heads": 16,
                },
                vision_config={
                    "hidden_size": 1280,
                    "intermediate_size": 5120,
                    "num_hidden_layers": 32,
                    "num_attention_heads": 16,
                    "patch_size": 14,
                },
                projection_dim=1024,
            )
        )
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    assert sum(math.prod(shape) for shape in published.values()) == 986_109_441


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("visual.proj"),
            r"rewards\.hpsv2\.weights=.*another model's weights: it lacks visual_projection\.weight; "
            r".*xswu/HPSv2 \(HPS_v2\.1_compressed\.pt\)",
        ),
        (
            lambda state: state.update({"transformer.resblocks.0.attn.extra": torch.zeros(1)}),
            r"has unknown .*layers\.0\.attn\.extra;",
        ),
        (lambda state: state.update({"visual.head": torch.zeros(1)}), r"it has unknown visual\.head;"),
        (lambda state: state.update({"text_projection": torch.zeros(3, 3)}), "weights do not load"),
        (lambda state: state.update({"epoch": 3}), r"no state dict \(tensors by name\)"),
    ],
)
def test_another_models_weights(state, clip, tmp_path, change, message):
    state = dict(state)
    change(state)
    torch.save({"state_dict": state}, tmp_path / FILE)
    with pytest.raises(InputError, match=message):
        HPSv2(str(tmp_path / FILE), clip=clip)


def test_weights_that_are_nowhere(file, clip):
    with pytest.raises(
        InputError, match=r"rewards\.hpsv2\.weights=someone/nothing \(revision abc\) is not here"
    ):
        HPSv2("someone/nothing", "abc", clip=clip)
    with pytest.raises(
        InputError, match=r"rewards\.hpsv2\.scorer\.clip=someone/clip \(revision main\) is not here"
    ):
        HPSv2(file, clip="someone/clip")
    with pytest.raises(InputError, match=r"rewards\.hpsv2\.scorer\.batch=0"):
        HPSv2(file, clip=clip, batch=0)


def test_the_yaml_reaches_the_scorer(file, clip):
    clipscore, hpsv2 = composed_rewards(
        "rewards=permissive", f"rewards.hpsv2.weights={file}", f"rewards.hpsv2.scorer.clip={clip}"
    )
    assert (clipscore.license, hpsv2.license) == ("MIT", "Apache-2.0")
    assert hpsv2.scale == 100 and clipscore.scale == 1  # both then in hundredths of a cosine
    hpsv2.setup("cpu")
    assert torch.equal(hpsv2.score(IMAGES, PROMPTS), HPSv2(file, clip=clip)(IMAGES, PROMPTS))
