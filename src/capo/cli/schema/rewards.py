"""The rewards of a configuration: the files of conf/rewards/."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from capo.cli.schema.kinds import Called, Count, Name, Positive, Range, Seconds, Text
from capo.runtime.schema import Said, Section, key


class Reward(Section):
    """A scorer and the facts about it (docs/rewards.md)."""

    scorer: Annotated[Any, Called()] | None = key("what computes the scores: `_target_` and its arguments")
    link: Literal["identity", "log"] = key("log: the score is a probability", "identity")
    scale: Positive = key("factor of a difference of two linked scores in a win-rate", 1.0)
    range: Range | None = key("usual lowest and highest score, for reports", None)
    memory: Positive | None = key("bytes of its weights in float32, for plans", None)
    weights: Text | None = key("a file, a folder or a hub id", None)
    revision: Text | None = key("commit of the hub id; null: the one in the cache, else the latest", None)
    version: Count = key("of the scorer's arithmetic: raised with a change that moves scores", 1)
    license: Text | None = key("license of code and weights, for reports", None)
    needs_prompt: bool = key("false where the scorer sees the image only", True)
    tokens: Count | None = key("tokens of a prompt that it reads, start and end included; null: all", None)
    requires: Annotated[list[Text], Said("a list of names of modules ([torch], say)")] = key(
        "modules that the scorer imports", []
    )
    extra: Text | None = key("the pip extra of this package that installs them", None)
    python: Text | None = key("interpreter of another environment, in which the scorer runs", None)
    isolated: bool = key("true: the scorer runs in a process of its own", False)
    timeout: Seconds = key("seconds after which a scorer in another process is ended", 300.0)


Rewards = Annotated[dict[Name, Reward], Said("rewards by name, {NAME: {scorer: {...}}}")]
HeldOut = Annotated[
    dict[Name, Reward],
    Said(
        "rewards by name: validation.held_out=[looks] on the command line, "
        "rewards@validation.held_out: [looks] in the defaults list of a file"
    ),
]


class RewardsAlone(Section):
    """The configuration of `python -m capo.rewards check`."""

    rewards: Rewards = key("the rewards that are checked", group="rewards")
