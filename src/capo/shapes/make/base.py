"""Base model `shapes_unet`: SDXL's classes and conditioning at the size of the shapes world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTokenizer

from capo.backbones.models import Autoencoder
from capo.backbones.saving import INDEX
from capo.noise import vp_add_noise, vp_log_snr, vp_velocity
from capo.runtime.files import fresh_folder
from capo.shapes.make import autoencoder
from capo.shapes.make.fitting import fit, generator, share, stratified
from capo.shapes.make.text import encoders, token_ids, tokenizer
from capo.shapes.scenes import SIDE

WIDTHS = (32, 64)


def build_unet() -> UNet2DConditionModel:
    """Build an untrained denoiser: two levels (16 x 16 and 8 x 8), cross-attention on the lower one."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=4,  # the number of heads, despite its name
        cross_attention_dim=32 + 64,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64 + 6 * 8,
    )


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Build a schedule like SDXL's that ends closer to pure noise, with the sampler that needs few steps.

    SDXL's own keeps 0.0047 of the image's variance in its last step, which shows where things are. The
    sampler starts from noise alone, and its random places then decide in place of the caption: of prompts
    that name a place, 0.64 had it wrong; 0.18 when the start kept 0.0047 of a right scene, and 0.82 when it
    kept as much of another one. Here 0.0002 is kept. The noise at that level says next to nothing of the
    image, so the network predicts v.
    """
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",  # the first step then sees pure noise, as in sampling
    )


class Learner(nn.Module):
    """Denoiser and text encoders, which are trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = tokenizer()
        self.unet = build_unet()
        self.first, self.second = encoders(len(self.tokenizer))

    def conditioning(self, ids: Tensor, keep: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the UNet's conditioning for token ids (B, LENGTH): text states; pooled text and time ids.

        Rows with keep = 0 get zeros, like the pipeline's unconditional branch.
        """
        first = self.first(ids, output_hidden_states=True).hidden_states[-2]
        second = self.second(ids, output_hidden_states=True)
        words = torch.cat([first, second.hidden_states[-2]], dim=-1) * keep[:, None, None]
        time_ids = torch.tensor([SIDE, SIDE, 0, 0, SIDE, SIDE], dtype=torch.float32).expand(len(ids), 6)
        return words, {"text_embeds": second.text_embeds * keep[:, None], "time_ids": time_ids}


def train(
    work: Path, steps: int, batch: int = 32, seed: int = 0, start: Path | None = None
) -> StableDiffusionXLPipeline:
    """Train the prediction of v on the encoded scenes in `work`; one in ten captions is dropped.

    Args:
        work: folder of scenes, captions, logs and checkpoints.
        steps: training steps.
        batch: scenes per step.
        seed: of weights, batches and noise.
        start: initial weights: a checkpoint of another run (`base.pt`), whose averaged weights are taken, or
            the folder of a pipeline of the same shape.
    """
    torch.manual_seed(seed)
    latents = autoencoder.encode_all(work)
    learner, alphas = Learner(), build_scheduler().alphas_cumprod
    if start and start.is_dir():
        begin(learner, start)
    elif start:
        learner.load_state_dict(torch.load(start, weights_only=True)["average"], strict=False)
    log_snr = vp_log_snr(alphas)
    ids = token_ids(learner.tokenizer, json.loads((work / "captions.json").read_text()))

    def loss(step: int):
        draw, mine = generator(seed, 2, step), share(batch)
        rows = torch.randint(len(latents), (batch,), generator=draw)[mine]
        x = torch.from_numpy(latents[rows.numpy()].astype(np.float32))
        t = timesteps(log_snr, batch, draw)[mine]
        noise = torch.randn(batch, *x.shape[1:], generator=draw)[mine]
        keep = (torch.rand(batch, generator=draw) > 0.1).float()[mine]
        words, added = learner.conditioning(ids[rows], keep)
        told = learner.unet(vp_add_noise(x, noise, alphas[t]), t, words, added_cond_kwargs=added).sample
        errors = (told - vp_velocity(x, noise, alphas[t])).square().mean((1, 2, 3))
        late = log_snr[t] < -1  # where places and backgrounds are decided; early: outlines
        return errors.mean(), {"late": errors[late].mean().item(), "early": errors[~late].mean().item()}

    fit("base", learner, loss, work, steps, lr=1e-3, average=True)
    return pipeline(learner, autoencoder.load(work))


def begin(learner: Learner, folder: Path) -> None:
    """Give the learner the weights of a pipeline in `folder`, whose words are found by their names."""
    old, new = CLIPTokenizer.from_pretrained(folder / "tokenizer").get_vocab(), learner.tokenizer.get_vocab()
    shared = sorted(new.keys() & old.keys())
    parts = {"unet": learner.unet, "text_encoder": learner.first, "text_encoder_2": learner.second}
    for part, module in parts.items():
        found = type(module).from_pretrained(folder / part, torch_dtype=torch.float32).state_dict()
        state = module.state_dict()
        for name, tensor in found.items():
            if name.endswith("token_embedding.weight"):
                state[name][[new[word] for word in shared]] = tensor[[old[word] for word in shared]]
            else:
                state[name].copy_(tensor)


def timesteps(log_snr: Tensor, batch: int, draw: torch.Generator) -> Tensor:
    """Draw stratified timesteps (batch,) in random order: a quarter uniform, the rest normal in log-SNR.

    The normal has mean -0.5 and standard deviation 2, where shapes are determined; two thirds of a
    uniform draw would fall where the noise hides everything or nothing.
    """
    u = stratified(batch, draw)
    middle = torch.searchsorted(-log_snr, 0.5 - 2 * torch.special.ndtri(u)).clamp(max=len(log_snr) - 1)
    return torch.where(torch.arange(batch) % 4 == 0, (u * len(log_snr)).long(), middle)


def pipeline(learner: Learner, vae: Autoencoder) -> StableDiffusionXLPipeline:
    """Assemble the pipeline of a trained learner and its autoencoder, whose latents have variance 1."""
    vae.register_to_config(scaling_factor=1.0, force_upcast=False)
    return StableDiffusionXLPipeline(
        vae=cast(AutoencoderKL, vae),
        text_encoder=learner.first,
        text_encoder_2=learner.second,
        tokenizer=learner.tokenizer,
        tokenizer_2=learner.tokenizer,
        unet=learner.unet,
        scheduler=build_scheduler(),  # pyright: ignore[reportArgumentType]  # annotated as an enum of names
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def ship(pipe: DiffusionPipeline, folder: Path) -> None:
    """Save a pipeline as float16 safetensors; the folder is replaced as a whole."""
    with fresh_folder(folder, INDEX) as fresh:
        pipe.to(torch.float16).save_pretrained(fresh, safe_serialization=True)
        for file in fresh.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
