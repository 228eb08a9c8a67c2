"""LoRA adapters in kohya's names, which ComfyUI and AUTOMATIC1111 read."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors.torch import save_file
from torch import Tensor


def kohya_names(layers: Mapping[str, Tensor], prefix: str, alpha: float) -> dict[str, Tensor]:
    """Rename the factors of an adapter, and add a tensor `.alpha` for each layer.

    Programs that read these names compute W + alpha / rank * up down, with the rank from the shape of `down`
    and alpha from the tensor. They read no metadata: without the tensor they would take alpha = rank.

    Args:
        layers: factors by peft's names, `LAYER.lora_A.weight` (rank, in) and `LAYER.lora_B.weight`
            (out, rank); of a convolution with its kernel as further dimensions.
        prefix: what stands before each name (`Family.kohya_prefix`).
        alpha: alpha of the adapter, the same for all layers.

    Returns:
        `NAME.lora_down.weight`, `NAME.lora_up.weight` and `NAME.alpha`, a scalar, where NAME is the prefix
        and the layer's name, joined by underscores.
    """
    # the converter knows no alpha and writes the rank in its place
    return {
        f"{prefix}_{name}": torch.tensor(float(alpha)) if name.endswith(".alpha") else tensor
        for name, tensor in convert_state_dict_to_kohya(dict(layers)).items()
    }


def write_kohya(layers: Mapping[str, Tensor], prefix: str, alpha: float, file: Path) -> None:
    """Write `kohya_names` to a safetensors file, whose bytes follow from the arguments alone."""
    save_file(kohya_names(layers, prefix, alpha), file, metadata={"format": "pt"})
