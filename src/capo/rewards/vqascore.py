"""VQAScore: how probable the answer "Yes" is when CLIP-FlanT5 is asked whether the image shows what the prompt says.

Lin et al., Evaluating Text-to-Visual Generation with Image-to-Text Generation, 2024; template, preprocessing and arithmetic are
those of the authors' own evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from capo.errors import InputError
from capo.rewards.clip_flant5 import ClipFlanT5, holds_tower, load_clip_flant5, t5_config, weight_files
from capo.rewards.clip_scores import MODEL_FILES, PROCESSOR_FILES, ClipScorer, check_batch, clip_config
from capo.rewards.weights import fetch

if TYPE_CHECKING:
    from transformers import T5Config

BEFORE = (  # the image; system message and speaker, verbatim
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers "
    "to the user's questions. USER: "
)
AFTER = "\n{question} ASSISTANT: "
QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
PLACE = "{prompt}"
LENGTH = 2048  # tokens of a question, the image counted as one
PADDED = 128  # T5's table of words is as long as its tokenizer, filled up to a multiple of this
BATCH = 8  # images in one forward pass
TOWER = "openai/clip-vit-large-patch14-336"
WORDS = "google/flan-t5-xxl"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def geometric_mean(log_probs: Tensor) -> Tensor:
    """The published score: exp of minus the mean cross-entropy of the answer's tokens, the end token included. (B, A) -> (B,).

    For "Yes" it is sqrt(P(Yes) P(end | Yes)).
    """
    return log_probs.mean(-1).exp()


def without_end(log_probs: Tensor) -> Tensor:
    """P(Yes), as the CaPO paper's eq. 27 writes it: the probability of the answer without its end token. (B, A) -> (B,)."""
    return log_probs[:, :-1].sum(-1).exp()


FORMS: dict[str, Callable[[Tensor], Tensor]] = {"official": geometric_mean, "yes": without_end}


def squared(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square of that color, as wide as its longer side; an odd pixel goes right or below."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


class Questions:
    """What CLIP-FlanT5 reads: the question's tokens around the image, and the image as normalized pixels."""

    def __init__(self, words: Path, tower: Path, config: T5Config, question: str, settings: tuple[str, str]):
        from transformers import CLIPImageProcessorPil, T5Tokenizer

        try:
            self.tokenizer = T5Tokenizer.from_pretrained(words, padding_side="right")
        except Exception as error:  # the errors of the tokenizers library have no class in common
            raise InputError(
                f"{settings[0]}={words}: no T5 tokenizer ({error}); get the folder again"
            ) from error
        try:
            self.processor = CLIPImageProcessorPil.from_pretrained(tower)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{settings[1]}={tower}: no CLIP image processor ({error}); get the folder again"
            ) from error
        if not 0 <= config.vocab_size - len(self.tokenizer) < PADDED:
            raise InputError(
                f"{settings[0]}={words}: its tokenizer has {len(self.tokenizer)} tokens, the model {config.vocab_size} (up to "
                f"{PADDED - 1} more are usual); give the tokenizer that the model was trained with"
            )
        self.question = question
        self.before = torch.tensor(
            self.tokenizer(BEFORE).input_ids
        )  # ends with the end token, as each piece does
        self.color = tuple(int(255 * part) for part in self.processor.image_mean)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """(P, M): what stands after the image, padded to the longest; what is longer than the model reads is cut off."""
        texts = [AFTER.format(question=self.question.replace(PLACE, prompt)) for prompt in prompts]
        room = LENGTH - len(self.before) - 1
        return self.tokenizer(
            texts, padding=True, truncation=True, max_length=room, return_tensors="pt"
        ).input_ids

    def answer(self, text: str) -> Tensor:
        """(A,): the answer's tokens, the end token last."""
        return torch.tensor(self.tokenizer(text).input_ids)

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, 3, 336, 336): made square with CLIP's mean color, resized (bicubic), normalized."""
        return self.processor(
            [squared(image, self.color) for image in images], return_tensors="pt"
        ).pixel_values


class VQAScore(ClipScorer):
    """How probable `answer` is when the image is shown and `question` asked, 0-1.

    weights: folder or hub id, at `revision`, of a CLIP-FlanT5's config.json and weights, in one file or in several with an index.
    tokenizer: folder or hub id of its T5 tokenizer, at `tokenizer_revision`. tower: likewise of its CLIP's config.json and image
    processor, and of the tower's weights where the checkpoint's index names none of them.
    question: holds {prompt}. form: official or yes (FORMS). precision: float32, or bfloat16 as the published evaluation ran: half
    the memory, scores rounded, and dependent on the batch by that rounding.
    Raises InputError for an unknown form or precision, a question without {prompt}, and weights that are neither here nor to be
    had, or another model's.
    """

    def __init__(
        self,
        weights: str,
        revision: str | None = None,
        tokenizer: str = WORDS,
        tokenizer_revision: str | None = None,
        tower: str = TOWER,
        tower_revision: str | None = None,
        question: str = QUESTION,
        answer: str = "Yes",
        form: str = "official",
        precision: str = "float32",
        batch: int = BATCH,
    ):
        check_question(question, precision, "rewards.vqascore.scorer")
        _check_answer(answer, form)
        check_batch(batch, "vqascore")
        setting = "rewards.vqascore.weights"
        words_setting, tower_setting = (f"rewards.vqascore.scorer.{key}" for key in ("tokenizer", "tower"))
        found = fetch(weights, revision, setting, *MODEL_FILES)
        config = t5_config(found, setting)
        words = fetch(tokenizer, tokenizer_revision, words_setting, "tokenizer.json", "spiece.model")
        inside = holds_tower(found)
        eyes = fetch(tower, tower_revision, tower_setting, *(PROCESSOR_FILES if inside else MODEL_FILES))
        vision = clip_config(eyes, tower_setting).vision_config
        inputs = Questions(words, eyes, config, question, (words_setting, tower_setting))
        files, tower_files = weight_files(found, setting), [] if inside else weight_files(eyes, tower_setting)
        with torch.device("meta"):
            network = ClipFlanT5(config, vision, len(inputs.tokenizer))
        load_clip_flant5(network, files, tower_files, PRECISIONS[precision], setting)
        super().__init__(network, inputs, batch, PRECISIONS[precision])
        self.answer, self.form = inputs.answer(answer), FORMS[form]

    def _score(self, pixels: Tensor, tokens: Tensor, row: Tensor) -> Tensor:
        before, answer = self.inputs.before.to(self.device), self.answer.to(self.device)
        return self.form(self.module(pixels, before, tokens[row], answer))


def check_question(question: str, precision: str, place: str) -> None:
    """InputError for a question without {prompt}, and for a precision that is none of PRECISIONS; `place` is the scorer's key."""
    if PLACE not in question:
        raise InputError(
            f"{place}.question={question}: it does not say where the prompt goes; write {PLACE} there"
        )
    check_precision(precision, place)


def check_precision(precision: str, place: str) -> None:
    """InputError for a precision that is none of PRECISIONS; `place` is the scorer's key."""
    if precision not in PRECISIONS:
        raise InputError(f"{place}.precision={precision}: unknown; choose one of {', '.join(PRECISIONS)}")


def _check_answer(answer: str, form: str) -> None:
    if not answer.strip():
        raise InputError(
            f"rewards.vqascore.scorer.answer={answer!r}: no answer whose probability could be the score; give one, as in Yes"
        )
    if form not in FORMS:
        raise InputError(f"rewards.vqascore.scorer.form={form}: unknown; choose one of {', '.join(FORMS)}")
