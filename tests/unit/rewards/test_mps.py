import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from capo.errors import InputError
from capo.rewards.mps import CONDITION, MPS, CrossModel, attended_words
from fixtures.configuration import composed_rewards
from fixtures.tiny_clip import WIDTH, build_clip, by_hand, noise_images

LAYERS, HEADS, HEAD_DIM = 2, 2, 8
IMAGES = noise_images(5)
PROMPTS = ["a red square", "the blue circle and a green triangle", "a red square", "", "left of the circle"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mps") / "clip"
    build_clip(folder, seed=6)  # in which the largest nearness differs from prompt to prompt
    return folder


@pytest.fixture(scope="module")
def state(clip_folder):
    """A checkpoint of random weights under the published names; half precision, as the model was run in."""
    torch.manual_seed(1)
    wide = 4 * WIDTH
    shapes = {
        "0.fn.norm.weight": (WIDTH,),
        "0.fn.norm.bias": (WIDTH,),
        "0.fn.to_q.weight": (HEADS * HEAD_DIM, WIDTH),
        "0.fn.to_kv.weight": (2 * HEAD_DIM, WIDTH),
        "0.fn.to_out.weight": (WIDTH, HEADS * HEAD_DIM),
        "0.fn.ff.0.weight": (2 * wide, WIDTH),
        "0.fn.ff.2.weight": (WIDTH, wide),
        "1.fn.norm.weight": (WIDTH,),
        "1.fn.norm.bias": (WIDTH,),
        "1.fn.rotary_emb.inv_freq": (HEAD_DIM // 2,),
        "1.fn.attn_out.weight": (WIDTH, HEADS * HEAD_DIM),
        "1.fn.fused_attn_ff_proj.weight": (HEADS * HEAD_DIM + 2 * HEAD_DIM + 2 * wide, WIDTH),
        "1.fn.ff_out.1.weight": (WIDTH, wide),
    }
    cross = {
        f"mps.cross_model.layers.{layer}.{name}": torch.rand(shape)
        if "inv_freq" in name
        else torch.randn(shape) / math.sqrt(shape[-1])
        for layer in range(LAYERS)
        for name, shape in shapes.items()
    }
    clip = {
        f"mps.model.{name}": value for name, value in load_file(clip_folder / "model.safetensors").items()
    }
    return {name: value.half() for name, value in (clip | cross).items()}


@pytest.fixture
def written(state, tmp_path):
    """Writes the checkpoint, changed by a function on its tensors, to a folder."""

    def write(change=lambda tensors: None):
        tensors = {name: value.clone() for name, value in state.items()}
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        return str(tmp_path)

    return write


@pytest.fixture
def scorer(written, clip_folder):
    return MPS(written(), clip=str(clip_folder))


def by_formula(clip_folder, state, image, prompt, threshold):
    """One image's score.

    Every head and every step written out, rotation by complex numbers, masking by -inf.
    """
    from transformers import CLIPModel, CLIPTokenizer

    state = {name.removeprefix("mps."): value.float() for name, value in state.items()}
    clip, tokenizer = (
        CLIPModel.from_pretrained(clip_folder).float(),
        CLIPTokenizer.from_pretrained(clip_folder),
    )
    clip.load_state_dict(
        {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    )

    def read(text):
        length = clip.config.text_config.max_position_embeddings
        ids = tokenizer(
            [text], padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        found = clip.text_model(ids)
        return found.last_hidden_state[0] @ clip.text_projection.weight.T, found.pooler_output[
            0
        ] @ clip.text_projection.weight.T

    words, whole = read(prompt)
    nearness = (read(CONDITION)[0] @ words.T).max(dim=0).values
    mask = torch.where(nearness / nearness.max() > threshold, 0.0, -math.inf)
    x = clip.vision_model(by_hand(image)[None]).last_hidden_state[0] @ clip.visual_projection.weight.T
    for layer in range(LAYERS):
        part = {
            name.split(f"layers.{layer}.")[1]: value
            for name, value in state.items()
            if f"cross_model.layers.{layer}." in name
        }
        x = x + look_at_words(part, x, words, mask)
        x = x + look_around(part, x)
    return clip.logit_scale.exp() * F.cosine_similarity(x[0], whole, dim=0)


def heads_of(queries, keys, values, mask=0.0):
    found = [
        ((q @ keys.T / math.sqrt(HEAD_DIM)) + mask).softmax(-1) @ values
        for q in queries.split(HEAD_DIM, dim=-1)
    ]
    return torch.cat(found, dim=-1)


def gated(x):
    half = x.shape[-1] // 2
    return x[:, :half] * x[:, half:] * torch.sigmoid(x[:, half:])


def look_at_words(part, x, words, mask):
    y = F.layer_norm(x, (WIDTH,), part["0.fn.norm.weight"], part["0.fn.norm.bias"])
    keys, values = (words @ part["0.fn.to_kv.weight"].T).split(HEAD_DIM, dim=-1)
    attended = heads_of(y @ part["0.fn.to_q.weight"].T, keys, values, mask)
    return (
        attended @ part["0.fn.to_out.weight"].T
        + gated(y @ part["0.fn.ff.0.weight"].T) @ part["0.fn.ff.2.weight"].T
    )


def turned(x, frequencies):
    half, place = HEAD_DIM // 2, torch.arange(len(x))[:, None]
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.exp(1j * place * frequencies)
    return torch.cat([turned.real, turned.imag], dim=-1)


def look_around(part, x):
    y = (
        F.layer_norm(x, (WIDTH,), part["1.fn.norm.weight"], part["1.fn.norm.bias"])
        @ part["1.fn.fused_attn_ff_proj.weight"].T
    )
    queries, keys, values, inner = y.split(
        [HEADS * HEAD_DIM, HEAD_DIM, HEAD_DIM, y.shape[1] - (HEADS + 2) * HEAD_DIM], dim=-1
    )
    frequencies = part["1.fn.rotary_emb.inv_freq"]
    queries = torch.cat([turned(q, frequencies) for q in queries.split(HEAD_DIM, dim=-1)], dim=-1)
    attended = heads_of(queries, turned(keys, frequencies), values)
    return attended @ part["1.fn.attn_out.weight"].T + gated(inner) @ part["1.fn.ff_out.1.weight"].T


@pytest.mark.parametrize("threshold", [0.3, 0.01, 0.9])
@torch.no_grad()
def test_the_score_is_the_published_formulas_one_image_at_a_time(written, clip_folder, state, threshold):
    scores = MPS(written(), clip=str(clip_folder), threshold=threshold)(IMAGES, PROMPTS)
    expected = [
        by_formula(clip_folder, state, image, prompt, threshold)
        for image, prompt in zip(IMAGES, PROMPTS, strict=True)
    ]
    assert scores.dtype == torch.float32 and scores.std() > 1
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-5, atol=1e-3)


def test_features_are_the_embeddings_of_the_images(scorer):
    image = noise_images(2)
    clip = scorer.module["model"]
    with torch.no_grad():
        expected = clip.get_image_features(scorer.inputs.pixels(image)).pooler_output
    torch.testing.assert_close(scorer.features(image), expected, rtol=1e-4, atol=1e-4)


def test_the_threshold_moves_scores(written, clip_folder):
    low, high = (
        MPS(written(), clip=str(clip_folder), threshold=threshold)(IMAGES, PROMPTS)
        for threshold in (0.01, 0.9)
    )
    assert (low - high).abs().max() > 0.1


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_a_score_changes_neither_with_its_neighbors_nor_with_their_order(written, clip_folder, batch):
    scorer, order = MPS(written(), clip=str(clip_folder), threshold=0.9, batch=batch), [3, 0, 4, 2, 1]
    alone = torch.cat([scorer([image], [prompt]) for image, prompt in zip(IMAGES, PROMPTS, strict=True)])
    torch.testing.assert_close(scorer(IMAGES, PROMPTS), alone, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(
        scorer([IMAGES[i] for i in order], [PROMPTS[i] for i in order]), alone[order], rtol=1e-5, atol=1e-3
    )


def test_words_are_attended_by_a_share_of_their_own_prompts_largest_nearness():
    condition = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # nearness, the larger component: 1, 4, 10 (shares 0.1, 0.4, 1) and 0.2, 0.5, 1 (shares 0.2, 0.5, 1);
    # by the largest of the batch, 10, the second prompt would see nothing
    text = torch.tensor([[[1.0, 0.0], [-9.0, 4.0], [10.0, 2.0]], [[0.2, 0.1], [0.5, -3.0], [0.0, 1.0]]])
    assert attended_words(text, condition, 0.3).tolist() == [[False, True, True], [False, True, True]]
    assert attended_words(text, condition, 0.45).tolist() == [[False, False, True], [False, True, True]]
    assert attended_words(text, condition, 0.0).all()


def test_the_published_cross_attention_has_these_names_and_sizes():
    with torch.device("meta"):
        names = {name: tuple(value.shape) for name, value in CrossModel(1024, 4, 16, 64).state_dict().items()}
    assert len(names) == 4 * 13
    assert names["layers.3.0.fn.to_kv.weight"] == (128, 1024) and names["layers.0.0.fn.to_q.weight"] == (
        1024,
        1024,
    )
    assert names["layers.3.0.fn.ff.0.weight"] == (8192, 1024) and names["layers.3.1.fn.ff_out.1.weight"] == (
        1024,
        4096,
    )
    assert names["layers.3.1.fn.fused_attn_ff_proj.weight"] == (1024 + 64 + 64 + 8192, 1024)
    assert names["layers.3.1.fn.rotary_emb.inv_freq"] == (32,)
    # as the published buffer starts: 10000 ** -(2 i / 64)
    frequencies = CrossModel(8, 1, 1, 64).layers[0][1].fn.rotary_emb.inv_freq
    assert frequencies[[0, 1, 31]].tolist() == pytest.approx([1.0, 10000 ** (-2 / 64), 10000 ** (-62 / 64)])


def test_a_state_dict_without_the_prefix_loads_from_a_file(state, scorer, clip_folder, tmp_path):
    positions = {"model.text_model.embeddings.position_ids": torch.arange(12)[None]}
    torch.save(
        {name.removeprefix("mps."): value for name, value in state.items()} | positions, tmp_path / "own.pth"
    )
    own = MPS(str(tmp_path / "own.pth"), clip=str(clip_folder))
    assert torch.equal(own(IMAGES, PROMPTS), scorer(IMAGES, PROMPTS))


def test_a_pickled_module_is_refused(clip_folder, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "MPS_overall_checkpoint.pth")
    with pytest.raises(
        InputError,
        match=r"rewards\.mps\.weights=.*no state dict.*a pickled module can run any code.*save_file",
    ):
        MPS(str(tmp_path / "MPS_overall_checkpoint.pth"), clip=str(clip_folder))
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="tensors by name"):
        MPS(str(tmp_path / "other.pth"), clip=str(clip_folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("mps.cross_model.layers.1.1.fn.attn_out.weight"),
            r"it lacks layers\.1\.1\.fn\.attn_out\.weight; .*RE-N-Y/mpsv1",
        ),
        (
            lambda tensors: tensors.pop("mps.cross_model.layers.0.0.fn.to_q.weight"),
            r"it lacks layers\.0\.0\.fn\.to_q\.weight",
        ),
        (lambda tensors: tensors.pop("mps.model.logit_scale"), "it lacks logit_scale"),
        (
            lambda tensors: tensors.update({"mps.head.weight": torch.zeros(1)}),
            r"it has unknown mps\.head\.weight",
        ),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if "cross_model" in name],
            r"it lacks cross_model\.\*",
        ),
        (
            lambda tensors: tensors.update({"mps.cross_model.layers.0.0.fn.norm.weight": torch.zeros(3)}),
            "size mismatch",
        ),
    ],
)
def test_another_models_weights(written, clip_folder, change, message):
    with pytest.raises(InputError, match=message):
        MPS(written(change), clip=str(clip_folder))


