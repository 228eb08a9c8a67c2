"""Weights of SD1.5 and SDXL in one file, in the layout in which the models were published.

CompVis' and Stability AI's code named the modules; ComfyUI and AUTOMATIC1111 load checkpoints by these names.
A checkpoint holds, each under its prefix, the UNet, the VAE and the text encoders: CLIP by the names of
transformers and, of SDXL, the second encoder by those of open_clip. Diffusers reads the layout in
`diffusers.loaders.single_file_utils`, but has nothing that writes it.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

UNET, VAE = "model.diffusion_model.", "first_stage_model."
# of a model with one text encoder, and of one with two
CLIP_ALONE, CLIP, OPEN_CLIP = (
    "cond_stage_model.transformer.",
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.model.",
)
Rule = tuple[str, str]  # regular expression of a part of a name, and what replaces it

RESNET: tuple[Rule, ...] = (
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
)
UNET_ENDS: tuple[Rule, ...] = (
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
    (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"^mid_block\.resnets\.0\.", "middle_block.0."),
    (r"^mid_block\.attentions\.0\.", "middle_block.1."),
    (r"^mid_block\.resnets\.1\.", "middle_block.2."),
)
VAE_NAMES: tuple[Rule, ...] = (
    (r"\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r".down.\1.block.\2."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)
OPEN_CLIP_NAMES: tuple[Rule, ...] = (
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm1\.", ".ln_1."),
    (r"\.layer_norm2\.", ".ln_2."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.", ".attn."),
    (r"^final_layer_norm\.", "ln_final."),
)
PROJECTION = re.compile(r"\.attn\.([qkv])_proj\.(weight|bias)$")
ATTENTION_OF_VAE = re.compile(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$")


def original_unet(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Rename the weights of a UNet2DConditionModel.

    Diffusers counts blocks of one resolution and what is in them; the original layout counts the residual
    blocks of all resolutions, with the attention that follows, and each change of resolution.

    Args:
        weights: the UNet's state dict.
        layers: `layers_per_block` of its config.
    """
    attentive = {match[1] for name in weights if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}

    def placed(name: str) -> str:
        """Name of the layer, with its number among the blocks of the original layout."""
        if not (match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.", name)):
            return name
        side, block, kind, place = match[1], int(match[2]), match[3], int(match[4])
        rest = name[match.end() :]
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            after = 2 if match[2] in attentive else 1
            return f"output_blocks.{block * (layers + 1) + layers}.{after}.{rest}"
        row = block * (layers + 1) + place
        blocks = f"input_blocks.{row + 1}" if side == "down" else f"output_blocks.{row}"
        return f"{blocks}.{('resnets', 'attentions').index(kind)}.{rest}"

    return {
        UNET + placed(_renamed(name, [*(RESNET if ".resnets." in name else ()), *UNET_ENDS])): tensor
        for name, tensor in weights.items()
    }


def original_vae(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of an AutoencoderKL; its attention's become 1 x 1 convolutions."""
    ups = 1 + max(
        int(match[1]) for name in weights if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", name))
    )

    def named(name: str) -> str:
        # the decoder's blocks are counted from the side of the image
        name = re.sub(r"\.up_blocks\.(\d+)\.", lambda found: f".up.{ups - 1 - int(found[1])}.", name)
        name = re.sub(r"(\.up\.\d+)\.resnets\.(\d+)\.", r"\1.block.\2.", name)
        name = re.sub(r"(\.up\.\d+)\.upsamplers\.0\.", r"\1.upsample.", name)
        return _renamed(name, VAE_NAMES)

    found = {named(name): tensor for name, tensor in weights.items()}
    return {
        VAE + name: tensor[:, :, None, None] if ATTENTION_OF_VAE.search(name) else tensor
        for name, tensor in found.items()
    }


def original_clip(weights: Mapping[str, Tensor], alone: bool) -> dict[str, Tensor]:
    """Rename the weights of a CLIPTextModel; `alone`: it is the model's only text encoder."""
    prefix = f"{CLIP_ALONE if alone else CLIP}text_model."
    return {prefix + name.removeprefix("text_model."): tensor for name, tensor in weights.items()}


def original_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a CLIPTextModelWithProjection.

    Query, key and value become one projection (3 width, width), and the text's projection is transposed.
    """
    named = {_renamed(name.removeprefix("text_model."), OPEN_CLIP_NAMES): t for name, t in weights.items()}
    found = {}
    for name, tensor in named.items():
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif not (match := PROJECTION.search(name)):
            found[name] = tensor
        elif match[1] == "q":
            parts = [named[PROJECTION.sub(rf".attn.{part}_proj.{match[2]}", name)] for part in "qkv"]
            found[PROJECTION.sub(rf".attn.in_proj_{match[2]}", name)] = torch.cat(parts)
    return {OPEN_CLIP + name: tensor for name, tensor in found.items()}


def marks(scheduler: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return empty tensors that tell other programs that an SDXL checkpoint predicts v, and of a zero SNR."""
    found = {
        "v_pred": scheduler.get("prediction_type") == "v_prediction",
        "ztsnr": bool(scheduler.get("rescale_betas_zero_snr")),
    }
    return {name: torch.zeros(0) for name, holds in found.items() if holds}


def _renamed(name: str, rules: Iterable[Rule]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
