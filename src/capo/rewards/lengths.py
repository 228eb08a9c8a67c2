"""Prompts that are longer than what a reward reads of them."""

import re
import unicodedata
from collections.abc import Sequence

from capo.rewards.reward import Reward

# Neither CLIP's nor BERT's tokenizer has a token across two of these pieces.
PIECE = re.compile(r"'?[^\W_]+|(?:[^\w\s]|_)+")


def fewest_tokens(prompt: str) -> int:
    """Return a lower bound on a prompt's tokens for CLIP and BERT, start and end included."""
    return 2 + len(PIECE.findall(unicodedata.normalize("NFC", prompt)))


def cut_prompts(rewards: Sequence[Reward], prompts: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return reward -> tokens that it reads, and how many prompts are certainly longer, where some are."""
    lengths = [fewest_tokens(prompt) for prompt in prompts]
    found = {
        reward.name: {"tokens": reward.tokens, "prompts": sum(length > reward.tokens for length in lengths)}
        for reward in rewards
        if reward.tokens
    }
    return {name: entry for name, entry in found.items() if entry["prompts"]}