def test_weights_that_are_nowhere_and_a_threshold_that_is_no_share(written):
    with pytest.raises(
        InputError, match=r"rewards\.mps\.weights=someone/nothing \(revision main\) is not here\n"
    ):
        MPS("someone/nothing")
    with pytest.raises(
        InputError, match=r"rewards\.mps\.scorer\.clip=someone/clip \(revision main\) is not here\n"
    ):
        MPS(written(), clip="someone/clip")
    with pytest.raises(InputError, match=r"rewards\.mps\.scorer\.threshold=1: a share"):
        MPS("someone/nothing", threshold=1)


def test_the_yaml_reaches_the_scorer_and_a_weight_that_is_no_number_is_named(written, clip_folder):
    weights = written(
        lambda tensors: tensors["mps.cross_model.layers.0.0.fn.to_out.weight"].__setitem__(
            (0, 0), float("nan")
        )
    )
    places, keys = ("rewards", "evaluation.rewards"), (f"weights={weights}", f"scorer.clip={clip_folder}")
    own = [f"{place}.mps.{key}" for place in places for key in keys]
    own += ["rewards=mps", "rewards@evaluation.rewards=mps"]
    for place in places:
        (reward,) = composed_rewards(*own, place=place)
        reward.setup("cpu")
        with pytest.raises(InputError, match=r'image 0 \("a red square"\): reward \'mps\' is nan'):
            reward.score(IMAGES, PROMPTS)
