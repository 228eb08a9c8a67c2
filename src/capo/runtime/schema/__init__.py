"""Typed schemas of what a user writes and of what is read back: one place that compares values with them.

A schema is a pydantic model whose fields say type, range and meaning. Pydantic compares; the messages are
made here from the field's own type, so that each names key, value, what is allowed and a remedy.
"""

from capo.runtime.schema.faults import MISSING, NO_ARGUMENT, NO_KEY, dotted, fault, faults, shown
from capo.runtime.schema.tree import Node, Picked, Section, hints, key, leaves, walked
from capo.runtime.schema.words import Said, words

__all__ = [
    "MISSING",
    "NO_ARGUMENT",
    "NO_KEY",
    "Node",
    "Picked",
    "Said",
    "Section",
    "dotted",
    "fault",
    "faults",
    "hints",
    "key",
    "leaves",
    "shown",
    "walked",
    "words",
]
