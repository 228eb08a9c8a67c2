"""Merge exported policies of one base into another policy folder, by the numbers of `capo.soup`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from capo.backbones.export import policy_remedy
from capo.backbones.family import Family
from capo.backbones.lora import BASE_FILE, LORA_FILE, read_base
from capo.backbones.merging_adapters import merge_adapters
from capo.backbones.model_card import README, soup_readme
from capo.backbones.saving import CHECKPOINT_FILE, INDEX
from capo.errors import DamagedFile, InputError
from capo.runtime.files import check_links, fresh_folder
from capo.runtime.fingerprints import component_fingerprint, safetensors_fingerprint
from capo.runtime.tensor_files import (
    DTYPES,
    Home,
    RowReader,
    spans,
    tensor_entries,
    tensor_homes,
    write_parts,
)
from capo.runtime.weight_files import weight_files
from capo.soup import check_weights, coefficients, combined, inner_products


@dataclass(frozen=True)
class Exported:
    """An exported policy and the base that it names.

    Attributes:
        folder: the policy's folder.
        base: content of its `base.json`: weights, revision, variant, and the fingerprint of the denoiser.
    """

    folder: Path
    base: Mapping[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> Exported:
        """Read what a policy says of itself; InputError for a folder that is no exported policy."""
        folder = Path(folder)
        try:
            base = read_base(folder)
        except (FileNotFoundError, DamagedFile) as error:
            reason = error.reason if isinstance(error, DamagedFile) else "it is not there"
            remedy = policy_remedy(folder)
            if any((folder / name).is_file() for name in (INDEX, LORA_FILE)):
                remedy = (
                    "restore it, or export the policy again: evaluate.py run=DIR validation.strengths=[1]"
                )
            raise InputError(
                f"policies: {folder.absolute() / BASE_FILE}, which names the policy's base, cannot be read "
                f"({reason}); {remedy}"
            ) from error
        return cls(folder, base)

    @property
    def is_adapter(self) -> bool:
        """Whether it is a LoRA adapter, and not a whole pipeline."""
        return (self.folder / LORA_FILE).is_file()

    def fingerprint(self, component: str) -> str:
        """Hash of the tuned weights, 64 hex digits."""
        if self.is_adapter:
            return safetensors_fingerprint(self.folder / LORA_FILE)
        return component_fingerprint(self.folder, [component])


@dataclass(frozen=True)
class Base:
    """The weights that policies were tuned from, on this machine.

    Attributes:
        folder: folder of the base's pipeline, in diffusers' format.
        family: its model family.
        name: hub id or path of the weights.
        revision: commit, branch or tag of a hub id.
        variant: variant of the weight files.
    """

    folder: Path
    family: type[Family]
    name: str
    revision: str | None = None
    variant: str | None = None

    @property
    def component(self) -> str:
        """The pipeline's name of the denoiser."""
        return self.family.denoiser_component

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the denoiser, 64 hex digits."""
        return component_fingerprint(self.folder, [self.component], self.variant)


def merge_policies(
    base: Base,
    policies: Sequence[str | Path],
    folder: str | Path,
    method: str,
    weights: Sequence[float],
    progress: bool = True,
) -> Path:
    """Write the soup of exported policies as a policy folder, replacing `folder` atomically; return it.

    A whole policy is merged part by part of a tensor, with a part of each model in memory; files beside the
    denoiser's weights are the first policy's. Of adapters the products B A are merged, as one adapter of the
    sum of their ranks. The dtype is the first policy's; the arithmetic is float32.

    Args:
        base: the weights that the policies were tuned from.
        policies: folders that `export_policy` wrote, all whole or all adapters.
        folder: where the soup goes.
        method: `slerp` or `linear`.
        weights: one for each policy (`capo.soup`).
        progress: whether to show a progress bar.

    Raises:
        InputError: a folder holds no exported policy, or the policies are of another base, or of different
            kinds or shapes.
        ParameterError: the weights do not fit the method or the number of policies.
    """
    check_weights(method, weights, len(policies))
    models = [Exported.read(policy) for policy in policies]
    _check_alike(base, models)
    check_links(models[0].folder)  # the one of which files are copied
    folder = Path(folder)
    with fresh_folder(folder, INDEX, LORA_FILE) as fresh:
        if models[0].is_adapter:
            folders = [model.folder for model in models]
            merge_adapters(base.folder, base.family, folders, fresh, method, weights)
        else:
            _merge_whole(base, models, fresh, method, weights, progress)
        shutil.copyfile(models[0].folder / BASE_FILE, fresh / BASE_FILE)
        facts = {
            "base": f"`{base.name}`" + (f" at `{base.revision}`" if base.revision else ""),
            "base denoiser": f"`{base.fingerprint[:8]}`",
            "merged by": method,
            **{
                f"policy {number}": f"`{model.folder}` (`{model.fingerprint(base.component)[:8]}`), "
                f"weight {weight:g}"
                for number, (model, weight) in enumerate(zip(models, weights, strict=True), 1)
            },
        }
        (fresh / README).write_text(soup_readme(models[0].folder, folder.name, facts), encoding="utf-8")
    return folder


def _check_alike(base: Base, models: Sequence[Exported]) -> None:
    first = models[0]
    for model in models:
        if model.is_adapter != first.is_adapter:
            whole, adapter = (model, first) if first.is_adapter else (first, model)
            raise InputError(
                f"policies: '{adapter.folder}' is a LoRA adapter and '{whole.folder}' a whole pipeline; "
                "merge policies of one kind (evaluate.py run=DIR validation.strengths=[1] export=full makes "
                "a whole pipeline of a run's adapter)"
            )
        if model.base["denoiser"] != base.fingerprint:
            raise InputError(
                f"policies: '{model.folder}' was tuned from '{model.base['weights']}' (denoiser "
                f"{model.base['denoiser'][:8]}), not from '{base.name}' ({base.fingerprint[:8]}); choose its "
                "base as model, and merge policies of one base only"
            )


def _merge_whole(
    base: Base, models: Sequence[Exported], fresh: Path, method: str, weights: Sequence[float], progress: bool
) -> None:
    """Write the soup of whole policies to the folder `fresh`."""
    part = base.component
    inside = [model.folder / part for model in models]
    homes = [tensor_homes(folder) for folder in inside]
    origin = tensor_homes(base.folder / part, base.variant)
    for folder, home in zip(inside, homes, strict=True):
        if home.keys() != homes[0].keys() or home.keys() - origin.keys():
            odd = sorted((home.keys() ^ homes[0].keys()) | (home.keys() - origin.keys()))
            raise InputError(
                f"policies: '{folder}' and '{inside[0]}' or their base differ in the tensors that they hold, "
                f"for instance '{odd[0]}'; only policies of one architecture can be merged"
            )
    shutil.copytree(models[0].folder, fresh, dirs_exist_ok=True, ignore=_left_out(part))
    total, read = len(homes[0]), RowReader()
    with tqdm(total=total, desc="merging", unit="tensor", disable=not progress, dynamic_ncols=True) as bar:

        def merged(names: Sequence[str]) -> Iterator[Tensor]:
            for name in names:
                yield from _merged_tensor(name, [origin, *homes], method, weights, read)
                bar.update()

        for file in weight_files(inside[0]).values():
            entries = tensor_entries(file)
            write_parts(fresh / part / file.name, entries, merged(list(entries)))


def _left_out(component: str) -> Any:
    """Choose what of a policy's folder is not copied: the tuned weights, and files made from them."""

    def chosen(folder: str, names: list[str]) -> list[str]:
        weights = Path(folder).name == component
        return [
            name
            for name in names
            if name in (README, CHECKPOINT_FILE) or (weights and name.endswith(".safetensors"))
        ]

    return chosen


