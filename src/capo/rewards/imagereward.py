"""ImageReward: human preference for an image given the prompt, from a BLIP.

The BLIP's text encoder attends to the image. Xu et al., ImageReward: Learning and Evaluating Human
Preferences for Text-to-Image Generation, 2023. The published checkpoint has the tensor names of timm's ViT
and of BLIP's BERT; here it runs as transformers' BLIP, whose arithmetic is the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from capo.errors import InputError
from capo.rewards.clip_scores import BATCH, BatchScorer, check_batch
from capo.rewards.cropping import cropped
from capo.rewards.laion_aes import linear_stack
from capo.rewards.weights import fetch, fetch_file, read_state, refuse_other_names, taking_weights

if TYPE_CHECKING:
    from transformers import BatchEncoding, BertTokenizer

FILE, PUBLISHED = "ImageReward.pt", "THUDM/ImageReward (ImageReward.pt)"
SETTING, BERT_SETTING = "rewards.imagereward.weights", "rewards.imagereward.scorer.bert"
BERT = "google-bert/bert-base-uncased"
VOCABULARY = ("vocab.txt", "tokenizer.json")
ADDED = ["[DEC]", "[ENC]"]  # BLIP's special tokens; ImageReward's texts begin with [CLS] and never use them
LENGTH = 35  # tokens of a prompt
# Mean and standard deviation of the head's output, by which published scores are standardized.
AVERAGE, SPREAD = 0.16717362830052426, 1.0333394966054072
HEAD = 64  # width of an attention head in both towers: 1024 / 16 and 768 / 12
UNREAD = ("blip.vision_proj.", "blip.text_proj.")  # used in BLIP's own training alone
# (published name, name here); the first match counts, and groups are kept
RENAMED = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"blip\.visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
        (r"blip\.visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
        (r"blip\.visual_encoder\.patch_embed\.proj\.(.+)", r"vision.embeddings.patch_embedding.\1"),
        (r"blip\.visual_encoder\.norm\.(.+)", r"vision.post_layernorm.\1"),
        (
            r"blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.(.+)",
            r"vision.encoder.layers.\1.layer_norm\2.\3",
        ),
        (
            r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.(.+)",
            r"vision.encoder.layers.\1.self_attn.qkv.\2",
        ),
        (
            r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.(.+)",
            r"vision.encoder.layers.\1.self_attn.projection.\2",
        ),
        (r"blip\.visual_encoder\.blocks\.(\d+)\.mlp\.(.+)", r"vision.encoder.layers.\1.mlp.\2"),
        (r"blip\.text_encoder\.(.+)", r"text.\1"),
        (r"mlp\.(layers\..+)", r"\1"),
    )
]


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename published tensors to those of `network`, in float32, without UNREAD; unknown names are kept."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if not name.startswith(UNREAD):
            new = next(
                (pattern.sub(other, name) for pattern, other in RENAMED if pattern.fullmatch(name)), name
            )
            found[new] = value.float() if value.is_floating_point() else value
    return found


def network(state: Mapping[str, Tensor]) -> nn.ModuleDict:
    """Build an untrained network that fits `state` (from `from_published`): `vision`, `text` and `layers`.

    Widths, depths and the image size follow from the tensors' shapes. Raises KeyError with the name of a
    missing tensor that is needed for them, and ValueError for widths that are not multiples of HEAD.
    """
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    seen, _, patch, _ = state["vision.embeddings.patch_embedding.weight"].shape
    tokens, read = state["text.embeddings.word_embeddings.weight"].shape
    if seen % HEAD or read % HEAD:
        raise ValueError(f"widths {seen} and {read} are not multiples of the head width {HEAD}")
    vision = BlipVisionConfig(
        hidden_size=seen,
        intermediate_size=len(state["vision.encoder.layers.0.mlp.fc1.weight"]),
        num_attention_heads=seen // HEAD,
        num_hidden_layers=_count(state, r"vision\.encoder\.layers\.(\d+)\..+"),
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        image_size=patch * math.isqrt(state["vision.embeddings.position_embedding"].shape[1] - 1),
    )
    text = BlipTextConfig(
        vocab_size=tokens,
        hidden_size=read,
        encoder_hidden_size=seen,
        num_attention_heads=read // HEAD,
        hidden_act="gelu",
        intermediate_size=len(state["text.encoder.layer.0.intermediate.dense.weight"]),
        layer_norm_eps=1e-12,
        is_decoder=True,
        num_hidden_layers=_count(state, r"text\.encoder\.layer\.(\d+)\..+"),
        max_position_embeddings=len(state["text.embeddings.position_embeddings.weight"]),
    )  # fmt: skip  (is_decoder adds cross-attention to the image; causality is an argument of forward)
    parts = {
        "vision": BlipVisionModel(vision),
        "text": BlipTextModel(text, add_pooling_layer=False),
        "layers": linear_stack(read),
    }
    return nn.ModuleDict(parts)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Count the layers, which the names number from 0."""
    return 1 + max(int(found[1]) for found in map(re.compile(pattern).fullmatch, state) if found)


