"""Tuned policies on disk: a diffusers pipeline folder or a LoRA file, with a card; readable without capo."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft.utils import get_peft_model_state_dict
from torch import nn

from capo.atomic import write_whole
from capo.backbones.base import Backbone
from capo.backbones.lora import ADAPTER, has_adapter
from capo.backbones.saving import write_pipeline
from capo.errors import InputError
from capo.fingerprints import component_fingerprint, content_fingerprint, safetensors_fingerprint
from capo.folders import fresh_folder
from capo.reference import half_stored

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights` looks for
BASE_FILE = "base.json"  # beside a LoRA file: the weights it belongs to


@dataclass(frozen=True)
class ModelCard:
    """What the README of a policy says about its making.

    win_rates: reward -> {"mean", "low", "high"} in 0-1 against the base; None before any evaluation.
    settings: further facts (beta, steps, ...) by name.
    """

    objective: str
    data: str
    win_rates: Mapping[str, Mapping[str, float]] | None = None
    settings: Mapping[str, object] = field(default_factory=dict)


def export_policy(
    backbone: Backbone, denoiser: nn.Module, folder: str | Path, card: ModelCard, full: bool = False
) -> Path:
    """Writes the policy with its README, in float32; replaces `folder`, never leaves half of one.

    A denoiser with a LoRA adapter becomes the adapter's file and the name of its base, or with `full` a whole
    pipeline with the adapter merged; any other denoiser becomes a whole pipeline in any case.
    """
    folder = Path(folder)
    with fresh_folder(folder) as fresh:
        if has_adapter(denoiser) and not full:
            _write_adapter(backbone, denoiser, fresh)
        else:
            write_pipeline(backbone, fresh, denoiser)
        (fresh / "README.md").write_text(_readme(backbone, fresh, folder.name, card), encoding="utf-8")
    return folder


def write_card(backbone: Backbone, folder: str | Path, card: ModelCard) -> None:
    """Writes the README of an exported policy again, for instance with the win-rates of its evaluation."""
    folder = Path(folder)
    write_whole(folder / "README.md", _readme(backbone, folder, folder.name, card))


def load_policy(backbone: Backbone, folder: str | Path, precision: str = "32-true") -> nn.Module:
    """The denoiser of an exported policy: frozen, on the backbone's device, an adapter unmerged.

    float32, or as `half_stored` keeps it where it is to draw images under that autocast.

    Raises InputError where `folder` holds no policy, one of another shape, or an adapter of another base.
    """
    folder, component = Path(folder), backbone.denoiser_component
    if (folder / LORA_FILE).is_file():
        _check_base(backbone, folder)
        policy = backbone.trainable_copy()
        loader = type(backbone.pipeline)
        state, *alphas, metadata = loader.lora_state_dict(  # alphas: of pipelines with a UNet alone
            str(folder), use_safetensors=True, local_files_only=True, return_lora_metadata=True
        )
        policy.load_lora_adapter(
            state, prefix=component, network_alphas=alphas[0] if alphas else None, metadata=metadata, adapter_name=ADAPTER
        )
    elif (folder / component / "config.json").is_file():
        policy = backbone.trainable_copy()
        _take_weights(policy, folder / component)
    else:
        raise InputError(
            f"policy '{folder.absolute()}': neither '{component}/config.json' nor '{LORA_FILE}' is there; "
            "give the `policy/` folder of a finished run"
        )
    return half_stored(policy, precision).to(backbone.device).eval().requires_grad_(False)


def _take_weights(policy: nn.Module, folder: Path) -> None:
    stored = type(policy).from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    try:
        policy.load_state_dict(stored.state_dict())
    except RuntimeError as error:
        raise InputError(f"policy '{folder.absolute()}' does not fit the model: {error}") from error


def policy_fingerprint(backbone: Backbone, folder: str | Path) -> str:
    """Content hash (64 hex digits) of an exported policy's denoiser, or of its adapter and its base."""
    adapter = Path(folder) / LORA_FILE
    if adapter.is_file():
        return content_fingerprint(
            {"base": backbone.fingerprints["denoiser"], "adapter": safetensors_fingerprint(adapter)}
        )
    return component_fingerprint(folder, [backbone.denoiser_component])


def _write_adapter(backbone: Backbone, denoiser: nn.Module, folder: Path) -> None:
    component = backbone.denoiser_component
    layers = {
        name: tensor.to("cpu", torch.float32).contiguous()
        for name, tensor in get_peft_model_state_dict(denoiser, adapter_name=ADAPTER).items()
    }
    # Without the metadata a loader would take alpha for the rank; a set has another order in every process.
    metadata = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in denoiser.peft_config[ADAPTER].to_dict().items()
    }
    type(backbone.pipeline).save_lora_weights(
        folder, **{f"{component}_lora_layers": layers, f"{component}_lora_adapter_metadata": metadata}
    )
    base = {
        "weights": _base_weights(backbone),
        "revision": backbone.revision,
        "variant": backbone.variant,
        "denoiser": backbone.fingerprints["denoiser"],
    }
    (folder / BASE_FILE).write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")
    if backbone.other_scheduler:
        backbone.pipeline.scheduler.save_pretrained(folder / "scheduler")


