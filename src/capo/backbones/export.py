"""Export and load tuned policies: a diffusers pipeline folder or a LoRA file, which diffusers can load."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from capo.backbones.base import Backbone
from capo.backbones.component_configs import check_configs
from capo.backbones.drawing import PLAIN, Drawing, prepared
from capo.backbones.kohya import write_kohya
from capo.backbones.loading import loaded
from capo.backbones.lora import ADAPTER, BASE_FILE, COMFYUI_FILE, LORA_FILE, has_adapter, read_base
from capo.backbones.model_card import README, ModelCard, base_weights, readme
from capo.backbones.models import Denoiser
from capo.backbones.precision import named_dtype
from capo.backbones.saving import CHECKPOINT_FILE, INDEX, write_checkpoint, write_pipeline
from capo.errors import DamagedFile, InputError, first_line
from capo.runtime.files import fresh_folder
from capo.runtime.fingerprints import component_fingerprint, content_fingerprint, safetensors_fingerprint
from capo.runtime.hub import is_hub_id
from capo.runtime.run_folder import POLICY
from capo.runtime.tensor_files import AGAIN, DTYPES, tensor_homes


def export_policy(
    backbone: Backbone,
    denoiser: Denoiser,
    folder: str | Path,
    card: ModelCard,
    full: bool = False,
    dtype: str = "float32",
    checkpoint: bool = False,
) -> Path:
    """Write the policy and its README (`card`), replacing `folder` atomically; return the folder.

    A denoiser with a LoRA adapter is written as the adapter's files in float32, one for diffusers and one for
    ComfyUI or, with `full`, as a whole pipeline with the adapter merged. Any other denoiser is always written
    as a whole pipeline. A file beside them names the base. `dtype` names the dtype of a whole pipeline's
    weights. With `checkpoint`, a single file for other programs is written too (`Family.single_file`).
    """
    folder = Path(folder)
    with fresh_folder(folder, INDEX, LORA_FILE) as fresh:
        adapter = has_adapter(denoiser) and not full
        if adapter:
            _write_adapter(backbone, denoiser, fresh)
        else:
            write_pipeline(backbone, fresh, denoiser, named_dtype(dtype))
        if checkpoint:
            write_checkpoint(backbone, denoiser, fresh / CHECKPOINT_FILE)
        _write_base(backbone, fresh, adapter)
        (fresh / README).write_text(readme(backbone, fresh, folder.name, card), encoding="utf-8")
    return folder


def holds_policy(folder: str | Path, component: str) -> bool:
    """Whether `folder` holds an exported policy whose denoiser is the pipeline's `component`."""
    folder = Path(folder)
    return (folder / LORA_FILE).is_file() or (folder / component / "config.json").is_file()


def policy_remedy(folder: Path) -> str:
    """What to give in place of a folder that is no exported policy of the model."""
    if (folder / POLICY).is_dir():  # of a run
        return f"give {folder / POLICY}"
    if (folder / INDEX).is_file():
        return "it is a pipeline of another model: give model=NAME of the one that it was tuned from"
    if folder.is_dir() and (folder.parent / INDEX).is_file():
        return f"give {folder.parent}"
    return "give the `policy/` folder of a finished run"


def find_policy(source: str, component: str) -> Path:
    """Return the folder of a policy: `source` itself, or what that hub id (`owner/name@revision`) has of one.

    Of a hub id its denoiser, adapter and index are downloaded. Raises InputError if there is neither.
    """
    folder = Path(source).expanduser()
    repository, _, revision = source.partition("@")
    if folder.exists() or not is_hub_id(repository):
        return folder
    patterns = [INDEX, BASE_FILE, LORA_FILE, f"{component}/*.json", f"{component}/*.safetensors"]
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # the hub client's errors share no base class
        raise InputError(
            f"policy={source}: no such folder (looked at '{folder.absolute()}'), and neither "
            f"{constants.ENDPOINT} nor its cache {constants.HF_HUB_CACHE} has it ({first_line(error)}); give "
            "a folder or the id of a public model, owner/name"
        ) from error


def is_whole(folder: Path) -> bool:
    """Whether a policy's folder is a pipeline of others, with text encoders and VAE of its own."""
    return (folder / INDEX).is_file() and not (folder / BASE_FILE).is_file()


def load_policy(backbone: Backbone, folder: str | Path, drawing: Drawing = PLAIN) -> Denoiser:
    """Load the denoiser of an exported policy: frozen, on the CPU, with an adapter not merged.

    The weights are in float32, or stored as they draw under `drawing`; whatever draws moves them to a device.
    Raises InputError if `folder` holds no policy, a policy of another shape, or an adapter of another base.
    """
    folder, component = Path(folder), backbone.denoiser_component
    if not holds_policy(folder, component):
        raise InputError(
            f"policy '{folder.absolute()}': neither '{component}/config.json' nor '{LORA_FILE}' is there; "
            f"{policy_remedy(folder)}"
        )
    if (folder / LORA_FILE).is_file():
        _check_base(backbone, folder)
        policy = backbone.trainable_copy()
        with loaded(f"the weights of policy '{folder / LORA_FILE}'", AGAIN):
            _take_adapter(policy, type(backbone.pipeline), folder, component)
    else:
        policy = backbone.trainable_copy()
        _take_weights(policy, folder / component)
    return prepared(policy, drawing).eval().requires_grad_(False)


