"""LAION's aesthetic predictor: an image's visual quality, 1 to 10, from linear layers on its CLIP embedding.

The names of the layers are those of the published checkpoint.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F

from capo.errors import InputError
from capo.rewards.clip_scores import BATCH, MODEL_FILES, ImageTower, check_batch, load_clip
from capo.rewards.cropping import cropped
from capo.rewards.weights import fetch, fetch_file, read_state, refuse_other_names
from capo.runtime.fingerprints import file_digest

CLIP_L = "openai/clip-vit-large-patch14"
FILE = "sac+logos+ava1-l14-linearMSE.pth"
# Index of each layer -> its output width, after the embedding (768). The indices left out were dropouts in
# training.
LAYERS = {"0": 1024, "2": 128, "4": 64, "6": 16, "7": 1}


def linear_stack(width: int) -> nn.Sequential:
    """Build the linear layers (B, width) -> (B, 1), without activations in between, as published."""
    widths = [width, *LAYERS.values()]
    return nn.Sequential(
        OrderedDict((name, nn.Linear(widths[i], widths[i + 1])) for i, name in enumerate(LAYERS))
    )


class LaionAesthetics(ImageTower):
    """LAION's aesthetic rating from the image's CLIP embedding, normalized to length 1; prompts are not read.

    Args:
        weights: the file sac+logos+ava1-l14-linearMSE.pth, or a folder or hub id that holds it.
        revision: revision of the hub id.
        clip: folder or hub id of the CLIP-L/14 that the layers were trained on; its text encoder is not kept.
        clip_revision: revision of `clip`.
        sha256: digest that the file must have; null: any.
        batch: images in one forward pass.

    Raises:
        InputError: the weights are not available, are another model's, or have another digest.
    """

    version = 2  # as in its yaml

    def __init__(
        self,
        weights: str,
        revision: str | None = None,
        clip: str = CLIP_L,
        clip_revision: str | None = None,
        sha256: str | None = None,
        batch: int = BATCH,
    ):
        check_batch(batch, "laion_aes")
        setting, clip_setting = "rewards.laion_aes.weights", "rewards.laion_aes.scorer.clip"
        file = fetch_file(weights, revision, setting, FILE)
        _check_digest(file, sha256, setting)
        folder = fetch(clip, clip_revision, clip_setting, *MODEL_FILES)
        state = read_state(file, setting)
        model = load_clip(folder, clip_setting, CLIP_L)
        stack = _loaded(linear_stack(model.visual_projection.out_features), state, weights, setting)
        network = {"image": model.vision_model, "projection": model.visual_projection, "layers": stack}
        super().__init__(nn.ModuleDict(network), batch)
        vision: Any = model.vision_model.config  # typed as what it may be given as, too
        self.crop: int = vision.image_size

    def _batch(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        return self.module["layers"](F.normalize(self._seen(images), dim=-1))[:, 0]

    def _seen(self, images: Sequence[Image]) -> Tensor:
        pixels = torch.stack([cropped(image, self.crop) for image in images]).to(self.device)
        return self.module["projection"](self.module["image"](pixel_values=pixels).pooler_output)


def _check_digest(file: Path, wanted: str | None, setting: str) -> None:
    if wanted and (found := file_digest(file)) != wanted:
        raise InputError(
            f"{setting}={file}: its sha256 is {found}, the published file's is {wanted}; get {FILE} again, "
            "or set rewards.laion_aes.scorer.sha256=null for a conversion that you trust"
        )


def _loaded(stack: nn.Sequential, state: Mapping[str, Tensor], source: str, setting: str) -> nn.Sequential:
    """Load `state`, whose names begin with `layers.`, into `stack` and return it."""
    holder = nn.ModuleDict({"layers": stack})
    try:
        found = holder.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes that do not match
        raise InputError(f"{setting}={source}: {error}; this reward reads {FILE}") from error
    refuse_other_names(found.missing_keys, found.unexpected_keys, source, setting, FILE)
    return stack
