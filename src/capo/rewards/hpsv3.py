"""HPSv3: human preference for an image given the prompt, from a vision-language model with a score head.

The head reads the last token of a fixed question. Ma et al., HPSv3: Towards Wide-Spectrum Human Preference
Score, 2025. Conversation, image size and head are those of the published package (hpsv3 1.0.0), which runs
with transformers 4.45.2.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from capo.rewards.clip_scores import BatchScorer, check_batch
from capo.rewards.vqascore import PRECISIONS, check_precision
from capo.rewards.weights import (
    fetch,
    fetch_file,
    load_inputs,
    read_state,
    refuse_other_names,
    require_type,
    taking_weights,
)

if TYPE_CHECKING:
    from transformers import Qwen2VLConfig, Qwen2VLModel

FILE, PUBLISHED = "HPSv3.safetensors", "MizzenAI/HPSv3 (HPSv3.safetensors)"
BASE, KIND = "Qwen/Qwen2-VL-7B-Instruct", "qwen2_vl"
SETTING, BASE_SETTING = "rewards.hpsv3.weights", "rewards.hpsv3.scorer.base"
IMAGE, REWARD, PLACE = "<|image_pad|>", "<|Reward|>", "{prompt}"
BATCH = 8  # images in one forward pass
TOKENS = 256  # approximate tokens of an image: it is resized to the area of TOKENS squares of 28 pixels
UNREAD = ("lm_head.",)  # the language model's head
# Prefix of a published name -> prefix here.
RENAMED = {"visual.": "model.visual.", "model.": "model.language_model.", "rm_head.": "head."}

# Verbatim, including double spaces at line ends: the model was trained with this text. The published text
# continues after the reward's token, but under causal attention that token does not see the rest.
CONVERSATION = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>\n"
    "You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a "
    "overall score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the "
    "worst and 10 being the best. \n\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such "
    "as abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy "
    "to interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual "
    "elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a "
    "sense of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, "
    "violent, or adult material. If such content is present, the image quality and satisfaction score should "
    "be the lowest possible. \n\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, "
    "object) align with the textual description. The subject should match the description in terms of "
    "number, appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how "
    "well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the "
    "image logically fit the scenario described in the prompt. The environment should support and enhance "
    "the subject without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, "
    "accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be "
    "acceptable, but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in "
    "the image. The generated content should not introduce elements that conflict with or distort the "
    "original description.\n"
    "Textual prompt - {prompt}\n\n\n\nPlease provide the overall ratings of this image: <|Reward|>"
)


def asked(prompt: str) -> str:
    """Return the conversation about `prompt` up to the reward's token.

    The special tokens of an image and of the reward are removed from the prompt.
    """
    return CONVERSATION.replace(PLACE, prompt.replace(IMAGE, "").replace(REWARD, ""))


def head(width: int) -> nn.Sequential:
    """Build the head (B, width) -> (B, 2): mean and log standard deviation of a score; keys as published."""
    layers = {
        "0": nn.Linear(width, 1024),
        "1": nn.ReLU(),
        "3": nn.Linear(1024, 16),
        "4": nn.ReLU(),
        "5": nn.Linear(16, 2),
    }
    return nn.Sequential(OrderedDict(layers))


class Asker:
    """Inputs of the model: an image of about 256 tokens, and the question up to the reward's token."""

    def __init__(self, folder: Path):
        self.tokenizer, self.processor = load_inputs(folder, BASE_SETTING)
        self.tokenizer.add_tokens([REWARD], special_tokens=True)
        self.image, self.reward = self.tokenizer.convert_tokens_to_ids([IMAGE, REWARD])
        pixels = TOKENS * (self.processor.patch_size * self.processor.merge_size) ** 2
        self.size = {"shortest_edge": pixels, "longest_edge": pixels}

    def inputs(self, images: Sequence[Image], prompts: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Prepare B conversations, padded on the right, and the position (B,) of the last token of each."""
        found = dict(self.processor(list(images), size=self.size, return_tensors="pt"))
        counts = found["image_grid_thw"].prod(-1) // self.processor.merge_size**2
        rows = [self._tokens(prompt, int(count)) for prompt, count in zip(prompts, counts, strict=True)]
        # The padding follows the last token, which causal attention keeps from seeing it.
        found["input_ids"] = pad_sequence(rows, batch_first=True, padding_value=self.reward)
        # Positions count words and patches alike, the same on all three axes: the published model never gives
        # patches row and column positions.
        found["position_ids"] = torch.arange(found["input_ids"].shape[1]).expand(3, len(rows), -1)
        return found, torch.tensor([len(row) - 1 for row in rows])

    def _tokens(self, prompt: str, count: int) -> Tensor:
        before, after = (
            self.tokenizer(part, add_special_tokens=False).input_ids for part in asked(prompt).split(IMAGE)
        )
        return torch.tensor([*before, *[self.image] * count, *after])


class HPSv3(BatchScorer):
    """HPSv3: the mean of the predicted human score, from a tuned Qwen2-VL-7B.

    Args:
        weights: the file HPSv3.safetensors, or a folder or hub id that holds it, with the published tensor
            names.
        revision: revision of the hub id.
        base: folder or hub id of Qwen2-VL-7B-Instruct's config.json, tokenizer and image processor; its
            weights are not read.
        base_revision: revision of `base`.
        precision: float32, or bfloat16 as in the published code: half the memory, but scores are rounded and
            depend on the batch. The head is in float32 either way.
        batch: images in one forward pass.

    Raises:
        InputError: the precision is unknown, or the weights are not available or another model's.
    """

    def __init__(
        self,
        weights: str,
        revision: str | None = None,
        base: str = BASE,
        base_revision: str | None = None,
        precision: str = "float32",
        batch: int = BATCH,
    ):
        check_batch(batch, "hpsv3")
        check_precision(precision, "rewards.hpsv3.scorer")
        file = fetch_file(weights, revision, SETTING, FILE)
        folder = fetch(base, base_revision, BASE_SETTING, "preprocessor_config.json")
        config, self.asker = _config(folder), Asker(folder)
        state = from_published(read_state(file, SETTING))
        text: Any = config.text_config  # typed as what it may be given as, too
        text.vocab_size = len(self.asker.tokenizer)
        super().__init__(_loaded(config, state, PRECISIONS[precision], weights), batch, PRECISIONS[precision])
        self.module["head"].float()

    def _batch(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        inputs, last = self.asker.inputs(images, prompts)
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self.module["model"].dtype)
        hidden = self.module["model"](**inputs, use_cache=False).last_hidden_state
        return self.module["head"](hidden[torch.arange(len(last)), last].float())[:, 0]


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename published tensors to those of `model` and `head`, without UNREAD; unknown names are kept."""
    start = re.compile("|".join(map(re.escape, RENAMED)))
    return {
        start.sub(lambda found: RENAMED[found[0]], name, count=1) if start.match(name) else name: value
        for name, value in state.items()
        if not name.startswith(UNREAD)
    }


def _config(folder: Path) -> Qwen2VLConfig:
    from transformers import Qwen2VLConfig

    require_type(folder, BASE_SETTING, KIND, f"a Qwen2-VL such as {BASE}")
    return Qwen2VLConfig.from_pretrained(folder)


def _loaded(
    config: Qwen2VLConfig, state: Mapping[str, Tensor], dtype: torch.dtype, source: str
) -> nn.ModuleDict:
    from transformers import Qwen2VLModel

    own, top = (
        {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
        for part in ("model.", "head.")
    )
    text: Any = config.text_config
    last = head(text.hidden_size)
    with taking_weights(source, SETTING, PUBLISHED):
        model, found = _filled(Qwen2VLModel, config, own, dtype)
        others = last.load_state_dict(top, strict=False)
    unknown = [name for name in state if not name.startswith(("model.", "head."))] + [
        f"head.{name}" for name in others.unexpected_keys
    ]
    missing = [*found["missing_keys"], *(f"head.{name}" for name in others.missing_keys)]
    refuse_other_names(missing, [*found["unexpected_keys"], *unknown], source, SETTING, PUBLISHED)
    return nn.ModuleDict({"model": model, "head": last})


def _filled(
    kind: Any, config: Qwen2VLConfig, state: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Qwen2VLModel, dict]:
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
