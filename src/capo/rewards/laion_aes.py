"""LAION's aesthetic predictor: how good an image looks, from 1 to 10, by linear layers on CLIP's embedding of it.

The names of the layers are those of the published checkpoint.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F

from capo.errors import InputError
from capo.rewards.clip_scores import BATCH, MODEL_FILES, BatchScorer, ClipInputs, check_batch, load_clip
from capo.rewards.weights import fetch, fetch_file, read_state, refuse_other_names

CLIP_L = "openai/clip-vit-large-patch14"
FILE = "sac+logos+ava1-l14-linearMSE.pth"
# after the embedding (768): the width that each layer gives, and its number, between which dropouts stood in training
LAYERS = {"0": 1024, "2": 128, "4": 64, "6": 16, "7": 1}


def linear_stack(width: int) -> nn.Sequential:
    """(B, width) -> (B, 1), without an activation in between, as published."""
    widths = [width, *LAYERS.values()]
    return nn.Sequential(OrderedDict((name, nn.Linear(*widths[i : i + 2])) for i, name in enumerate(LAYERS)))


class LaionAesthetics(BatchScorer):
    """The rating of CLIP's image embedding of length 1; prompts are not read.

    weights: file, or folder or hub id, at `revision`, that holds sac+logos+ava1-l14-linearMSE.pth.
    clip: folder or hub id, at `clip_revision`, of the CLIP-L/14 that the layers were trained on; its text side is not kept.
    Raises InputError for weights that are neither here nor to be had, or another model's.
    """

    def __init__(
        self,
        weights: str,
        revision: str | None = None,
        clip: str = CLIP_L,
        clip_revision: str | None = None,
        batch: int = BATCH,
    ):
        check_batch(batch, "laion_aes")
        setting, clip_setting = "rewards.laion_aes.weights", "rewards.laion_aes.scorer.clip"
        file = fetch_file(weights, revision, setting, FILE)
        folder = fetch(clip, clip_revision, clip_setting, *MODEL_FILES)
        state = read_state(file, setting)
        model = load_clip(folder, clip_setting, CLIP_L)
        stack = _loaded(linear_stack(model.config.projection_dim), state, weights, setting)
        network = {"image": model.vision_model, "projection": model.visual_projection, "layers": stack}
        super().__init__(nn.ModuleDict(network), batch)
        self.inputs = ClipInputs(folder, model.config, clip_setting)

    def _batch(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        seen = self.module["image"](pixel_values=self.inputs.pixels(images).to(self.device)).pooler_output
        return self.module["layers"](F.normalize(self.module["projection"](seen), dim=-1))[:, 0]


def _loaded(stack: nn.Sequential, state: Mapping[str, Tensor], source: str, setting: str) -> nn.Sequential:
    """`stack` with the weights of `state`, whose names begin with `layers.`."""
    holder = nn.ModuleDict({"layers": stack})
    try:
        found = holder.load_state_dict(state, strict=False)
    except RuntimeError as error:  # sizes
        raise InputError(f"{setting}={source}: {error}; this reward reads {FILE}") from error
    refuse_other_names(found.missing_keys, found.unexpected_keys, source, setting, FILE)
    return stack
