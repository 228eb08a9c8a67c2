"""GenEval's rules by hand, detections of a made-up output, and the scorer on tiny networks of its classes."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)

from capo.errors import InputError
from capo.rewards.geneval_hf import Found, GenEvalHF, box_of, correct, read_rules, relations
from fixtures.tiny_clip import build_clip

RULES = [
    {
        "tag": "counting",
        "prompt": "two cats",
        "include": [{"class": "cat", "count": 2}],
        "exclude": [{"class": "cat", "count": 3}],
    },
    {
        "tag": "colors",
        "prompt": "a red mouse",
        "include": [{"class": "computer mouse", "count": 1, "color": "red"}],
    },
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("geneval")
    (root / "metadata.jsonl").write_text("".join(json.dumps(rule) + "\n" for rule in RULES))
    build_clip(root / "clip")
    torch.manual_seed(0)
    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        encoder_feedforward_dim=16,
        num_queries=4,
        id2label={0: "cat", 1: "mouse"},
        label2id={"cat": 0, "mouse": 1},
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(root / "detector")
    size = {"shortest_edge": 64, "longest_edge": 64}
    Mask2FormerImageProcessorPil(size=size, size_divisor=32).save_pretrained(root / "detector")
    return root


@pytest.fixture(scope="module")
def scorer(folders):
    return GenEvalHF(str(folders / "detector"), str(folders / "metadata.jsonl"), clip=str(folders / "clip"))


def boxed(left, top, right, bottom, confidence=0.9) -> Found:
    return Found(np.zeros((1, 1), bool), (left, top, right, bottom), confidence)


def test_relations_by_hand():
    # centers are 20 apart, a tenth of both widths is 2: 18 / 20 along x
    assert relations((0, 0, 10, 10), (20, 0, 30, 10)) == {"left of"}
    assert relations((20, 0, 30, 10), (0, 0, 10, 10)) == {"right of"}
    assert relations((0, 20, 10, 30), (0, 0, 10, 10)) == {"below"}
    assert relations((0, 0, 10, 10), (2, 0, 12, 10)) == set()  # 2 apart, less 2
    assert relations((0, 0, 10, 10), (20, 20, 30, 30)) == {"left of", "above"}  # 18 / 28.3 both ways
    # 10 across and 20 down: 8 / 22.4 is less than a half, 18 / 22.4 more
    assert relations((0, 0, 10, 10), (10, 20, 20, 30)) == {"above"}


def test_clauses_by_hand():
    def holds(record, objects, colors=()):
        return correct(record, objects, lambda name, found: list(colors)[: len(found)])

    one, other = boxed(0, 0, 10, 10), boxed(20, 0, 30, 10)
    two = RULES[0]
    assert holds(two, {"cat": [one, other]}) and not holds(two, {"cat": [one]})
    assert not holds(two, {"cat": [one, other, one]}) and not holds(two, {})
    red = {"include": [{"class": "cat", "count": 1, "color": "red"}]}
    assert holds(red, {"cat": [one, other]}, ["red", "blue"])
    assert not holds(red, {"cat": [one, other]}, ["blue", "red"])  # the surest alone is looked at
    left = {
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]
    }
    assert holds(left, {"dog": [other], "cat": [one]}) and not holds(left, {"dog": [one], "cat": [other]})
    assert not holds(left, {"cat": [one]})  # nothing to be left of


def test_detections_of_a_made_up_output(scorer, monkeypatch):
    wide = torch.full((1, 4, 2, 2), -20.0)
    wide[0, 0, :, 0] = 20.0  # the left half
    wide[0, 1, 0, 0] = 20.0  # one quarter
    wide[0, 2] = 20.0  # all
    logits = torch.full((1, 4, 3), -30.0)  # cat, mouse, none
    for query, (label, other) in enumerate(((0, 3.0), (0, 2.0), (1, 1.0), (2, 9.0))):
        logits[0, query, label] = other
        logits[0, query, 2] = max(logits[0, query, 2].item(), 0.0)
    output = SimpleNamespace(class_queries_logits=logits, masks_queries_logits=wide)
    monkeypatch.setattr(scorer, "detector", lambda pixel_values: output)
    found = scorer.detect(Image.new("RGB", (2, 2)), 0.3)
    # sigmoids of 3, 2 and 1; the fourth query is no object
    assert [round(held.confidence, 3) for held in found["cat"]] == [0.953, 0.881]
    assert [held.box for held in found["cat"]] == [(0, 0, 1, 2), (0, 0, 1, 1)]
    assert round(found["computer mouse"][0].confidence, 3) == 0.731
    assert found["computer mouse"][0].box == (0, 0, 2, 2)
    assert set(scorer.detect(Image.new("RGB", (2, 2)), 0.9)) == {"cat"}
    assert scorer([Image.new("RGB", (2, 2))], ["two  cats"]).tolist() == [0.0]  # one above 0.9


def test_colors_are_the_nearest_texts_on_the_object_alone(scorer):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    mask = np.zeros((20, 20), bool)
    mask[2:12, 4:16] = True
    found = [Found(mask, box_of(mask), 0.9)]
    assert found[0].box == (4, 2, 16, 12)
    pixels = np.asarray(image).copy()
    pixels[~mask] = 0x99
    cut = Image.fromarray(pixels[2:12, 4:16])
    image_side = scorer.clip.get_image_features(pixel_values=scorer.inputs.pixels([cut])).pooler_output[0]
    near = {}
    for color in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"):
        texts = [
            f"a photo of a {color} cat",
            f"a photo of a {color}-colored cat",
            f"a photo of a {color} object",
        ]
        features = scorer.clip.get_text_features(input_ids=scorer.inputs.tokens(texts)).pooler_output
        mean = (features / features.norm(dim=-1, keepdim=True)).mean(0)
        near[color] = torch.cosine_similarity(image_side, mean, dim=0).item()
    with torch.inference_mode():
        assert scorer.colors(image, "cat", found) == [max(near, key=near.__getitem__)]


def test_a_detector_that_lacks_weights_is_refused(folders, tmp_path):
    """By themselves transformers would draw them at random."""
    shutil.copytree(folders / "detector", tmp_path / "detector")
    state = load_file(tmp_path / "detector" / "model.safetensors")
    state.pop("class_predictor.weight")
    save_file(state, tmp_path / "detector" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"another model's weights: it lacks class_predictor\.weight;"):
        GenEvalHF(str(tmp_path / "detector"), str(folders / "metadata.jsonl"), clip=str(folders / "clip"))


def test_the_networks_run_and_what_is_missing_is_named(scorer, folders, tmp_path):
    images = [Image.new("RGB", (70, 50), "red"), Image.new("RGB", (64, 64), "blue")]
    scores = scorer.to("cpu")(images, ["two cats", "a red mouse"])
    assert scores.shape == (2,) and set(scores.tolist()) <= {0.0, 1.0}
    with pytest.raises(InputError, match="has no prompt 'a dog'"):
        scorer(images[:1], ["a dog"])
    with pytest.raises(InputError, match=r"scorer.metadata is not given; give the path of GenEval's"):
        read_rules(None)
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(InputError, match=r"list.jsonl: cannot be read"):
        read_rules(str(tmp_path / "list.jsonl"))
    (tmp_path / "list.jsonl").write_text(
        json.dumps({"prompt": "a", "include": [{"class": "dog", "count": 1}]})
    )
    with pytest.raises(InputError, match=r"it has no class dog; give facebook/mask2former"):
        GenEvalHF(str(folders / "detector"), str(tmp_path / "list.jsonl"), clip=str(folders / "clip"))
