"""Rewards from the CLIP similarity of an image and its prompt: PickScore and the plain CLIP score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F

from capo.errors import InputError
from capo.rewards.weights import fetch, load_network, require_type

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel

MODEL_FILES = ("model*.safetensors", "pytorch_model*.bin")  # torch reads the second as tensors only
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
BATCH = 32  # images in one forward pass


class ClipInputs:
    """Inputs of a CLIP, by its published processor: token ids of prompts and normalized pixels of images."""

    def __init__(self, folder: Path, config: CLIPConfig, setting: str):
        from transformers import CLIPImageProcessorPil, CLIPTokenizer  # PIL: torchvision's pixels differ

        try:
            self.tokenizer = CLIPTokenizer.from_pretrained(folder)
            self.processor = CLIPImageProcessorPil.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{setting}={folder}: no CLIP tokenizer and image processor ({error}); get the folder again"
            ) from error
        text: Any = config.text_config  # typed as what it may be given as, too
        self.length = text.max_position_embeddings  # 77
        if len(self.tokenizer) != text.vocab_size:
            raise InputError(
                f"{setting}={folder}: its tokenizer has {len(self.tokenizer)} tokens, the model "
                f"{text.vocab_size}; give the processor that the model was trained with"
            )

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Tokenize P prompts to (P, 77): truncated before the end token where longer, else padded."""
        return self.tokenizer(
            list(prompts), max_length=self.length, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids

    def pixels(self, images: Sequence[Image]) -> Tensor:
        """Convert B images to (B, 3, 224, 224): shortest side to 224 (bicubic), center crop, normalize."""
        return self.processor(list(images), return_tensors="pt").pixel_values


class Inputs(Protocol):
    """Preprocessing of prompts and images to a network's inputs."""

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Tokenize P prompts to (P, L)."""
        ...

    def pixels(self, images: Sequence[Image]) -> Tensor:
        """Convert B images to normalized pixels (B, 3, H, W)."""
        ...


class BatchScorer(ABC):
    """Scorer in batches of `batch`, on one device and in one precision, whatever the caller's autocast."""

    def __init__(self, module: nn.Module, batch: int = BATCH, precision: torch.dtype = torch.float32):
        # each scorer knows the parts of its own network, which torch types as tensors or modules
        self.module: Any = module.to(precision).eval().requires_grad_(False)
        self.batch, self.device = batch, torch.device("cpu")

    def to(self, device: str | torch.device) -> BatchScorer:
        """Move the network to `device`."""
        self.device = torch.device(device)
        self.module.to(self.device)
        return self

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Return raw scores (B,), float32 on the CPU; each depends on its own image and prompt alone."""
        starts = range(0, len(images), self.batch)
        with torch.autocast(self.device.type, enabled=False):  # a caller's precision must not change a score
            parts = [self._batch(images[i : i + self.batch], prompts[i : i + self.batch]) for i in starts]
        return torch.cat([torch.empty(0), *(part.float().cpu() for part in parts)])

    @abstractmethod
    def _batch(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Return scores (B,) from one forward pass."""


class ClipScorer(BatchScorer):
    """BatchScorer that encodes prompts separately from images, so that a repeated prompt is encoded once."""

    def __init__(
        self, module: nn.Module, inputs: Inputs, batch: int = BATCH, precision: torch.dtype = torch.float32
    ):
        super().__init__(module, batch, precision)
        self.inputs = inputs

    def _batch(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        row = torch.tensor([rows[prompt] for prompt in prompts], device=self.device)
        return self._score(
            self.inputs.pixels(images).to(self.device), self.inputs.tokens(list(rows)).to(self.device), row
        )

    @abstractmethod
    def _score(self, pixels: Tensor, tokens: Tensor, row: Tensor) -> Tensor:
        """Return scores (B,) for pixels (B, 3, H, W); image i has prompt tokens[row[i]], tokens (P, 77)."""


class ImageTower(BatchScorer):
    """BatchScorer whose image encoder can be used alone, for distances between images."""

    @torch.inference_mode()
    def features(self, images: Sequence[Image]) -> Tensor:
        """Return the image encoder's vectors (B, D), float32 on the CPU; no prompt is read."""
        starts = range(0, len(images), self.batch)
        with torch.autocast(self.device.type, enabled=False):
            return torch.cat([self._seen(images[i : i + self.batch]).float().cpu() for i in starts])

    @abstractmethod
    def _seen(self, images: Sequence[Image]) -> Tensor:
        """Return vectors (B, D) from one forward pass."""


class ClipTower(ClipScorer, ImageTower):
    """ClipScorer whose vectors of images are the embeddings of its CLIP."""

    def _seen(self, images: Sequence[Image]) -> Tensor:
        pixels = self.inputs.pixels(images).to(self.device)
        return self._clip.get_image_features(pixel_values=pixels).pooler_output

    @property
    def _clip(self) -> Any:
        return self.module


class PickScore(ClipTower):
    """PickScore: exp(logit_scale) cos(image, text), from a CLIP-H that was tuned on human choices.

    Args:
        weights: folder or hub id of the CLIP.
        revision: revision of the hub id.
        processor: folder or hub id of the tokenizer and image processor; null: those beside the weights.
        processor_revision: revision of `processor`.
        batch: images in one forward pass.

    Raises:
        InputError: the weights are not available, or are another model's.
    """

    name, published = "pickscore", "yuvalkirstain/PickScore_v1"

    def __init__(
        self,
        weights: str,
        revision: str | None = None,
        processor: str | None = None,
        processor_revision: str | None = None,
        batch: int = BATCH,
    ):
        check_batch(batch, self.name)
        setting = f"rewards.{self.name}.weights"
        folder, inputs_setting = (
            fetch(weights, revision, setting, *MODEL_FILES),
            f"rewards.{self.name}.scorer.processor",
        )
        beside = (
            fetch(processor, processor_revision, inputs_setting, *PROCESSOR_FILES) if processor else folder
        )
        model = load_clip(folder, setting, self.published)
        super().__init__(model, ClipInputs(beside, model.config, inputs_setting), batch)

    def _score(self, pixels: Tensor, tokens: Tensor, row: Tensor) -> Tensor:
        return self._factor() * cosines(self.module, pixels, tokens, row)

    def _factor(self) -> Tensor | float:
        return self.module.logit_scale.exp()


class ClipScore(PickScore):
    """CLIP score: 100 cos(image, text), from a CLIP as it was pretrained. Arguments as for PickScore."""

    name, published = "clipscore", "openai/clip-vit-large-patch14"

    def _factor(self) -> float:
        return 100.0


def cosines(clip: Any, pixels: Tensor, tokens: Tensor, row: Tensor) -> Tensor:
    """Return cos(image, text) (B,) for pixels (B, 3, H, W); image i has the text tokens[row[i]] of (P, L)."""
    image = clip.get_image_features(pixel_values=pixels).pooler_output
    text = clip.get_text_features(input_ids=tokens).pooler_output
    return F.cosine_similarity(image, text[row], dim=-1)


def check_batch(batch: int, name: str) -> None:
    """Raise InputError if `batch`, the images in one forward pass of reward `name`, is below 1."""
    if batch < 1:
        raise InputError(f"rewards.{name}.scorer.batch={batch}: images in one forward pass must be 1 or more")


def clip_config(folder: Path, setting: str) -> CLIPConfig:
    """Read the CLIP architecture in a folder's config.json; raise InputError if it is another model's."""
    from transformers import CLIPConfig

    require_type(folder, setting, "clip", "a CLIP")
    return CLIPConfig.from_pretrained(folder)


def load_clip(
    folder: Path, setting: str, published: str, state: dict[str, Tensor] | None = None
) -> CLIPModel:
    """Load the CLIP of a folder in float32; with `state`, load these weights into the folder's architecture.

    Raises InputError for weights that do not fit; the message names `published`, which fit.
    """
    from transformers import CLIPModel

    return load_network(CLIPModel, folder, clip_config(folder, setting), setting, published, state)