def _merged_tensor(
    name: str, homes: Sequence[Mapping[str, Home]], method: str, weights: Sequence[float], read: RowReader
) -> Iterator[Tensor]:
    """Yield the parts of one tensor of the soup; `homes` begin with the base's."""
    files, dtypes, shapes = zip(*(home[name] for home in homes), strict=True)
    if len(set(shapes)) > 1:
        raise InputError(
            f"policies: '{name}' has shapes {', '.join(map(str, sorted(set(shapes))))} in base and policies: "
            "only policies of one architecture can be merged"
        )
    if not all(dtype in DTYPES for dtype in dtypes):  # a count or an index: nothing that was tuned
        yield from _equal_parts(name, files, dtypes, shapes[1], read)
        return
    gram = torch.zeros(len(files) - 1, len(files) - 1, dtype=torch.float64)
    for span in spans(shapes[0]):
        base, *tuned = (read(file, name, span) for file in files)
        gram += inner_products(base, tuned)
    if not gram.isfinite().all():
        places = [(file, span) for file in files for span in spans(shapes[0])]
        fault = next(file for file, span in places if not read(file, name, span).isfinite().all())
        raise InputError(
            f"policies: '{name}' has values that are not finite in {fault}; restore it, or leave that policy "
            "out"
        )
    numbers = coefficients(gram, method, weights)
    for span in spans(shapes[0]):
        base, *tuned = (read(file, name, span) for file in files)
        found = combined(base, tuned, numbers).to(DTYPES[dtypes[1]])
        if not found.isfinite().all():
            raise InputError(
                f"weights={list(weights)}: '{name}' of the soup would be beyond what {dtypes[1]}, the first "
                "policy's dtype, can hold; give smaller weights"
            )
        yield found


def _equal_parts(
    name: str, files: Sequence[Path], dtypes: Sequence[str], shape: tuple[int, ...], read: RowReader
) -> Iterator[Tensor]:
    """Yield the parts of a tensor that base and policies have in common; InputError where they differ."""
    for span in spans(shape):
        first, *others = (read(file, name, span) for file in files)
        if not all(o.dtype == first.dtype and torch.equal(_bytes(o), _bytes(first)) for o in others):
            raise InputError(
                f"policies: '{name}' differs, and is stored as {', '.join(sorted(set(dtypes)))} in base and "
                f"policies, of which only {', '.join(DTYPES)} can be merged: export the policies in another "
                "dtype (export_dtype=float32), and take a base in one of them"
            )
        yield first


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
