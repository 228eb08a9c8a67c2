"""Categories of prompts, by which figures are told apart."""

from collections.abc import Sequence


def groups_of(names: Sequence[str]) -> dict[str, list[int]]:
    """Numbers of the prompts of each category, in the order of first appearance; "" is in no group."""
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        if name:
            groups.setdefault(name, []).append(number)
    return groups
