"""T2I-CompBench's BLIP-VQA on transformers' BLIP, `blip-vqa-hf`: not comparable with published figures.

Huang et al., T2I-CompBench: A Comprehensive Benchmark for Open-world Compositional Text-to-image Generation,
2023. Each noun phrase of the prompt is asked as a question, "a red book?", and the score is the product of
P(yes) / (P(yes) + P(no)) at the first token of the answers. Questions and arithmetic are the official ones;
the published weights of transformers are at 384 pixels in place of 480, and phrases are found by a rule
unless they are given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from capo.errors import DamagedFile, InputError
from capo.rewards.clip_scores import BATCH, MODEL_FILES, PROCESSOR_FILES, BatchScorer, check_batch
from capo.rewards.imagereward import ADDED, VOCABULARY, blip_tokenizer
from capo.rewards.weights import fetch, load_network, require_type
from capo.runtime.reading import read_json

SETTING, PHRASES = "rewards.blip-vqa-hf.weights", "rewards.blip-vqa-hf.scorer.phrases"
PUBLISHED = "Salesforce/blip-vqa-base"
LENGTH = 35  # tokens of a question
MOST = 8  # phrases of a prompt that are asked
LEFT_OUT = ("top", "the side", "the left", "the right")  # phrases that the official scorer does not ask
REMOVED = re.compile(r"[.!\"()*#:;~]")  # characters that BLIP's questions lose
WORDS = 50  # of a question
# words between phrases
BETWEEN = re.compile(
    "about|above|across|after|against|along|alongside|among|and|are|around|as|at|atop|be|been|before|behind|"
    "being|below|beneath|beside|between|but|by|during|for|from|has|have|in|inside|into|is|it|like|near|"
    "nearby|next|of|off|on|onto|or|out|over|that|there|they|through|to|toward|towards|under|up|upon|was|were|"
    "when|where|which|while|who|whose|with|within|without|" + r"[.,;:!?()\"]",
    re.IGNORECASE,
)
# those of them that a phrase follows only if it begins with a word of BEGINNING
BEING = re.compile("are|be|been|being|is|was|were", re.IGNORECASE)
# words that begin a phrase
BEGINNING = re.compile("an?|her|his|its|my|our|the|their|these|this|those|your", re.IGNORECASE)
TOKEN = re.compile(r"[^\s.,;:!?()\"]+|[.,;:!?()\"]")


class BlipVQAHF(BatchScorer):
    """Product, 0-1, of a BLIP's probabilities of "yes" for the noun phrases of a prompt; 1 without phrases.

    Args:
        weights: folder or hub id of a BLIP for questions (`BlipForQuestionAnswering`), with its tokenizer and
            image processor.
        revision: revision of the hub id.
        phrases: JSON file, prompt -> list of its phrases, such as those of the official scorer's parser;
            None: `noun_phrases`.
        batch: images in one forward pass.

    Raises:
        InputError: weights or phrases are not available, or are another model's; a prompt has no entry.
    """

    def __init__(
        self, weights: str, revision: str | None = None, phrases: str | None = None, batch: int = BATCH
    ):
        from transformers import BlipConfig, BlipForQuestionAnswering, BlipImageProcessorPil

        check_batch(batch, "blip-vqa-hf")
        self.phrases = None if phrases is None else read_phrases(phrases)
        folder = fetch(weights, revision, SETTING, *MODEL_FILES)
        require_type(folder, SETTING, "blip", PUBLISHED)
        fetch(weights, revision, SETTING, *PROCESSOR_FILES)
        fetch(weights, revision, SETTING, *VOCABULARY)
        config = BlipConfig.from_pretrained(folder)
        text: Any = config.text_config  # typed as what it may be given as, too
        self.tokenizer = blip_tokenizer(folder, text.vocab_size, SETTING, PUBLISHED)
        words: Any = self.tokenizer.convert_tokens_to_ids([*ADDED, "yes", "no"])
        if self.tokenizer.unk_token_id in words:
            raise InputError(f"{SETTING}={folder}: its tokenizer lacks 'yes' or 'no'; give {PUBLISHED}")
        self.start, self.read, self.yes, self.no = words
        self.processor = BlipImageProcessorPil.from_pretrained(folder)
        super().__init__(load_network(BlipForQuestionAnswering, folder, config, SETTING, PUBLISHED), batch)

    def questions(self, prompt: str) -> list[str]:
        """Questions of a prompt, at most MOST; InputError for one that the file of phrases lacks."""
        if self.phrases is None:
            found: Sequence[str] = noun_phrases(prompt)
        elif (key := " ".join(prompt.split())) in self.phrases:
            found = self.phrases[key]
        else:
            raise InputError(f"{PHRASES}: has no prompt '{prompt}'; give a file of the list that is drawn")
        return [question(phrase) for phrase in found if phrase not in LEFT_OUT][:MOST]

    def tokens(self, prompt: str) -> list[list[int]]:
        """Token ids of each question of a prompt, at most LENGTH, which begin as BLIP's reader expects."""
        found = [
            self.tokenizer(asked, truncation=True, max_length=LENGTH).input_ids
            for asked in self.questions(prompt)
        ]
        return [[self.read, *ids[1:]] for ids in found]  # transformers' own processor leaves [CLS] there

    def _batch(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        pixels = self.processor(list(images), return_tensors="pt").pixel_values.to(self.device)
        seen = self.module.vision_model(pixel_values=pixels).last_hidden_state
        scores = [1.0] * len(prompts)
        # Questions of one length at a time: cross-attention of transformers' BLIP ignores the mask of padding
        lengths: dict[int, list[tuple[int, list[int]]]] = {}
        for row, prompt in enumerate(prompts):
            for ids in self.tokens(prompt):
                lengths.setdefault(len(ids), []).append((row, ids))
        for asked in lengths.values():
            for start in range(0, len(asked), self.batch):
                rows, ids = zip(*asked[start : start + self.batch], strict=True)
                rates = self._yes(seen[list(rows)], torch.tensor(ids, device=self.device))
                for row, rate in zip(rows, rates.tolist(), strict=True):
                    scores[row] *= rate
        return torch.tensor(scores)

    def _yes(self, seen: Tensor, ids: Tensor) -> Tensor:
        """P(yes) / (P(yes) + P(no)) (B,) of questions (B, L) about images, whose tokens are (B, T, D)."""
        states = self.module.text_encoder(input_ids=ids, encoder_hidden_states=seen).last_hidden_state
        begun = torch.full((len(ids), 1), self.start, device=self.device)
        logits = self.module.text_decoder(input_ids=begun, encoder_hidden_states=states).logits[:, 0]
        return (logits[:, self.yes] - logits[:, self.no]).sigmoid()


def noun_phrases(prompt: str) -> list[str]:
    """Noun phrases of a prompt by a rule: runs of words between punctuation and words of BETWEEN.

    A word of BEGINNING begins another phrase, and what else follows a word of BEING is in none ("were placed
    on"). Other verbs are not known, so a phrase may end with one.
    """
    found: list[list[str]] = [[]]
    told = False
    for word in TOKEN.findall(prompt):
        if BETWEEN.fullmatch(word):
            told = BEING.fullmatch(word) is not None
            found.append([])
        elif BEGINNING.fullmatch(word):
            told = False
            found.append([word])
        elif not told:
            found[-1].append(word)
    return [" ".join(words) for words in found if not all(map(BEGINNING.fullmatch, words))]


def question(phrase: str) -> str:
    """Question about a phrase as BLIP's code prepares it: lower case, less REMOVED, at most WORDS words."""
    words = REMOVED.sub("", f"{phrase}?".lower()).rstrip(" ").split(" ")
    return " ".join(words[:WORDS])


def read_phrases(path: str) -> dict[str, list[str]]:
    """Read phrases by prompt, whose white space is made single spaces; InputError for any other file."""
    remedy = "give a JSON file of prompts with a list of phrases each"
    try:
        found = read_json(Path(path).expanduser(), remedy)
    except FileNotFoundError as error:
        raise InputError(f"{PHRASES}={path}: no such file; {remedy}") from error
    except DamagedFile as error:
        raise InputError(f"{PHRASES}={path}: {error}") from error
    for prompt, phrases in found.items():
        if not isinstance(phrases, list) or not all(isinstance(phrase, str) for phrase in phrases):
            raise InputError(f"{PHRASES}={path}: '{prompt}' has no list of phrases; {remedy}")
    return {" ".join(prompt.split()): phrases for prompt, phrases in found.items()}
