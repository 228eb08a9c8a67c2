import pytest

from capo.rewards import Reward
from capo.rewards.lengths import cut_prompts, fewest_tokens
from fixtures.configuration import composed_rewards
from fixtures.tiny_pipelines import tiny_tokenizer


def unused(images, prompts):
    pytest.fail("it is not asked")


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("", 0),
        ("a red square", 3),
        ("don't", 2),  # CLIP: don, 't
        ("a fox, 'red'!?", 5),  # a fox , 'red '!?
        ("2024", 1),  # four for CLIP, one for BERT
        ("cafe\u0301 au lait", 3),  # the accent belongs to its letter
        ("snake_case", 3),
    ],
)
def test_pieces_of_a_prompt_are_counted_between_start_and_end(prompt, pieces):
    assert fewest_tokens(prompt) == 2 + pieces


@pytest.mark.parametrize(
    "prompt", ["a red square", "don't", "the blue circle, and 'a' green triangle!?", "x2 y_3"]
)
def test_clips_tokenizer_gives_no_fewer(prompt):
    assert fewest_tokens(prompt) <= len(tiny_tokenizer()(prompt, truncation=False).input_ids)


def test_prompts_that_are_longer_are_counted_for_each_reward():
    """With start and end, 3 words are 5 tokens: as many as fit; 4 are one more."""
    rewards = [Reward("short", unused, tokens=5), Reward("long", unused, tokens=6), Reward("all", unused)]
    assert cut_prompts(rewards, ["a b c", "a b c d", "a b c d e"]) == {
        "short": {"tokens": 5, "prompts": 2},
        "long": {"tokens": 6, "prompts": 1},
    }
    assert cut_prompts(rewards, ["a b c"]) == {}


def test_the_yamls_say_what_clip_and_imagereward_read():
    names = ("pickscore", "mps", "hpsv2", "clipscore", "imagereward", "laion_aes")
    found = {reward.name: reward.tokens for reward in composed_rewards(f"rewards=[{','.join(names)}]")}
    assert found == dict.fromkeys(names[:4], 77) | {"imagereward": 35, "laion_aes": None}
