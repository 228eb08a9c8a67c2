"""Lines of a model card that sample a policy with another network's unconditional prediction.

They need diffusers alone, and reproduce what `capo.backbones.sampling` samples with `unconditional`.
"""

from __future__ import annotations

from pathlib import Path

from capo.backbones.base import Backbone
from capo.backbones.lora import LORA_FILE
from capo.backbones.sampling import BASE, POLICY
from capo.backbones.saving import stored_dtype

FLOAT32 = "dtype=torch.float32, use_safetensors=True"
ADAPTER_OFF = """
def negative(*args, **options):  # the base is the policy without its adapter
    pipe.{part}.disable_adapters()
    try:
        return tuned(*args, **options)
    finally:
        pipe.{part}.enable_adapters()

"""
SPLIT = """
def half(value, number):  # of both branches in one batch: 0 without the prompt, 1 with it
    if isinstance(value, dict):
        return {{key: half(one, number) for key, one in value.items()}}
    return value.chunk(2)[number] if torch.is_tensor(value) and value.ndim else value


def guided(*args, **options):
    if not pipe.do_classifier_free_guidance:
        return tuned(*args, **options)
    without, prompted = ([half(one, number) for one in args] for number in (0, 1))
    return (
        torch.cat(
            [negative(*without, **half(options, 0))[0], tuned(*prompted, **half(options, 1))[0]]
        ),
    )


pipe.{part}.forward = guided"""


def source_name(source: str) -> str:
    """Say whose unconditional prediction `source` is, for a table of facts."""
    return {POLICY: "the policy's own", BASE: "the base's"}.get(source, f"that of `{absolute(source)}`")


def absolute(source: str) -> str:
    """Return a hub id as it is, and a folder as an absolute path, which works from any working directory."""
    folder = Path(source).expanduser()
    return str(folder.absolute()) if folder.exists() else source


def guidance_lines(backbone: Backbone, folder: Path, source: str) -> list[str]:
    """Return Python lines that follow those that load the policy in `folder` as `pipe`; none for `policy`."""
    if source == POLICY:
        return []
    part = backbone.denoiser_component
    lines = [
        "",
        "# Under guidance the unconditional prediction is that of "
        + ("the base." if source == BASE else "another policy."),
        f"tuned = pipe.{part}.forward",
    ]
    if source == BASE and (folder / LORA_FILE).is_file():
        lines += ["", *ADAPTER_OFF.format(part=part).splitlines()]
    else:
        lines += [
            *_network(backbone, folder, source),
            "# on a GPU, move it too: negative.to(pipe.device)",
            "",
        ]
    return lines + SPLIT.format(part=part).splitlines()


def loading_options(backbone: Backbone, folder: Path) -> str:
    """Return the options that load the policy in `folder`: the dtype of its weights; of adapters, float32."""
    if (folder / LORA_FILE).is_file():
        return FLOAT32
    return FLOAT32.replace("float32", stored_dtype(folder / backbone.denoiser_component))


def _network(backbone: Backbone, folder: Path, source: str) -> list[str]:
    """Return the lines that load the base's denoiser, or that of another policy, as `negative`."""
    kind, part = backbone.denoiser_class, backbone.denoiser_component
    full = source != BASE and not (Path(source) / LORA_FILE).is_file()
    weights = absolute(source if full else backbone.weights)
    named = {} if full else {"revision": backbone.revision, "variant": backbone.variant}
    options = f'subfolder="{part}", {loading_options(backbone, folder)}' + "".join(
        f', {key}="{value}"' for key, value in named.items() if value
    )
    lines = [f'negative = {kind}.from_pretrained("{weights}", {options})']
    if source != BASE and not full:
        lines.append(
            f'negative.load_lora_adapter("{absolute(source)}", prefix="{part}", use_safetensors=True)'
        )
    return lines
