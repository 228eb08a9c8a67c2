"""The README of an exported policy: how to load it, how it was tuned, and its win-rates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from capo.backbones.base import Backbone
from capo.backbones.guidance_lines import FLOAT32, absolute, guidance_lines, loading_options, source_name
from capo.backbones.lora import COMFYUI_FILE, LORA_FILE
from capo.backbones.sampling import POLICY
from capo.backbones.saving import CHECKPOINT_FILE
from capo.errors import InputError
from capo.runtime.files import write_whole
from capo.runtime.reading import read_text

UNCONDITIONAL = "unconditional prediction under guidance"
NEGATIVE = "negative model"  # name of the fact that a policy was trained for the opposite
README = "README.md"
NEGATIVE_LINES = [
    "Sampled by itself, as these lines do, it draws what is disliked. It is meant to make the unconditional",
    "prediction of another policy or of the base, which guidance then leads away from it:",
    "`sampling.unconditional` is the key that takes this folder.",
    "",
]
MADE, RATES = "## How it was made", "## Win-rates against the base"


@dataclass(frozen=True)
class ModelCard:
    """Facts about a policy for its README.

    Attributes:
        objective: name of the training objective.
        data: description of the training data.
        win_rates: reward -> {"mean", "low", "high"}, each 0-1, against the base; None before any evaluation.
        settings: further facts (beta, steps, ...) by name.
        unconditional: source of the unconditional prediction that the policy is sampled with
            (`SamplerSettings.unconditional`).
    """

    objective: str
    data: str
    win_rates: Mapping[str, Mapping[str, float]] | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    unconditional: str = POLICY


def write_card(backbone: Backbone, folder: str | Path, card: ModelCard) -> None:
    """Rewrite the README of an exported policy, for instance with the win-rates of its evaluation."""
    folder = Path(folder)
    write_whole(folder / README, readme(backbone, folder, folder.name, card))


def write_win_rates(folder: str | Path, win_rates: Mapping[str, Mapping[str, float]]) -> None:
    """Put win-rates (`ModelCard.win_rates`) into the README of an exported policy, in place of its own."""
    file = Path(folder) / README
    head, _, _ = read_text(file, "restore it, or export the policy again").partition(RATES)
    write_whole(file, head + "\n".join(_win_rate_lines(win_rates)))


def base_weights(backbone: Backbone) -> str:
    """Return the hub id of the base's weights, or the absolute path of their folder."""
    return absolute(backbone.weights)


def _load_lines(backbone: Backbone, folder: Path, name: str, unconditional: str) -> str:
    pipeline = type(backbone.pipeline).__name__
    options = loading_options(backbone, folder)
    parts, optional = backbone.pipeline.components, backbone.pipeline._optional_components
    options += "".join(
        f", {part}=None" for part, module in parts.items() if module is None and part not in optional
    )
    if not (folder / LORA_FILE).is_file():
        loading = [f'pipe = {pipeline}.from_pretrained("{name}", {options})']
    else:
        named = {"revision": backbone.revision, "variant": backbone.variant}
        options += "".join(f', {key}="{value}"' for key, value in named.items() if value)
        loading = [
            f'pipe = {pipeline}.from_pretrained("{base_weights(backbone)}", {options})',
            *_replacing_lines(backbone, name),
            f'pipe.load_lora_weights("{name}")',
        ]
    if backbone.call_options:
        told = ", ".join(f"{key}={value!r}" for key, value in backbone.call_options.items())
        loading.append(f"# call it as it was tuned: pipe(prompt, {told})")
    loading += guidance_lines(backbone, folder, unconditional)
    classes = ", ".join(sorted({pipeline, *re.findall(r"= (\w+)\.from_pretrained", "\n".join(loading))}))
    return "\n".join(["import torch", f"from diffusers import {classes}", "", *loading])


def _replacing_lines(backbone: Backbone, name: str) -> list[str]:
    """Return the lines that load the scheduler and VAE that replaced the base's own during tuning."""
    lines = []
    if backbone.other_scheduler:
        kind = type(backbone.pipeline.scheduler).__name__
        lines.append(f'pipe.scheduler = {kind}.from_pretrained("{name}", subfolder="scheduler")')
    if backbone.other_vae:
        source, revision = backbone.other_vae
        options = FLOAT32 + (f', revision="{revision}"' if revision else "")
        lines.append(f'pipe.vae = AutoencoderKL.from_pretrained("{absolute(source)}", {options})')
    return lines


