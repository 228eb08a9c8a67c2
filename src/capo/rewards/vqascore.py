"""VQAScore: the probability of "Yes" when CLIP-FlanT5 is asked whether the image shows the prompt.

Lin et al., Evaluating Text-to-Visual Generation with Image-to-Text Generation, 2024; template, preprocessing
and arithmetic are those of the authors' own evaluation, t2v_metrics 3.0 (3.1 dropped CLIP-FlanT5). It runs
bfloat16 weights inside bfloat16 autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from capo.errors import InputError
from capo.rewards.clip_flant5 import ClipFlanT5, holds_tower, load_clip_flant5, t5_config, weight_files
from capo.rewards.clip_scores import MODEL_FILES, PROCESSOR_FILES, ClipScorer, check_batch, clip_config
from capo.rewards.weights import fetch

if TYPE_CHECKING:
    from transformers import T5Config

BEFORE = (  # text before the image: system message and speaker, verbatim
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: "
)
AFTER = "\n{question} ASSISTANT: "
QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
PLACE = "{prompt}"
LENGTH = 2048  # tokens of a question, the image counted as one
PADDED = 128  # the length of T5's embedding table is its tokenizer's, rounded up to a multiple of this
BATCH = 8  # images in one forward pass
TOWER = "openai/clip-vit-large-patch14-336"
WORDS = "google/flan-t5-xxl"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def geometric_mean(log_probs: Tensor) -> Tensor:
    """Return the geometric mean (B,) of the probabilities of an answer's tokens, from their logs (B, A).

    This is the published score: exp of minus the mean cross-entropy, end token included. For "Yes" it is
    sqrt(P(Yes) P(end | Yes)).
    """
    return log_probs.mean(-1).exp()


def without_end(log_probs: Tensor) -> Tensor:
    """Return the probability (B,) of an answer without its end token, from logs (B, A): CaPO's eq. 27."""
    return log_probs[:, :-1].sum(-1).exp()


FORMS: dict[str, Callable[[Tensor], Tensor]] = {"official": geometric_mean, "yes": without_end}


def squared(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Pad an image to a square of its longer side with `color`; odd padding is larger right or below."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


class Questions:
    """Inputs of CLIP-FlanT5: the question's tokens around the image, and the image as normalized pixels.

    Args:
        words: folder of the T5 tokenizer.
        tower: folder of the CLIP image processor.
        config: architecture of the T5.
        question: the question, with {prompt} in it.
        settings: configuration keys that gave `words` and `tower`, for messages.
    """

    def __init__(self, words: Path, tower: Path, config: T5Config, question: str, settings: tuple[str, str]):
        from transformers import CLIPImageProcessorPil, T5Tokenizer

        try:
            self.tokenizer = T5Tokenizer.from_pretrained(words, padding_side="right")
        except Exception as error:  # the tokenizers library's errors share no base class
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
                f"{settings[0]}={words}: its tokenizer has {len(self.tokenizer)} tokens, the model "
                f"{config.vocab_size} (up to {PADDED - 1} more are usual); give the tokenizer that the model "
                "was trained with"
            )
        self.question = question
        # The tokenizer ends each piece with the end token, so this one too.
        self.before = torch.tensor(self.tokenizer(BEFORE).input_ids)
        red, green, blue = (int(255 * part) for part in self.processor.image_mean)
        self.color = red, green, blue

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Tokenize the text after the image to (P, M), padded to the longest and truncated at the limit."""
        texts = [AFTER.format(question=self.question.replace(PLACE, prompt)) for prompt in prompts]
        room = LENGTH - len(self.before) - 1
        return self.tokenizer(
            texts, padding=True, truncation=True, max_length=room, return_tensors="pt"
        ).input_ids

    def answer(self, text: str) -> Tensor:
        """Tokenize an answer to (A,), the end token last."""
        return torch.tensor(self.tokenizer(text).input_ids)

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Convert B images to (B, 3, 336, 336): pad to a square with CLIP's mean color, resize, normalize."""
        return self.processor(
            [squared(image, self.color) for image in images], return_tensors="pt"
        ).pixel_values


class VQAScore(ClipScorer):
    """VQAScore: the probability, 0-1, of `answer` to `question` about the image.

    Args:
        weights: folder or hub id of a CLIP-FlanT5's config.json and weights, in one file or several with an
            index.
        revision: revision of the hub id.
        tokenizer: folder or hub id of its T5 tokenizer.
        tokenizer_revision: revision of `tokenizer`.
        tower: folder or hub id of its CLIP's config.json and image processor, and of the vision tower's
            weights if the checkpoint's index lists none.
        tower_revision: revision of `tower`.
        question: the question, with {prompt} in it.
        answer: the answer whose probability is the score.
        form: official (`geometric_mean`) or yes (`without_end`).
        precision: float32, or bfloat16 as in the published evaluation: half the memory, but scores are
            rounded and depend on the batch.
        batch: images in one forward pass.

    Raises:
        InputError: the form or precision is unknown, the question lacks {prompt}, the answer is empty, or the
            weights are not available or another model's.
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
        vision: Any = clip_config(eyes, tower_setting).vision_config  # typed as what it may be given as, too
        inputs = Questions(words, eyes, config, question, (words_setting, tower_setting))
        files, tower_files = weight_files(found, setting), [] if inside else weight_files(eyes, tower_setting)
        with torch.device("meta"):
            network = ClipFlanT5(config, vision, len(inputs.tokenizer))
        load_clip_flant5(network, files, tower_files, PRECISIONS[precision], setting)
        super().__init__(network, inputs, batch, PRECISIONS[precision])
        self.before, self.answer, self.form = inputs.before, inputs.answer(answer), FORMS[form]

    def _score(self, pixels: Tensor, tokens: Tensor, row: Tensor) -> Tensor:
        before, answer = self.before.to(self.device), self.answer.to(self.device)
        return self.form(self.module(pixels, before, tokens[row], answer))


def check_question(question: str, precision: str, place: str) -> None:
    """Raise InputError for a question without {prompt} or unknown precision; `place` is the scorer's key."""
    if PLACE not in question:
        raise InputError(
            f"{place}.question={question}: it does not say where the prompt goes; write {PLACE} there"
        )
    check_precision(precision, place)


def check_precision(precision: str, place: str) -> None:
    """Raise InputError for a precision that is not in PRECISIONS; `place` is the scorer's key."""
    if precision not in PRECISIONS:
        raise InputError(f"{place}.precision={precision}: unknown; choose one of {', '.join(PRECISIONS)}")


def _check_answer(answer: str, form: str) -> None:
    if not answer.strip():
        raise InputError(
            f"rewards.vqascore.scorer.answer={answer!r}: the answer is empty; give one, such as Yes"
        )
    if form not in FORMS:
        raise InputError(f"rewards.vqascore.scorer.form={form}: unknown; choose one of {', '.join(FORMS)}")
