"""Tokenizer and text encoders of the shapes world; every word of the grammar is one token."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from capo.shapes.captions import WORDS

LENGTH = 20  # tokens, including start and end; the longest sentence that `prompts` draws needs 16
_EARLY = ("striped", "centre", "above")
_START, _END = "<|startoftext|>", "<|endoftext|>"


def tokenizer() -> CLIPTokenizer:
    """Build a byte-pair tokenizer whose merges form each word from its prefixes, the longest word first.

    The words in `_EARLY` come before that, because pairs of their letters would be merged as parts of longer
    words.
    """
    merges: list[tuple[str, str]] = []
    pieces = {_START: 0, _END: 1}
    for word in sorted(WORDS, key=lambda word: (word not in _EARLY, -len(word), word)):
        letters = [*word[:-1], word[-1] + "</w>"]
        left = letters[0]
        for letter in letters:
            pieces.setdefault(letter, len(pieces))
        for right in letters[1:]:
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
            pieces.setdefault(left, len(pieces))
    return CLIPTokenizer(vocab=pieces, merges=cast(Any, merges), model_max_length=LENGTH, pad_token=_END)


def _config(vocabulary: int, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def encoders(vocabulary: int) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Build two untrained CLIP text encoders, 32 and 64 wide.

    As in SDXL, their second-to-last layer feeds the cross-attention.
    """
    return CLIPTextModel(_config(vocabulary, 32, 2)), CLIPTextModelWithProjection(_config(vocabulary, 64, 3))


def token_ids(words: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Tokenize captions to ids (B, LENGTH)."""
    return words(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
