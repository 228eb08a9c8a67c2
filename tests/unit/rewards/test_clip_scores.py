import json
import math
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from capo.errors import InputError
from capo.rewards import load_rewards
from capo.rewards.clip_scores import ClipScore, PickScore
from fixtures.configuration import composed_rewards
from fixtures.tiny_clip import SIDE, build_clip, by_hand, noise_images
from fixtures.tiny_pipelines import CONTEXT

IMAGES = noise_images(5)
PROMPTS = ["a red square", "the blue circle and a green triangle", "a red square", "", "left of the circle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    build_clip(folder)
    return folder


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def cosines(folder):
    """cos(image, text) of each of IMAGES with its prompt, one at a time, by sums; and exp(logit_scale)."""
    from transformers import CLIPModel, CLIPTokenizer

    clip, tokenizer, found = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder), []
    for image, prompt in zip(IMAGES, PROMPTS, strict=True):
        with torch.no_grad():
            seen = clip.get_image_features(by_hand(image)[None]).pooler_output[0].double()
            read = (
                clip.get_text_features(**tokenizer([prompt], return_tensors="pt")).pooler_output[0].double()
            )
        found.append((seen * read).sum() / (seen.square().sum() * read.square().sum()).sqrt())
    return torch.stack(found).float(), math.exp(clip.logit_scale.item())


def test_pickscore_is_the_scaled_cosine_and_clipscore_a_hundred_times_it(folder):
    expected, scale = cosines(folder)
    assert scale == pytest.approx(math.exp(4.6)) and expected.std() > 0.02
    picked = PickScore(str(folder), processor=str(folder))(IMAGES, PROMPTS)
    assert picked.dtype == torch.float32 and picked.shape == (5,)
    torch.testing.assert_close(picked, scale * expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ClipScore(str(folder))(IMAGES, PROMPTS), 100 * expected, rtol=1e-4, atol=1e-3)


def test_features_are_the_embeddings_of_the_images(folder):
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        pixels = torch.stack([by_hand(image) for image in IMAGES])
        expected = clip.get_image_features(pixels).pooler_output
    found = PickScore(str(folder), batch=2).features(IMAGES)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_a_score_changes_neither_with_its_neighbors_nor_with_their_order(folder, batch):
    scorer, order = PickScore(str(folder), batch=batch), [3, 0, 4, 2, 1]
    alone = torch.cat([scorer([image], [prompt]) for image, prompt in zip(IMAGES, PROMPTS, strict=True)])
    torch.testing.assert_close(scorer(IMAGES, PROMPTS), alone, rtol=1e-5, atol=1e-4)
    shuffled = scorer([IMAGES[i] for i in order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(shuffled, alone[order], rtol=1e-5, atol=1e-4)


def test_nothing_to_score_gives_no_score(folder):
    assert PickScore(str(folder))([], []).shape == (0,)


def test_pixels_are_those_of_the_published_preprocessing(folder):
    pixels = PickScore(str(folder)).inputs.pixels(IMAGES)
    assert pixels.shape == (5, 3, SIDE, SIDE)
    torch.testing.assert_close(
        pixels, torch.stack([by_hand(image) for image in IMAGES]), rtol=1e-5, atol=1e-5
    )


def test_a_long_prompt_is_cut_at_the_models_tokens_and_keeps_its_end(folder):
    scorer = PickScore(str(folder))
    long, cut = scorer.inputs.tokens(
        ["a red square " * 30, "a red square " * 3 + "a"]
    )  # 12 tokens: start, ten words, end
    assert long.tolist() == cut.tolist() and len(long) == CONTEXT
    assert (long == scorer.inputs.tokenizer.eos_token_id).nonzero().tolist() == [[CONTEXT - 1]]


def test_a_callers_precision_does_not_move_a_score(folder):
    scorer = PickScore(str(folder))
    plain = scorer(IMAGES, PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scorer(IMAGES, PROMPTS), plain)


def test_old_checkpoints_load_as_pickled_tensors_and_with_their_position_numbers(copied, tmp_path):
    rounded = {name: value.half() for name, value in load_file(copied / "model.safetensors").items()}
    save_file(
        {name: value.float() for name, value in rounded.items()},
        copied / "model.safetensors",
        metadata={"format": "pt"},
    )
    old = shutil.copytree(copied, tmp_path / "old", ignore=shutil.ignore_patterns("*.safetensors"))
    positions = {
        f"{tower}.embeddings.position_ids": torch.arange(CONTEXT)[None]
        for tower in ("text_model", "vision_model")
    }
    torch.save(rounded | positions, old / "pytorch_model.bin")
    scorer = PickScore(str(old))
    assert torch.equal(scorer(IMAGES, PROMPTS), PickScore(str(copied))(IMAGES, PROMPTS))
    assert {parameter.dtype for parameter in scorer.module.parameters()} == {torch.float32}


def test_names_of_tensors_are_those_of_the_published_checkpoints(folder):
    names = set(load_file(folder / "model.safetensors"))
    assert names >= {
        "logit_scale",
        "visual_projection.weight",
        "text_projection.weight",
        "vision_model.pre_layrnorm.weight",
        "vision_model.embeddings.class_embedding",
        "vision_model.encoder.layers.1.self_attn.q_proj.bias",
        "vision_model.post_layernorm.bias",
        "text_model.embeddings.token_embedding.weight",
        "text_model.encoder.layers.1.mlp.fc1.weight",
        "text_model.final_layer_norm.weight",
    }


def test_a_weight_that_is_no_number_is_capos_error(copied):
    state = load_file(copied / "model.safetensors")
    state["visual_projection.weight"][3, 5] = float("nan")
    save_file(state, copied / "model.safetensors", metadata={"format": "pt"})
    (reward,) = load_rewards(
        {"pickscore": {"scorer": {"_target_": "capo.rewards.clip_scores.PickScore", "weights": str(copied)}}}
    )
    reward.setup("cpu")
    with pytest.raises(
        InputError, match=r'image 0 \("a red square"\): reward \'pickscore\' is nan, which cannot be compared'
    ):
        reward.score(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("logit_scale"),
            r"rewards\.pickscore\.weights=.*another model's weights: it lacks logit_scale; .*PickScore_v1",
        ),
        (lambda state: state.update(head=torch.zeros(1)), "it has unknown head;"),
        (lambda state: state.update({"text_projection.weight": torch.zeros(3, 3)}), "weights do not load"),
    ],
)
def test_another_models_weights(copied, change, message):
    state = load_file(copied / "model.safetensors")
    change(state)
    save_file(state, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        PickScore(str(copied))


def test_a_folder_of_another_kind(copied, tmp_path):
    with pytest.raises(InputError, match=r"that folder holds no model\*\.safetensors and no pytorch_model"):
        PickScore(str(tmp_path))
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))
    with pytest.raises(InputError, match="a model of type siglip, this reward reads a CLIP"):
        PickScore(str(copied))


