"""VQAScore from a vision-language model: the probability, in one forward pass, that the answer is Yes.

Lin et al., Evaluating Text-to-Visual Generation with Image-to-Text Generation, 2024, eq. 1, with Qwen3-VL.
The processor is assembled here, because transformers' own needs torchvision (for videos), and with
torchvision it prepares images differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from capo.errors import InputError
from capo.rewards.clip_scores import BatchScorer, check_batch
from capo.rewards.vqascore import PLACE, PRECISIONS, QUESTION, check_question
from capo.rewards.weights import fetch, load_inputs, refuse_other_names, require_type, taking_weights
from capo.runtime.reading import FOLDER_REMEDY, read_json

if TYPE_CHECKING:
    from transformers import BatchFeature, Qwen3VLForConditionalGeneration

PUBLISHED = "Qwen/Qwen3-VL-2B-Instruct"
KIND = "qwen3_vl"
IMAGE = "<|image_pad|>"
YES = ("Yes", "yes", " Yes", " yes")
SETTING = "rewards.vqascore_vlm.weights"
BATCH = 8  # images in one forward pass


class Chat:
    """Inputs of Qwen3-VL: a user's turn with one image and a question, and the start of the answer."""

    def __init__(self, folder: Path, question: str, answers: Sequence[str] = YES):
        self.tokenizer, self.processor = load_inputs(folder, SETTING)
        self.question = question
        self.template = self.tokenizer.chat_template or _template_beside(folder)
        self.image = self.tokenizer.convert_tokens_to_ids(IMAGE)
        if not self.template or self.text("").count(IMAGE) != 1:
            raise InputError(
                f"{SETTING}={folder}: no chat template with one {IMAGE} for an image; get the folder again"
            )
        pieces = [self.tokenizer(word, add_special_tokens=False).input_ids for word in answers]
        self.yes = torch.tensor(sorted({piece[0] for piece in pieces if len(piece) == 1}))
        if not len(self.yes):
            raise InputError(
                f"{SETTING}={folder}: its tokenizer has none of {', '.join(map(repr, answers))} as one "
                f"token; give {PUBLISHED}"
            )

    def text(self, prompt: str) -> str:
        """Return the conversation about `prompt`, with one placeholder for the image."""
        asked = [{"type": "image"}, {"type": "text", "text": self.question.replace(PLACE, prompt)}]
        turns = [{"role": "user", "content": asked}]
        return self.tokenizer.apply_chat_template(
            turns, chat_template=self.template, add_generation_prompt=True, tokenize=False
        )

    def inputs(self, images: Sequence[Image], prompts: Sequence[str]) -> BatchFeature:
        """Prepare B conversations, padded on the left, so that each ends where its answer begins."""
        # The patches of all images are concatenated; image_grid_thw holds the rows and columns of each.
        found = self.processor(list(images), return_tensors="pt")
        counts = found["image_grid_thw"].prod(-1) // self.processor.merge_size**2
        rows = [self._tokens(prompt, int(count)) for prompt, count in zip(prompts, counts, strict=True)]
        ids = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")
        found["attention_mask"] = (ids >= 0).long()
        found["input_ids"] = ids.clamp(min=0)
        found["mm_token_type_ids"] = (ids == self.image).long()
        return found

    def _tokens(self, prompt: str, count: int) -> Tensor:
        before, after = self.text(prompt).split(IMAGE, 1)
        # An image placeholder in the prompt itself must not count as a second one.
        before, after = (
            self.tokenizer(part, add_special_tokens=False).input_ids
            for part in (before, after.replace(IMAGE, ""))
        )
        return torch.tensor([*before, *[self.image] * count, *after])


class VQAScoreVLM(BatchScorer):
    """VQAScore: P(Yes), 0-1, at the answer's first token.

    P(Yes) is the sum of the probabilities of `answers`, as far as each is one token. t2v_metrics asks "Please
    answer Yes or No." and takes that of "Yes" alone (`rewards=vqascore_vlm_t2v_metrics`).

    Args:
        weights: folder or hub id of a Qwen3-VL Instruct model with its tokenizer and image processor.
        revision: revision of the hub id.
        question: the question, with {prompt} in it.
        answers: the ways to say yes.
        precision: float32, or bfloat16: half the memory, but scores are rounded and depend on the batch.
        batch: images in one forward pass.

    Raises:
        InputError: the question lacks {prompt}, `answers` is no list of words, the precision is unknown, or
            the weights are not available or another model's.
    """

    def __init__(
        self,
        weights: str,
        revision: str | None = None,
        question: str = QUESTION,
        answers: Sequence[str] = YES,
        precision: str = "float32",
        batch: int = BATCH,
    ):
        check_question(question, precision, "rewards.vqascore_vlm.scorer")
        if isinstance(answers, str) or not answers or not all(isinstance(word, str) for word in answers):
            raise InputError(
                f"rewards.vqascore_vlm.scorer.answers={answers}: not a list of words; write [Yes], in a yaml "
                '["Yes"]'
            )
        check_batch(batch, "vqascore_vlm")
        folder = fetch(weights, revision, SETTING, "model*.safetensors")
        require_type(folder, SETTING, KIND, f"a Qwen3-VL such as {PUBLISHED}")
        self.chat = Chat(folder, question, answers)
        super().__init__(_load(folder, PRECISIONS[precision]), batch, PRECISIONS[precision])

    def _batch(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        inputs = self.chat.inputs(images, prompts).to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.module.dtype)
        logits = self.module(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
        return logits.float().softmax(-1)[:, self.chat.yes.to(self.device)].sum(-1)


def _template_beside(folder: Path) -> str | None:
    path = folder / "chat_template.json"
    return read_json(path, FOLDER_REMEDY).get("chat_template") if path.is_file() else None


def _load(folder: Path, dtype: torch.dtype) -> Qwen3VLForConditionalGeneration:
    from transformers import AutoModelForImageTextToText

    kind: Any = AutoModelForImageTextToText  # whose types do not know that loading tells what it found
    with taking_weights(folder, SETTING, PUBLISHED):
        model, found = kind.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    refuse_other_names(found["missing_keys"], found["unexpected_keys"], str(folder), SETTING, PUBLISHED)
    return model
