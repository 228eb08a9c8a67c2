"""Weights that are not finite: they are named where they would spoil images."""

from __future__ import annotations

from torch import nn

from capo.errors import InputError
from capo.runtime.reading import FOLDER_REMEDY


def check_finite(place: str, module: nn.Module | None, remedy: str = FOLDER_REMEDY) -> None:
    """Raise InputError, with `place`, the tensor and `remedy`, if a weight of a module is not finite."""
    for name, weight in module.named_parameters() if module is not None else ():
        if weight.is_floating_point() and not weight.is_meta and not weight.isfinite().all():
            raise InputError(f"{place}: its tensor {name} holds values that are not finite; {remedy}")