def test_a_tokenizer_of_another_model(folder, copied):
    config = json.loads((copied / "config.json").read_text())
    config["text_config"]["vocab_size"] += 1
    (copied / "config.json").write_text(json.dumps(config))
    state = load_file(copied / "model.safetensors")
    words = "text_model.embeddings.token_embedding.weight"
    state[words] = torch.cat([state[words], state[words][:1]])
    save_file(state, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"rewards\.pickscore\.scorer\.processor=.*its tokenizer has 88 tokens, the model 89"
    ):
        PickScore(str(copied), processor=str(folder))


def test_weights_that_are_nowhere_name_the_ways_to_provide_them():
    with pytest.raises(InputError) as refused:
        PickScore("someone/nothing", "abc", processor="someone/other")
    message = str(refused.value)
    assert message.startswith("rewards.pickscore.weights=someone/nothing (revision abc) is not here\n")
    for part in (
        "hf download someone/nothing --revision abc --include",
        "rewards.pickscore.weights=FOLDER",
        "HF_HOME=FOLDER",
        "hub cache",
    ):
        assert part in message
    with pytest.raises(InputError, match="no such file or folder"):
        PickScore("./nowhere/at/all")


@pytest.mark.parametrize("name", ["pickscore", "clipscore"])
def test_the_yaml_reaches_the_scorer_from_both_places(folder, name):
    own = [f"{place}.{name}.weights={folder}" for place in ("rewards", "evaluation.rewards")]
    own += [
        f"{place}.{name}.scorer.processor={folder}"
        for place in ("rewards", "evaluation.rewards")
        if name == "pickscore"
    ]
    own += [f"rewards={name}", f"rewards@evaluation.rewards={name}"]
    for place in ("rewards", "evaluation.rewards"):
        (reward,) = composed_rewards(*own, place=place)
        assert reward.scorer["weights"] == str(folder) and reward.scorer["revision"] == reward.revision
        reward.setup("cpu")
        assert reward.score([Image.new("RGB", (20, 30), (250, 10, 10))], ["a red square"]).isfinite().all()


def test_a_batch_of_nothing(folder):
    with pytest.raises(
        InputError, match=r"rewards\.clipscore\.scorer\.batch=0: images in one forward pass must be 1 or more"
    ):
        ClipScore(str(folder), batch=0)
