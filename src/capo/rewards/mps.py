"""MPS: a CLIP-H whose image tokens attend to the words of the prompt that are related to a condition.

The names of modules are those of the published checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capo.errors import InputError
from capo.rewards.clip_scores import (
    BATCH,
    CLIP_H,
    PROCESSOR_FILES,
    ClipInputs,
    ClipTower,
    check_batch,
    load_clip,
)
from capo.rewards.weights import fetch, fetch_file, read_state, refuse_other_names

PUBLISHED = "RE-N-Y/mpsv1"
# The published condition "overall", verbatim.
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, "
    "instance, texture, quantity, attributes, position, number, location, word, things."
)
WIDENING = 4  # width of a feed-forward layer as a multiple of the model's


def attended_words(text: Tensor, condition: Tensor, threshold: float) -> Tensor:
    """Return the mask (P, L) of the words that the image may attend to: those near a word of the condition.

    A word's nearness is its largest inner product with a word of the condition; it must exceed `threshold`
    times the largest in its own prompt. The published model's own forward pass takes the largest in the whole
    batch, which makes a score depend on the other prompts; both published evaluations score one prompt.

    Args:
        text: projected tokens of the prompts (P, L, D).
        condition: projected tokens of the condition (K, D).
        threshold: share of the largest nearness, 0-1.
    """
    nearness = torch.einsum("pld,kd->plk", text, condition).amax(-1)
    return nearness / nearness.amax(-1, keepdim=True) > threshold


def _attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
    """Attend with queries (B, N, heads x d) to one shared head of keys and values (B, M, d).

    The result is (B, N, heads x d). `seen` (B, M) is true for keys that may be attended to; None: all.
    """
    queries = queries.unflatten(-1, (heads, -1)).transpose(1, 2)
    keys, values = (part[:, None].expand(-1, heads, -1, -1) for part in (keys, values))
    mask = None if seen is None else seen[:, None, None]
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2).flatten(2)


class Gate(nn.Module):
    """Gated activation (..., 2 d) -> (..., d): the first half times SiLU of the second."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.silu(gate)


class Residual(nn.Module):
    """Residual connection around a module: x + fn(x, ...)."""

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        return x + self.fn(x, *given)


