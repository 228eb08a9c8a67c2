import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from capo.errors import InputError
from capo.rewards import Reward
from capo.rewards.clip_flant5 import own_name
from capo.rewards.vqascore import BEFORE, VQAScore, geometric_mean, squared, without_end
from fixtures.configuration import composed_rewards
from fixtures.tiny_clip import SIDE, noise_images
from fixtures.tiny_flant5 import build_flant5, t5_values, write_files

IMAGES = noise_images(5)
PROMPTS = [
    "a red square",
    "the circle of the red square, and somewhat more",
    "a red square",
    "",
    'a "{prompt}" <image> of {x}',
]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to "
    "the user's questions."
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return build_flant5(tmp_path_factory.mktemp("flant5"))


@pytest.fixture(scope="module")
def scorer(folders):
    return VQAScore(**folders.arguments())


@pytest.fixture
def copied(folders, tmp_path):
    """The weights' folder, to be changed, and how the scorer takes it."""
    weights = shutil.copytree(folders.weights, tmp_path / "weights")
    return weights, folders.arguments() | {"weights": str(weights)}


def square_by_hand(image):
    """(3, SIDE, SIDE).

    Rows or columns of the mean color on both sides, then CLIP's resizing and normalizing.
    """
    pixels, side = np.asarray(image), max(image.size)
    up, left = (side - pixels.shape[0]) // 2, (side - pixels.shape[1]) // 2
    square = np.full((side, side, 3), (122, 116, 104), dtype=np.uint8)  # 255 x (0.4815, 0.4578, 0.4082), cut
    square[up : up + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    resized = np.asarray(Image.fromarray(square).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255
    resized = (resized - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    return torch.from_numpy(resized).permute(2, 0, 1).float()


@torch.no_grad()
def by_hand(folders, image, prompt, question='Does this figure show "{prompt}"? Please answer yes or no.'):
    """P(Yes) and P(end | Yes) of one image, nothing padded.

    Tower layer by layer, words and image laid in a row, head unscaled.
    """
    from transformers import CLIPModel, T5Config, T5ForConditionalGeneration, T5Tokenizer

    state, tower = folders.state, CLIPModel.from_pretrained(folders.tower).vision_model.eval()
    x = tower.pre_layrnorm(tower.embeddings(square_by_hand(image)[None]))
    for layer in tower.encoder.layers[:-1]:
        x = layer(x, None)
    x = torch.nn.functional.gelu(x[0, 1:] @ state["mm_projector.0.weight"].T + state["mm_projector.0.bias"])
    x = x @ state["mm_projector.2.weight"].T + state["mm_projector.2.bias"]
    tokenizer, words = T5Tokenizer.from_pretrained(folders.tokenizer), state["shared.weight"]
    text = question.split("{prompt}")
    pieces = [SYSTEM + " USER: ", "\n" + text[0] + prompt + text[1] + " ASSISTANT: "]
    before, after = (words[torch.tensor(tokenizer(piece).input_ids)] for piece in pieces)
    t5 = T5ForConditionalGeneration(T5Config(**t5_values(len(words)))).eval()
    t5.load_state_dict(
        {name: value for name, value in state.items() if name in t5.state_dict() and "lm_head" not in name},
        strict=False,
    )
    read = t5.encoder(inputs_embeds=torch.cat([before, x, after])[None]).last_hidden_state
    yes, end = tokenizer("Yes").input_ids
    written = (
        t5.decoder(input_ids=torch.tensor([[0, yes]]), encoder_hidden_states=read)
        .last_hidden_state[0]
        .double()
    )
    probabilities = (written @ state["lm_head.weight"][: folders.tokens].T.double()).softmax(-1)
    return probabilities[0, yes].item(), probabilities[1, end].item()


@pytest.mark.parametrize("files", ["bin", "safetensors", "one"])
def test_both_forms_are_the_formulas_one_image_at_a_time(folders, copied, files):
    weights, arguments = copied
    write_files(weights, folders.state, files)
    expected = torch.tensor(
        [by_hand(folders, *pair) for pair in zip(IMAGES, PROMPTS, strict=True)], dtype=torch.float64
    )
    official, bare = (VQAScore(**arguments, form=form)(IMAGES, PROMPTS) for form in ("official", "yes"))
    assert official.dtype == bare.dtype == torch.float32 and bare.log().std() > 0.3
    assert (bare[0] / bare[2]).log().abs() > 0.01  # the same question of another image
    torch.testing.assert_close(bare.double(), expected[:, 0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(official.double(), expected.prod(-1).sqrt(), rtol=1e-4, atol=1e-7)


def test_forms_on_numbers():
    log_probs = torch.tensor([[0.9, 0.4], [0.5, 0.5]]).log()  # P(Yes), P(end | Yes)
    torch.testing.assert_close(geometric_mean(log_probs), torch.tensor([0.6, 0.5]))
    torch.testing.assert_close(without_end(log_probs), torch.tensor([0.9, 0.5]))
    three = torch.tensor([[0.5, 0.5, 0.25]]).log()  # an answer of two tokens: (1/16) ** (1/3), and 0.5 x 0.5
    torch.testing.assert_close(geometric_mean(three), torch.tensor([0.0625 ** (1 / 3)]))
    torch.testing.assert_close(without_end(three), torch.tensor([0.25]))


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_score_changes_neither_with_its_neighbors_nor_with_their_order(folders, batch):
    scorer, order = VQAScore(**folders.arguments(), form="yes", batch=batch), [3, 0, 4, 2, 1]
    alone = torch.cat([scorer([image], [prompt]) for image, prompt in zip(IMAGES, PROMPTS, strict=True)])
    assert alone.std() > 1e-3
    torch.testing.assert_close(scorer(IMAGES, PROMPTS), alone, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(
        scorer([IMAGES[i] for i in order], [PROMPTS[i] for i in order]), alone[order], rtol=1e-5, atol=1e-8
    )


def test_nothing_to_score_and_a_callers_precision(scorer):
    assert scorer([], []).shape == (0,)
    plain = scorer(IMAGES, PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scorer(IMAGES, PROMPTS), plain)


def test_an_image_is_padded_to_a_square_with_the_mean_color(scorer):
    wide = Image.fromarray(np.arange(30, dtype=np.uint8).reshape(2, 5, 3))
    square = np.asarray(squared(wide, (1, 2, 3)))
    assert square.shape == (5, 5, 3) and np.array_equal(
        square[1:3], np.asarray(wide)
    )  # three rows to fill: one above, two below
    assert (square[[0, 3, 4]] == [1, 2, 3]).all()
    tall = np.asarray(squared(wide.rotate(90, expand=True), (1, 2, 3)))
    assert (tall[:, [0, 3, 4]] == [1, 2, 3]).all() and not (tall[:, 1:3] == [1, 2, 3]).all(-1).any()
    images = [*IMAGES, Image.fromarray(np.asarray(IMAGES[0])[:21, :21])]
    torch.testing.assert_close(
        scorer.inputs.pixels(images), torch.stack([square_by_hand(i) for i in images]), rtol=1e-5, atol=1e-5
    )


def test_a_question_is_two_pieces_around_the_image_each_with_its_end(scorer):
    words = scorer.inputs.tokenizer
    assert BEFORE == SYSTEM + " USER: "
    assert scorer.inputs.before.tolist() == [*words(SYSTEM + " USER:", add_special_tokens=False).input_ids, 1]
    short, long = scorer.inputs.tokens(["a red square", "a red square of the circle"]).tolist()
    written = [
        *words(
            'Does this figure show "a red square"? Please answer yes or no. ASSISTANT:',
            add_special_tokens=False,
        ).input_ids,
        1,
    ]
    assert short == written + [0] * (len(long) - len(written)) and len(long) == len(written) + len(
        words.tokenize(" of the circle")
    )
    assert scorer.answer.tolist() == [words.convert_tokens_to_ids("▁Yes"), 1]
    cut = scorer.inputs.tokens(["square " * 3000])[0]
    assert len(scorer.inputs.before) + 1 + len(cut) == 2048 and cut[-1] == 1


def test_question_and_answer_can_be_others(folders):
    scorer = VQAScore(**folders.arguments(), question="Is this {prompt}?", form="yes")
    yes, _ = by_hand(folders, IMAGES[1], PROMPTS[1], "Is this {prompt}?")
    assert scorer(IMAGES[1:2], PROMPTS[1:2]).item() == pytest.approx(yes, rel=1e-4)
    no = VQAScore(**folders.arguments(), answer="No", form="yes")(IMAGES, PROMPTS)
    assert (no / VQAScore(**folders.arguments(), form="yes")(IMAGES, PROMPTS)).log().abs().min() > 0.01


def test_the_checkpoints_own_tower_is_used_where_it_brings_one(tmp_path, folders):
    nested = build_flant5(tmp_path, nested_tower=True)
    (nested.tower / "pytorch_model.bin").unlink()  # then the folder's weights are not needed
    scorer = VQAScore(**nested.arguments())
    for name, value in scorer.module.vision_tower.state_dict().items():
        assert torch.equal(value, nested.state[f"vision_tower.vision_tower.vision_model.{name}"])
    plain = {name: value for name, value in nested.state.items() if "vision_tower" not in name}
    for name, value in folders.state.items():
        assert torch.equal(plain[name], value)
    assert (
        scorer(IMAGES, PROMPTS) / VQAScore(**folders.arguments())(IMAGES, PROMPTS)
    ).log().abs().max() > 0.001
    write_files(
        nested.weights, nested.state, "one"
    )  # no index to tell: the tower folder's is read, the checkpoint's stays
    with pytest.raises(InputError, match=r"rewards\.vqascore\.scorer\.tower=.*that folder holds no model"):
        VQAScore(**nested.arguments())
    one = VQAScore(**nested.arguments() | {"tower": str(folders.tower)})
    assert torch.equal(one(IMAGES, PROMPTS), scorer(IMAGES, PROMPTS))


def test_published_names_become_the_networks():
    tower = "vision_tower.embeddings.class_embedding"
    assert own_name("vision_tower.vision_tower.vision_model.embeddings.class_embedding") == tower
    assert own_name("vision_tower.vision_model.embeddings.class_embedding") == own_name(tower) == tower
    assert own_name("mm_projector.2.bias") == own_name("encoder.mm_projector.2.bias") == "mm_projector.2.bias"
    assert (
        own_name("decoder.embed_tokens.weight")
        == own_name("shared.weight")
        == own_name("embed_tokens.weight")
        == "t5.shared.weight"
    )
    assert (
        own_name("decoder.block.3.layer.2.DenseReluDense.wi_0.weight")
        == "t5.decoder.block.3.layer.2.DenseReluDense.wi_0.weight"
    )


def test_words_are_one_table_and_the_answers_head_another(scorer, folders):
    t5 = scorer.module.t5
    assert t5.encoder.embed_tokens.weight is t5.decoder.embed_tokens.weight is t5.shared.weight
    assert torch.equal(t5.shared.weight, folders.state["shared.weight"]) and torch.equal(
        t5.lm_head.weight, folders.state["lm_head.weight"]
    )
    assert scorer.module.vision_tower.embeddings.position_ids.tolist() == [list(range((SIDE // 4) ** 2 + 1))]


def test_bfloat16_moves_scores_a_little_and_is_another_reward(folders, scorer):
    low = VQAScore(**folders.arguments(), precision="bfloat16")
    assert {value.dtype for value in low.module.parameters()} == {torch.bfloat16}
    found, exact = low(IMAGES, PROMPTS), scorer(IMAGES, PROMPTS)
    assert (
        found.dtype == torch.float32
        and not torch.equal(found, exact)
        and (found / exact).log().abs().max() < 0.5
    )
    target = {"_target_": "capo.rewards.vqascore.VQAScore"}
    prints = {
        Reward("vqascore", target | {"precision": precision}).fingerprint
        for precision in ("float32", "bfloat16")
    }
    assert len(prints) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("lm_head.weight"),
            r"it lacks t5\.lm_head\.weight; this reward reads those of zhiqiulin/clip-flant5-xxl",
        ),
        (
            lambda state: [state.pop(name) for name in list(state) if "mm_projector" in name],
            r"it lacks mm_projector\.0\.bias, .* and 1 more",
        ),
        (lambda state: state.update(head=torch.zeros(1)), r"it has unknown t5\.head;"),
        (
            lambda state: state.update({"mm_projector.0.weight": torch.zeros(3, 3)}),
            "size mismatch for mm_projector",
        ),
    ],
)
def test_another_models_weights(folders, copied, change, message):
    weights, arguments = copied
    state = dict(folders.state)
    change(state)
    write_files(weights, state)
    with pytest.raises(InputError, match=message):
        VQAScore(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda config: config.pop("d_kv"),
            "it holds a model of type clip_t5, this reward reads a CLIP-FlanT5",
        ),
        (
            lambda config: config.update(mm_projector_type="linear"),
            "its mm_projector_type is linear, this reward reads mlp2x_gelu",
        ),
        (
            lambda config: config.update(mm_vision_select_layer=-1),
            "its mm_vision_select_layer is -1, this reward reads -2",
        ),
        (
            lambda config: config.update(vocab_size=300),
            r"scorer\.tokenizer=.*its tokenizer has 121 tokens, the model 300 \(up to 127 more",
        ),
    ],
)
def test_another_models_config(copied, change, message):
    weights, arguments = copied
    config = json.loads((weights / "config.json").read_text())
    change(config)
    (weights / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        VQAScore(**arguments)


def test_files_that_are_not_there(copied, folders, tmp_path):
    weights, arguments = copied
    (weights / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(
        InputError,
        match=r"rewards\.vqascore\.weights=.*pytorch_model-00002-of-00002\.bin of its index is not there; "
        r"get",
    ):
        VQAScore(**arguments)
    (alone := tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        InputError,
        match=r"rewards\.vqascore\.weights=.*model\.safetensors: it is a file; give the folder that holds it "
        r"and its",
    ):
        VQAScore(**arguments | {"weights": str(alone)})
    (weights / "config.json").unlink()
    with pytest.raises(InputError, match=r"its config\.json is missing"):
        VQAScore(**arguments)
    for key in ("tokenizer", "tower"):
        with pytest.raises(
            InputError,
            match=rf"rewards\.vqascore\.scorer\.{key}=someone/other \(revision abc\) is not here\n",
        ):
            VQAScore(**folders.arguments() | {key: "someone/other", f"{key}_revision": "abc"})
    with pytest.raises(
        InputError, match=r"rewards\.vqascore\.weights=someone/nothing \(revision main\) is not here\n"
    ):
        VQAScore("someone/nothing")
    shutil.copy(folders.tokenizer / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"rewards\.vqascore\.scorer\.tokenizer=.*no T5 tokenizer"):
        VQAScore(**folders.arguments() | {"tokenizer": str(tmp_path)})
    shutil.copytree(folders.tower, tmp_path / "tower")
    (tmp_path / "tower" / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"rewards\.vqascore\.scorer\.tower=.*no CLIP image processor"):
        VQAScore(**folders.arguments() | {"tower": str(tmp_path / "tower")})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"form": "paper"}, r"rewards\.vqascore\.scorer\.form=paper: unknown; choose one of official, yes"),
        (
            {"precision": "float16"},
            r"rewards\.vqascore\.scorer\.precision=float16: unknown; choose one of float32, bfloat16",
        ),
        (
            {"question": "Is it good?"},
            r"rewards\.vqascore\.scorer\.question=Is it good\?: it does not say where the prompt goes; "
            r"write {pro",
        ),
        ({"answer": " "}, r"rewards\.vqascore\.scorer\.answer=' ': the answer is empty; give one"),
        ({"batch": 0}, r"rewards\.vqascore\.scorer\.batch=0"),
    ],
)
def test_settings_are_refused_before_weights_are_looked_for(setting, message):
    with pytest.raises(InputError, match=message):
        VQAScore("someone/nothing", **setting)


def test_the_yaml_reaches_the_scorer_from_both_places(folders):
    places = ("rewards", "evaluation.rewards")
    own = [
        f"{place}.vqascore.{key}"
        for place in places
        for key in (
            f"weights={folders.weights}",
            f"scorer.tokenizer={folders.tokenizer}",
            f"scorer.tower={folders.tower}",
        )
    ]
    own += ["rewards=vqascore", "rewards@evaluation.rewards=vqascore"]
    for place in places:
        (reward,) = composed_rewards(*own, place=place)
        reward.setup("cpu")
        yes, end = by_hand(folders, IMAGES[0], PROMPTS[0])
        assert reward.score(IMAGES[:1], PROMPTS[:1]).item() == pytest.approx(math.sqrt(yes * end), rel=1e-4)