def _elsewhere_lines(backbone: Backbone, folder: Path) -> list[str]:
    """Return the section on other programs than diffusers; empty if no file is for them."""
    sentences = []
    if (folder / COMFYUI_FILE).is_file():
        sentences.append(
            f"Put `{COMFYUI_FILE}`, which holds the same adapter, into {backbone.lora_folders}, "
            "under a name of your choice, and load it at strength 1 on top of the base."
        )
    if (folder / CHECKPOINT_FILE).is_file():
        sentences.append(
            f"`{CHECKPOINT_FILE}` is the whole tuned model in float16: put it, under a name of your choice, "
            "into ComfyUI's `models/checkpoints` or AUTOMATIC1111's `models/Stable-diffusion`."
        )
    return ["## In other programs", "", *sentences, ""] if sentences else []


def _win_rate_lines(win_rates: Mapping[str, Mapping[str, float]] | None, negative: bool = False) -> list[str]:
    title = [RATES, ""]
    if not win_rates:
        return [*title, "Not evaluated.", ""]
    rows = [
        f"| {reward} | {100 * rate['mean']:.1f} | {100 * rate['low']:.1f} - {100 * rate['high']:.1f} |"
        for reward, rate in win_rates.items()
    ]
    sampled = "by the base with this unconditional prediction " if negative else ""
    return [
        *title,
        f"Share of comparisons won {sampled}against the base on held-out prompts, in %; "
        "50 is the base itself.",
        "",
        "| reward | win-rate | 95 % interval |",
        "|---|---|---|",
        *rows,
        "",
    ]


def readme(backbone: Backbone, folder: Path, name: str, card: ModelCard) -> str:
    """Return the README, in Markdown, of the policy in `folder`; `name` is the folder's final one."""
    weights, negative = base_weights(backbone), NEGATIVE in card.settings
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
        **({} if card.unconditional == POLICY else {UNCONDITIONAL: source_name(card.unconditional)}),
        **card.settings,
    }
    head = [
        *front,
        "",
        f"# {backbone.name}, tuned with {card.objective}" + (f": a {NEGATIVE}" if negative else ""),
        "",
        "## Loading it",
        "",
        "In the directory that holds this folder:",
        "",
        "```python",
        _load_lines(backbone, folder, name, card.unconditional),
        "```",
        "",
        *(NEGATIVE_LINES if negative else ()),
        *_elsewhere_lines(backbone, folder),
    ]
    return "\n".join([*head, *_made_lines(facts), *_win_rate_lines(card.win_rates, negative)])


def _made_lines(facts: Mapping[str, object]) -> list[str]:
    """Return the section with a table of facts."""
    return [MADE, "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), ""]


def soup_readme(policy: Path, name: str, facts: Mapping[str, object]) -> str:
    """Return the README of a soup, in Markdown, from that of its first policy, which is loaded likewise.

    Args:
        policy: folder of the first policy.
        name: final name of the soup's folder.
        facts: how the soup was made.

    Raises:
        InputError: the policy has no README of this package.
    """
    try:
        head, _, made = read_text(policy / README, "export the policy again").partition(f"{MADE}\n")
    except (OSError, ValueError):  # ValueError: it is not text
        head = made = ""
    loaded = re.search(r'load_lora_weights\("(.+?)"\)', head) if made else None
    loaded = loaded or (re.search(r'from_pretrained\("(.+?)"', head) if made else None)
    if not loaded:
        raise InputError(
            f"policies: {policy / README} does not say how the policy is loaded; give the `policy/` folders "
            "of finished runs with their README"
        )
    head = head.replace(f'("{loaded[1]}"', f'("{name}"')
    head = re.sub(r"^(# .*), tuned with .*$", r"\1, a soup of tuned policies", head, flags=re.MULTILINE)
    return "\n".join([head + "\n".join(_made_lines(facts)), *_win_rate_lines(None)])
