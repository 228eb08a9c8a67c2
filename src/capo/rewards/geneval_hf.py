"""GenEval's rules on another detector, `geneval-hf`: its figures cannot be compared with published ones.

Ghosh et al., GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment, 2023. The official
scorer runs mmdet's Mask2Former, this one that of transformers; rules and thresholds are the official ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from capo.errors import InputError
from capo.rewards.clip_scores import MODEL_FILES, PROCESSOR_FILES, ClipInputs, load_clip
from capo.rewards.weights import fetch, refuse_other_names, require_type
from capo.runtime.reading import parse_json, read_text

SETTING, CLIP_SETTING = "rewards.geneval-hf.weights", "rewards.geneval-hf.scorer.clip"
METADATA = "rewards.geneval-hf.scorer.metadata"
PUBLISHED = "facebook/mask2former-swin-small-coco-instance"
# GenEval's names of objects where COCO has others
COCO = {"computer keyboard": "keyboard", "computer mouse": "mouse", "tv remote": "remote"}
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)
CONFIDENCE, COUNTING = 0.3, 0.9  # a detection counts above this; of prompts that count objects
MOST = 16  # detections of one class
SHIFT = 0.1  # share of both sizes by which centers must be apart
INSTANCES = 100  # detections of an image, over all classes
GRAY = "#999"


@dataclass(frozen=True)
class Found:
    """A detected object: its mask (H, W) bool, box (left, top, right, bottom) and confidence."""

    mask: np.ndarray
    box: tuple[int, int, int, int]
    confidence: float


class GenEvalHF:
    """Whether an image shows what GenEval's metadata of its prompt ask for: 1.0 or 0.0.

    Args:
        weights: folder or hub id of a Mask2Former for COCO's instances.
        metadata: GenEval's evaluation_metadata.jsonl.
        revision: revision of the hub id.
        clip: folder or hub id of the CLIP that names colors.
        clip_revision: its revision.

    Raises:
        InputError: metadata or weights are not available, or are another model's.
    """

    def __init__(
        self,
        weights: str,
        metadata: str | None = None,
        revision: str | None = None,
        clip: str = "openai/clip-vit-large-patch14",
        clip_revision: str | None = None,
    ):
        from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

        self.rules = read_rules(metadata)
        folder = fetch(weights, revision, SETTING, *MODEL_FILES)
        require_type(folder, SETTING, "mask2former", PUBLISHED)
        kind: Any = Mask2FormerForUniversalSegmentation
        self.processor = Mask2FormerImageProcessorPil.from_pretrained(folder)
        detector, found = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        refuse_other_names(found["missing_keys"], [], weights, SETTING, PUBLISHED)
        self.detector = detector.eval().requires_grad_(False)
        names = {name: number for number, name in self.detector.config.id2label.items()}
        classes = {rule["class"] for record in self.rules.values() for rule in _clauses(record)}
        self.classes = {name: names.get(COCO.get(name, name)) for name in sorted(classes)}
        if unknown := [name for name, number in self.classes.items() if number is None]:
            raise InputError(f"{SETTING}={weights}: it has no class {', '.join(unknown)}; give {PUBLISHED}")
        beside = fetch(clip, clip_revision, CLIP_SETTING, *MODEL_FILES)
        fetch(clip, clip_revision, CLIP_SETTING, *PROCESSOR_FILES)
        self.clip: Any = load_clip(beside, CLIP_SETTING, "openai/clip-vit-large-patch14")
        self.inputs = ClipInputs(beside, self.clip.config, CLIP_SETTING)
        self.device = torch.device("cpu")
        self._colors: dict[str, Tensor] = {}

    def to(self, device: str | torch.device) -> GenEvalHF:
        """Move both networks to `device`."""
        self.device = torch.device(device)
        for module in (self.detector, self.clip):
            nn.Module.to(module, self.device)
        self._colors = {}
        return self

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Return 1.0 or 0.0 of each image, (B,). InputError for a prompt that the metadata lack."""
        with torch.autocast(self.device.type, enabled=False):
            found = [self._judge(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return torch.tensor(found, dtype=torch.float32)

    def _judge(self, image: Image.Image, prompt: str) -> float:
        record = self.rules.get(" ".join(prompt.split()))
        if record is None:
            raise InputError(f"{METADATA}: has no prompt '{prompt}'; give the list that is drawn")
        least = COUNTING if record.get("tag") == "counting" else CONFIDENCE
        objects = self.detect(image, least)
        return float(correct(record, objects, lambda name, found: self.colors(image, name, found)))

    def detect(self, image: Image.Image, least: float) -> dict[str, list[Found]]:
        """Objects of each class of the metadata with more than `least` confidence, the surest first."""
        inputs = self.processor(images=[image.convert("RGB")], return_tensors="pt")
        output = self.detector(pixel_values=inputs["pixel_values"].to(self.device))
        chances = output.class_queries_logits[0].softmax(-1)[:, :-1]  # the last class is none
        best, places = chances.flatten().topk(min(INSTANCES, chances.numel()))
        queries, labels = places // chances.shape[1], places % chances.shape[1]
        wide = F.interpolate(
            output.masks_queries_logits, size=image.size[::-1], mode="bilinear", align_corners=False
        )[0][queries]
        masks = wide > 0
        inside = (wide.sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
        confidence = (best * inside).tolist()
        names = {number: name for name, number in self.classes.items()}
        found: dict[str, list[Found]] = {}
        for place in sorted(range(len(confidence)), key=lambda place: -confidence[place]):
            name, mask = names.get(int(labels[place])), masks[place].cpu().numpy()
            if name is None or confidence[place] <= least or not mask.any():
                continue
            held = found.setdefault(name, [])
            if len(held) < MOST:
                held.append(Found(mask, box_of(mask), confidence[place]))
        return found

    def colors(self, image: Image.Image, name: str, found: Sequence[Found]) -> list[str]:
        """Color of each object: that of the nearest text, on the object alone before gray, cut to its box."""
        if name not in self._colors:
            self._colors[name] = torch.stack([self._text(color, name) for color in COLORS])
        image = image.convert("RGB")
        gray = Image.new("RGB", image.size, GRAY)
        cut = [Image.composite(image, gray, Image.fromarray(held.mask)).crop(held.box) for held in found]
        pixels = self.inputs.pixels(cut).to(self.device)
        seen = F.normalize(self.clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        return [COLORS[number] for number in (seen @ self._colors[name].T).argmax(1).tolist()]

    def _text(self, color: str, name: str) -> Tensor:
        """Direction of a color of an object: the mean over the templates."""
        tokens = self.inputs.tokens([text.format(color=color, name=name) for text in TEMPLATES])
        texts = self.clip.get_text_features(input_ids=tokens.to(self.device)).pooler_output
        return F.normalize(F.normalize(texts, dim=-1).mean(0), dim=-1)


def read_rules(metadata: str | None) -> dict[str, dict[str, Any]]:
    """Metadata of each prompt, by its text with single spaces; InputError if the file cannot be read."""
    if metadata is None:
        raise InputError(f"{METADATA} is not given; give the path of GenEval's evaluation_metadata.jsonl")
    try:
        lines = read_text(Path(metadata).expanduser(), "give the official file").splitlines()
        records = [parse_json(line) for line in lines]
        return {" ".join(record["prompt"].split()): record for record in records}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{METADATA}={metadata}: cannot be read ({error!r}); give the official file"
        ) from error


def _clauses(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*record.get("include", ()), *record.get("exclude", ())]


def correct(record: Mapping[str, Any], objects: Mapping[str, Sequence[Found]], colors: Any) -> bool:
    """Whether detected objects fulfill GenEval's metadata of a prompt.

    Every `include` must hold: as many objects as `count`, of which the surest ones are looked at; their
    `color`; and their `position` relative to those of another clause. No `exclude` may hold.

    Args:
        record: the metadata.
        objects: class -> objects, the surest first.
        colors: `(class, objects) -> [color]`.
    """
    groups: list[Sequence[Found] | None] = []
    right = True
    for clause in record.get("include", ()):
        found = list(objects.get(clause["class"], ()))[: clause["count"]]
        holds = len(found) >= clause["count"]
        if holds and "color" in clause:
            holds = colors(clause["class"], found).count(clause["color"]) >= clause["count"]
        if holds and "position" in clause:
            relation, other = clause["position"]
            targets = groups[other]
            holds = targets is not None and all(
                relation in relations(one.box, target.box) for one in found for target in targets
            )
        groups.append(found if holds else None)
        right = right and holds
    return right and all(
        len(objects.get(clause["class"], ())) < clause["count"] for clause in record.get("exclude", ())
    )


def relations(box: Sequence[int], other: Sequence[int]) -> set[str]:
    """Where `box` lies of `other`: "left of", "right of", "above", "below", or none where they are too near.

    The centers' offset, less SHIFT of both boxes' sizes, is compared with half of its whole length.
    """
    first, second = (np.array(values, dtype=float).reshape(2, 2) for values in (box, other))
    offset = first.mean(0) - second.mean(0)
    sizes = np.ptp(first, axis=0) + np.ptp(second, axis=0)
    rest = np.sign(offset) * np.maximum(np.abs(offset) - SHIFT * sizes, 0)
    if np.abs(rest).max() < 1e-3:
        return set()
    across, down = rest / np.linalg.norm(offset)
    named = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, holds in named.items() if holds}


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Smallest box (left, top, right, bottom) around a mask (H, W); right and bottom are outside."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