def _base_weights(backbone: Backbone) -> str:
    return _from_anywhere(backbone.weights)


def _from_anywhere(source: str) -> str:
    """The hub id, or the folder however the reader's working directory may differ."""
    folder = Path(source).expanduser()
    return str(folder.absolute()) if folder.exists() else source


def _check_base(backbone: Backbone, folder: Path) -> None:
    try:
        base = json.loads((folder / BASE_FILE).read_text(encoding="utf-8"))
    except OSError:
        return  # an adapter from elsewhere does not say: a shape that does not fit is the loader's error
    if base["denoiser"] != backbone.fingerprints["denoiser"]:
        raise InputError(
            f"policy '{folder}' is a LoRA adapter of '{base['weights']}' (denoiser {base['denoiser'][:8]}), "
            f"not of '{backbone.weights}' ({backbone.fingerprints['denoiser'][:8]}); choose its base as model"
        )


def _load_lines(backbone: Backbone, folder: Path, name: str) -> str:
    pipeline = type(backbone.pipeline).__name__
    options = "dtype=torch.float32, use_safetensors=True"
    parts, optional = backbone.pipeline.components, backbone.pipeline._optional_components
    options += "".join(f", {part}=None" for part, module in parts.items() if module is None and part not in optional)
    if not (folder / LORA_FILE).is_file():
        loading = [f'pipe = {pipeline}.from_pretrained("{name}", {options})']
    else:
        named = {"revision": backbone.revision, "variant": backbone.variant}
        options += "".join(f', {key}="{value}"' for key, value in named.items() if value)
        loading = [
            f'pipe = {pipeline}.from_pretrained("{_base_weights(backbone)}", {options})',
            *_replacing_lines(backbone, name),
            f'pipe.load_lora_weights("{name}")',
        ]
    if backbone.call_options:
        told = ", ".join(f"{key}={value!r}" for key, value in backbone.call_options.items())
        loading.append(f"# call it as it was tuned: pipe(prompt, {told})")
    classes = ", ".join(sorted({pipeline, *re.findall(r"= (\w+)\.from_pretrained", "\n".join(loading))}))
    return "\n".join(["import torch", f"from diffusers import {classes}", "", *loading])


def _replacing_lines(backbone: Backbone, name: str) -> list[str]:
    """What the adapter was tuned with in the place of the base's own parts."""
    lines = []
    if backbone.other_scheduler:
        kind = type(backbone.pipeline.scheduler).__name__
        lines.append(f'pipe.scheduler = {kind}.from_pretrained("{name}", subfolder="scheduler")')
    if backbone.other_vae:
        source, revision = backbone.other_vae
        options = "dtype=torch.float32, use_safetensors=True" + (f', revision="{revision}"' if revision else "")
        lines.append(f'pipe.vae = AutoencoderKL.from_pretrained("{_from_anywhere(source)}", {options})')
    return lines


def _win_rate_lines(card: ModelCard) -> list[str]:
    if not card.win_rates:
        return ["Not evaluated."]
    rows = [
        f"| {reward} | {100 * rate['mean']:.1f} | {100 * rate['low']:.1f} - {100 * rate['high']:.1f} |"
        for reward, rate in card.win_rates.items()
    ]
    return [
        "Share of comparisons won against the base on held-out prompts, in %; 50 is the base itself.",
        "",
        "| reward | win-rate | 95 % interval |",
        "|---|---|---|",
        *rows,
    ]


def _readme(backbone: Backbone, folder: Path, name: str, card: ModelCard) -> str:
    weights = _base_weights(backbone)
    front = [
        "---",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        *([] if Path(weights).is_absolute() else [f"base_model: {weights}"]),
        "tags: [text-to-image, preference-alignment]",
        "---",
    ]
    facts = {
        "base": f"{backbone.name}, `{weights}`" + (f" at `{backbone.revision}`" if backbone.revision else ""),
        "base denoiser": f"`{backbone.fingerprints['denoiser'][:8]}`",
        "objective": card.objective,
        "data": card.data,
        "scheduler": type(backbone.pipeline.scheduler).__name__,
        **card.settings,
    }
    return "\n".join(
        [
            *front,
            "",
            f"# {backbone.name}, tuned with {card.objective}",
            "",
            "## Loading it",
            "",
            "In the directory that holds this folder:",
            "",
            "```python",
            _load_lines(backbone, folder, name),
            "```",
            "",
            "## How it was made",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in facts.items()),
            "",
            "## Win-rates against the base",
            "",
            *_win_rate_lines(card),
            "",
        ]
    )