class LookAtWords(nn.Module):
    """Cross-attention of image tokens to words, with a gated feed-forward layer in parallel."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)
        wide = WIDENING * dim
        self.ff = nn.Sequential(
            nn.Linear(dim, 2 * wide, bias=False), Gate(), nn.Linear(wide, dim, bias=False)
        )

    def forward(self, x: Tensor, words: Tensor, seen: Tensor) -> Tensor:
        y = self.norm(x)
        keys, values = self.to_kv(words).chunk(2, dim=-1)
        return self.to_out(_attend(self.to_q(y), keys, values, self.heads, seen)) + self.ff(y)


class Rotation(nn.Module):
    """Rotary position embedding: elements i and i + d/2 are rotated together by position x inv_freq[i]."""

    inv_freq: Tensor

    def __init__(self, head_dim: int):
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Rotate x (..., N, d), whose positions are 0 to N - 1; the shape stays."""
        angles = torch.outer(torch.arange(x.shape[-2], device=x.device, dtype=x.dtype), self.inv_freq)
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class LookAround(nn.Module):
    """Self-attention of image tokens and, in parallel, a gated feed-forward layer; one fused projection."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads, wide = heads, WIDENING * dim
        self.parts = (heads * head_dim, head_dim, head_dim, 2 * wide)  # queries, key, value, feed-forward
        self.norm = nn.LayerNorm(dim)
        self.rotary_emb = Rotation(head_dim)
        self.fused_attn_ff_proj = nn.Linear(dim, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(heads * head_dim, dim, bias=False)
        self.ff_out = nn.Sequential(Gate(), nn.Linear(wide, dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values, inner = self.fused_attn_ff_proj(self.norm(x)).split(self.parts, dim=-1)
        heads = queries.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        queries = self.rotary_emb(heads).transpose(1, 2).flatten(2)
        return self.attn_out(_attend(queries, self.rotary_emb(keys), values, self.heads)) + self.ff_out(inner)


class CrossModel(nn.Module):
    """Transformer on image tokens (B, N, dim), which attend to words (B, L, dim) under a mask (B, L)."""

    def __init__(self, dim: int, layers: int, heads: int, head_dim: int):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [Residual(LookAtWords(dim, heads, head_dim)), Residual(LookAround(dim, heads, head_dim))]
            )
            for _ in range(layers)
        )

    def forward(self, image: Tensor, words: Tensor, seen: Tensor) -> Tensor:
        for layer in self.layers:
            at_words, around = layer.children()
            image = around(at_words(image, words, seen))
        return image

    @classmethod
    def shaped_like(cls, state: Mapping[str, Tensor]) -> CrossModel:
        """Build the network on the meta device in `state`'s sizes (published: 1024 wide, 4 layers, 16 heads).

        The published heads are 64 wide. Raises KeyError if a tensor that determines a size is missing.
        """
        heads, dim = state["layers.0.0.fn.to_q.weight"].shape
        head_dim = state["layers.0.0.fn.to_kv.weight"].shape[0] // 2
        layers = len({name.split(".")[1] for name in state if name.startswith("layers.")})
        with torch.device("meta"):
            return cls(dim, layers, heads // head_dim, head_dim)


class MPS(ClipTower):
    """MPS: exp(logit_scale) cos(text, image), where the image attends to the words near the condition.

    The image's embedding is its first token after that attention.

    Args:
        weights: file, or a folder or hub id with a model.safetensors; names with or without the prefix
            `mps.`.
        revision: revision of the hub id.
        clip: folder or hub id of the CLIP's config.json, tokenizer and image processor; its weights are not
            read.
        clip_revision: revision of `clip`.
        threshold: share of the largest nearness that a word needs (`attended_words`), 0-1; 0.3 in both
            published evaluations, 0.01 in the published model's own forward pass and in imscore.
        batch: images in one forward pass.

    Raises:
        InputError: the weights are not available or another model's, or the threshold is not in [0, 1).
    """

    def __init__(
        self,
        weights: str,
        revision: str | None = None,
        clip: str = CLIP_H,
        clip_revision: str | None = None,
        threshold: float = 0.3,
        batch: int = BATCH,
    ):
        if not 0 <= threshold < 1:
            raise InputError(
                f"rewards.mps.scorer.threshold={threshold}: a share of the largest nearness, 0 or more and "
                "below 1 (0.3)"
            )
        check_batch(batch, "mps")
        setting, clip_setting = "rewards.mps.weights", "rewards.mps.scorer.clip"
        file = fetch_file(weights, revision, setting, "model.safetensors")
        folder = fetch(clip, clip_revision, clip_setting, *PROCESSOR_FILES)
        parts = _parts(read_state(file, setting), weights, setting)
        model = load_clip(folder, setting, PUBLISHED, parts["model"])
        super().__init__(
            nn.ModuleDict({"model": model, "cross_model": _cross(parts["cross_model"], weights, setting)}),
            ClipInputs(folder, model.config, clip_setting),
            batch,
        )
        self.threshold = threshold

    @property
    def _clip(self) -> Any:
        return self.module["model"]

    def _score(self, pixels: Tensor, tokens: Tensor, row: Tensor) -> Tensor:
        clip = self._clip
        words, whole = self._read(tokens)
        condition, _ = self._read(self.inputs.tokens([CONDITION]).to(self.device))
        seen = attended_words(words, condition[0], self.threshold)
        image = clip.visual_projection(clip.get_image_features(pixel_values=pixels).last_hidden_state)
        image = self.module["cross_model"](image, words[row], seen[row])[:, 0]
        return clip.logit_scale.exp() * F.cosine_similarity(image, whole[row], dim=-1)

    def _read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode tokens (P, L) to projected words (P, L, D) and prompt embeddings (P, D)."""
        clip = self._clip
        read = clip.get_text_features(input_ids=tokens)
        return clip.text_projection(read.last_hidden_state), read.pooler_output


def _parts(state: Mapping[str, Tensor], source: str, setting: str) -> dict[str, dict[str, Tensor]]:
    """Split the checkpoint into its two networks, in float32, with names without their prefix."""
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "cross_model": {}}
    unknown = []
    for name, value in state.items():
        part, _, rest = name.removeprefix("mps.").partition(".")
        if part in parts:
            parts[part][rest] = value.float() if value.is_floating_point() else value
        else:
            unknown.append(name)
    refuse_other_names(
        [f"{part}.*" for part, held in parts.items() if not held], unknown, source, setting, PUBLISHED
    )
    return parts


def _cross(state: Mapping[str, Tensor], source: str, setting: str) -> CrossModel:
    try:
        cross = CrossModel.shaped_like(state)
    except KeyError as error:
        refuse_other_names([str(error).strip("'")], [], source, setting, PUBLISHED)
        raise
    try:
        found = cross.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # shapes that do not match
        raise InputError(
            f"{setting}={source}: {error}; this reward reads the weights of {PUBLISHED}"
        ) from error
    refuse_other_names(found.missing_keys, found.unexpected_keys, source, setting, PUBLISHED)
    return cross