def _take_adapter(policy: Denoiser, loader: Any, folder: Path, component: str) -> None:
    """Add the adapter of a folder; `loader` is the pipeline's class, each of which has its own mixin for it.

    Raises InputError unless each of its tensors for the component has found its place: the library itself
    only warns, and the policy would be the base.
    """
    state, *alphas, metadata = loader.lora_state_dict(  # only pipelines with a UNet return alphas
        str(folder), use_safetensors=True, local_files_only=True, return_lora_metadata=True
    )
    policy.load_lora_adapter(
        state,
        prefix=component,
        network_alphas=alphas[0] if alphas else None,
        metadata=metadata,
        adapter_name=ADAPTER,
    )
    given = sum(name.startswith(f"{component}.") for name in state)
    found = len(get_peft_model_state_dict(policy, adapter_name=ADAPTER)) if has_adapter(policy) else 0
    if not given or given != found:
        raise InputError(
            f"policy '{folder / LORA_FILE}' has {given} tensors for the {component}, of which the model has "
            f"{found}: choose the model that it was tuned from, or {AGAIN}"
        )


def _take_weights(policy: Denoiser, folder: Path) -> None:
    check_configs(folder)
    own = policy.state_dict().keys()
    homes = tensor_homes(folder)
    if lacking := sorted(own - homes.keys()):  # the library would make it up
        raise InputError(f"policy '{folder.absolute()}' lacks {lacking[0]} of the model's tensors; {AGAIN}")
    for name, (file, dtype, _) in homes.items():
        if name not in own or dtype not in DTYPES:
            told = f"is stored as {dtype}, not as floating point" if name in own else "is none of the model's"
            raise InputError(f"policy '{file}' does not fit the model: its tensor {name} {told}; {AGAIN}")
    with loaded(f"the weights of policy '{folder.absolute()}'", AGAIN):
        stored = type(policy).from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    try:
        policy.load_state_dict(stored.state_dict())
    except RuntimeError as error:
        raise InputError(f"policy '{folder.absolute()}' does not fit the model: {error}") from error


def policy_fingerprint(backbone: Backbone, folder: str | Path) -> str:
    """Hash the content of an exported policy's denoiser, or of its adapter and its base; 64 hex digits."""
    return stored_fingerprint(folder, backbone.denoiser_component, lambda: backbone.fingerprints["denoiser"])


def stored_fingerprint(folder: str | Path, component: str, base: Callable[[], str]) -> str:
    """`policy_fingerprint` without a backbone: `base` returns that of its denoiser, `component`."""
    adapter = Path(folder) / LORA_FILE
    if adapter.is_file():
        return content_fingerprint({"base": base(), "adapter": safetensors_fingerprint(adapter)})
    return component_fingerprint(folder, [component])


def _write_adapter(backbone: Backbone, denoiser: Denoiser, folder: Path) -> None:
    component = backbone.denoiser_component
    layers = {
        name: tensor.to("cpu", torch.float32).contiguous()
        for name, tensor in get_peft_model_state_dict(denoiser, adapter_name=ADAPTER).items()
    }
    # Without metadata a loader would set alpha to the rank. Sets are sorted: their order differs by process.
    metadata = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in denoiser.peft_config[ADAPTER].to_dict().items()
    }
    write_adapter(type(backbone.pipeline), component, backbone.kohya_prefix, layers, metadata, folder)
    if backbone.other_scheduler:
        backbone.pipeline.scheduler.save_pretrained(folder / "scheduler")


def write_adapter(
    pipeline: Any,
    component: str,
    prefix: str,
    layers: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    folder: Path,
) -> None:
    """Write an adapter's factors to two files, one for diffusers and one for other programs.

    Args:
        pipeline: the diffusers class of the pipeline, which has its own mixin for LoRA.
        component: the denoiser's name in it.
        prefix: what stands before the names of layers in other programs (`Family.kohya_prefix`).
        layers: factors by peft's names, without the component's.
        settings: peft's settings of the adapter, among them `r` and `lora_alpha`.
        folder: where the files go.
    """
    pipeline.save_lora_weights(
        folder, **{f"{component}_lora_layers": layers, f"{component}_lora_adapter_metadata": settings}
    )
    write_kohya(layers, prefix, settings["lora_alpha"], folder / COMFYUI_FILE)


def _write_base(backbone: Backbone, folder: Path, adapter: bool) -> None:
    """Name the base; of a whole policy, which is loaded without it, no path on this machine."""
    weights = base_weights(backbone)
    base = {
        "weights": weights if adapter or not Path(weights).is_absolute() else backbone.name,
        "revision": backbone.revision,
        "variant": backbone.variant,
        "denoiser": backbone.fingerprints["denoiser"],
    }
    (folder / BASE_FILE).write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")


def _check_base(backbone: Backbone, folder: Path) -> None:
    try:
        base = read_base(folder)
    except FileNotFoundError:
        return  # an adapter made elsewhere does not name its base; the loader checks the shapes
    except DamagedFile as error:
        raise InputError(
            f"policy: {error.path}, which names the base, cannot be read ({error.reason}); restore it"
        ) from error
    if base["denoiser"] != backbone.fingerprints["denoiser"]:
        raise InputError(
            f"policy '{folder}' is a LoRA adapter of '{base['weights']}' (denoiser {base['denoiser'][:8]}), "
            f"not of '{backbone.weights}' ({backbone.fingerprints['denoiser'][:8]}); choose its base as model"
        )