class ImageReward(BatchScorer):
    """ImageReward: a standardized score, about -2.5 to 2.2, read at a prompt's first token.

    All tokens of the prompt attend to the image.

    Args:
        weights: the file ImageReward.pt, or a folder or hub id that holds it, with the published tensor
            names.
        revision: revision of the hub id.
        bert: folder or hub id of bert-base-uncased's tokenizer; its weights are not read.
        bert_revision: revision of `bert`.
        batch: images in one forward pass.

    Raises:
        InputError: the weights are not available, or are another model's.
    """

    def __init__(
        self,
        weights: str,
        revision: str | None = None,
        bert: str = BERT,
        bert_revision: str | None = None,
        batch: int = BATCH,
    ):
        check_batch(batch, "imagereward")
        file = fetch_file(weights, revision, SETTING, FILE)
        folder = fetch(bert, bert_revision, BERT_SETTING, *VOCABULARY)
        model = _loaded(from_published(read_state(file, SETTING)), weights)
        super().__init__(model, batch)
        self.tokenizer = blip_tokenizer(folder, self.module["text"].config.vocab_size, BERT_SETTING, BERT)

    def tokens(self, prompts: Sequence[str]) -> BatchEncoding:
        """Tokenize B prompts to `input_ids` and `attention_mask`, both (B, 35).

        Longer prompts are truncated before the end token, shorter ones padded.
        """
        return self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=LENGTH,
            return_token_type_ids=False,
            return_tensors="pt",
        )

    def _batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        side = self.module["vision"].config.image_size
        pixels = torch.stack([cropped(image, side) for image in images]).to(self.device)
        seen = self.module["vision"](pixel_values=pixels).last_hidden_state
        read = self.module["text"](
            **self.tokens(prompts).to(self.device), encoder_hidden_states=seen
        ).last_hidden_state
        return (self.module["layers"](read[:, 0])[:, 0] - AVERAGE) / SPREAD


def _loaded(state: Mapping[str, Tensor], source: str) -> nn.ModuleDict:
    try:
        with taking_weights(source, SETTING, PUBLISHED):
            model = network(state)
            found = model.load_state_dict(state, strict=False)
    except KeyError as error:
        refuse_other_names([error.args[0]], [], source, SETTING, PUBLISHED)
        raise
    refuse_other_names(found.missing_keys, found.unexpected_keys, source, SETTING, PUBLISHED)
    return model


def blip_tokenizer(folder: Path, size: int, setting: str, published: str) -> BertTokenizer:
    """Load the BERT tokenizer of a folder with BLIP's tokens behind its own, for a model of `size` tokens.

    Raises InputError, which names `setting` and what is `published`, if there is none or of another size.
    """
    from transformers import BertTokenizer

    try:
        tokenizer = BertTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library's errors share no base class
        raise InputError(f"{setting}={folder}: no BERT tokenizer ({error}); get the folder again") from error
    tokenizer.add_tokens(ADDED, special_tokens=True)
    if len(tokenizer) != size:
        raise InputError(
            f"{setting}={folder}: its tokenizer has {len(tokenizer)} tokens with {' and '.join(ADDED)}, "
            f"the model {size}; give {published}"
        )
    return tokenizer
