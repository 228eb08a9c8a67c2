"""HPSv2: human preference for an image given the prompt, as the cosine similarity of a tuned CLIP-H.

The published checkpoint has open_clip's tensor names; here it runs as transformers' CLIP, whose arithmetic is
the same.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from capo.rewards.clip_scores import (
    BATCH,
    CLIP_H,
    PROCESSOR_FILES,
    ClipInputs,
    ClipTower,
    check_batch,
    cosines,
    load_clip,
)
from capo.rewards.cropping import MEAN, STD
from capo.rewards.weights import fetch, fetch_file, read_state

if TYPE_CHECKING:
    from transformers import CLIPConfig

FILE, PUBLISHED = "HPS_v2.1_compressed.pt", "xswu/HPSv2 (HPS_v2.1_compressed.pt)"
# (open_clip's name, transformers' name); the first match counts, and groups are kept
RENAMED = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"visual\.(class_embedding)", r"vision_model.embeddings.\1"),
        (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        (r"visual\.conv1\.(.+)", r"vision_model.embeddings.patch_embedding.\1"),
        (r"visual\.ln_pre\.(.+)", r"vision_model.pre_layrnorm.\1"),  # transformers' own spelling
        (r"visual\.ln_post\.(.+)", r"vision_model.post_layernorm.\1"),
        (r"visual\.proj", "visual_projection.weight"),
        (r"visual\.transformer\.resblocks\.(.+)", r"vision_model.encoder.layers.\1"),
        (r"token_embedding\.(.+)", r"text_model.embeddings.token_embedding.\1"),
        (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
        (r"ln_final\.(.+)", r"text_model.final_layer_norm.\1"),
        (r"text_projection", "text_projection.weight"),
        (r"transformer\.resblocks\.(.+)", r"text_model.encoder.layers.\1"),
        (r"(logit_scale)", r"\1"),
    )
]
IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
BLOCK = re.compile(r"(.+\.layers\.\d+)\.(.+)[._](weight|bias)")


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a CLIP's tensors from open_clip's names to transformers', in float32; unknown names are kept.

    The joint matrix of queries, keys and values is split into three, and projections are transposed.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "attn_mask":  # a constant that old versions stored
            continue
        new = next((pattern.sub(other, name) for pattern, other in RENAMED if pattern.fullmatch(name)), name)
        value = (
            value.float().T.contiguous()
            if new.endswith("_projection.weight") and new != name
            else value.float()
        )
        found |= _in_block(new, value)
    return found


def _in_block(name: str, value: Tensor) -> dict[str, Tensor]:
    """Rename a tensor of a transformer block, and split its joint matrix; any other is returned as it is."""
    block = BLOCK.fullmatch(name)
    if block and block[2] == "attn.in_proj":
        parts = zip("qkv", value.chunk(3), strict=True)
        return {f"{block[1]}.self_attn.{part}_proj.{block[3]}": rows.contiguous() for part, rows in parts}
    return {f"{block[1]}.{IN_BLOCK.get(block[2], block[2])}.{block[3]}" if block else name: value}


def fitted(image: Image, side: int, antialias: bool = True) -> Tensor:
    """Fit an image into (3, side, side): longest side to `side` (bicubic), zero padding around it, normalize.

    Resizing works on floats, so that edges may overshoot 0-1. The padding is normalized too, so that it is
    not zero in the result.
    """
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    scale = side / max(pixels.shape[1:])
    size = [max(1, round(length * scale)) for length in pixels.shape[1:]]
    if size != [*pixels.shape[1:]]:
        pixels = F.interpolate(pixels[None], size, mode="bicubic", align_corners=False, antialias=antialias)[
            0
        ]
    down, across = (side - length for length in size)
    pixels = F.pad(pixels, (across // 2, across - across // 2, down // 2, down - down // 2))
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def cleaned(prompt: str) -> str:
    """Mend a prompt's Unicode and resolve its HTML entities twice, as OpenAI's and open_clip's tokenizers do.

    CLIP's tokenizer here joins white space and lowers case, as theirs do after this.
    """
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()


class WholeImages(ClipInputs):
    """Inputs of a CLIP whose images are padded to a square, not cropped, and whose prompts are `cleaned`."""

    def __init__(self, folder: Path, config: CLIPConfig, setting: str, antialias: bool):
        super().__init__(folder, config, setting)
        vision: Any = config.vision_config  # typed as what it may be given as, too
        self.side, self.antialias = vision.image_size, antialias
        cleaned("")  # a missing ftfy is told before any image

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Tokenize P prompts to (P, 77), each `cleaned`."""
        return super().tokens([cleaned(prompt) for prompt in prompts])

    def pixels(self, images: Sequence[Image]) -> Tensor:
        """Convert B images to (B, 3, 224, 224), each by `fitted`."""
        return torch.stack([fitted(image, self.side, self.antialias) for image in images])


class HPSv2(ClipTower):
    """HPSv2: cos(image, text) of the whole, uncropped image.

    Args:
        weights: the file HPS_v2.1_compressed.pt, or a folder or hub id that holds it; tensors have
            open_clip's names, under `state_dict` or at the top level.
        revision: revision of the hub id.
        clip: folder or hub id of the CLIP-H's config.json, tokenizer and image processor; its weights are not
            read.
        clip_revision: revision of `clip`.
        antialias: whether downscaling is antialiased. The published code leaves it to torchvision, whose
            default is true since version 0.17 and was false before; which one the published scores have,
            `python -m capo.rewards check hpsv2 --published FOLDER` tells.
        batch: images in one forward pass.

    Raises:
        InputError: the weights are not available, or are another model's.
    """

    version = 2  # as in its yaml

    def __init__(
        self,
        weights: str,
        revision: str | None = None,
        clip: str = CLIP_H,
        clip_revision: str | None = None,
        antialias: bool = True,
        batch: int = BATCH,
    ):
        check_batch(batch, "hpsv2")
        setting, clip_setting = "rewards.hpsv2.weights", "rewards.hpsv2.scorer.clip"
        file = fetch_file(weights, revision, setting, FILE)
        folder = fetch(clip, clip_revision, clip_setting, *PROCESSOR_FILES)
        state = from_open_clip(read_state(file, setting))
        model = load_clip(folder, setting, PUBLISHED, state)
        super().__init__(model, WholeImages(folder, model.config, clip_setting, antialias), batch)

    def _score(self, pixels: Tensor, tokens: Tensor, row: Tensor) -> Tensor:
        return cosines(self.module, pixels, tokens, row)
