"""The UNet family: noise prediction on a discrete variance-preserving schedule (SDXL)."""

from collections.abc import Sequence
from functools import cached_property
from threading import Lock

import torch
from torch import Tensor, nn

from capo import noise as schedules
from capo.backbones.base import Backbone, Text
from capo.errors import InputError


ENCODING = Lock()  # a tokenizer keeps the padding of the call that it is in: lanes must not call it at the same time


class UNetBackbone(Backbone):
    """StableDiffusionXLPipeline: UNet2DConditionModel with text_time conditioning."""

    pipeline_classes = ("StableDiffusionXLPipeline",)
    denoiser_component = "unet"

    def check_schedule(self) -> None:
        """Accepts schedulers with `alphas_cumprod` (DDIM, DDPM, Euler, ...) that predict the noise."""
        scheduler, place = self.scheduler(), f"weights '{self.weights}', scheduler/scheduler_config.json"
        if not hasattr(scheduler, "alphas_cumprod"):
            raise InputError(
                f"{place}: {type(scheduler).__name__} has no alphas_cumprod, so it is no discrete "
                "variance-preserving schedule; name one that fits with model.scheduler=DDIMScheduler"
            )
        if (prediction := scheduler.config.get("prediction_type", "epsilon")) != "epsilon":
            raise InputError(
                f"{place}: prediction_type '{prediction}' is not supported yet, "
                "only 'epsilon'; choose weights that predict noise"
            )
        if self.denoiser.config.time_cond_proj_dim is not None:
            raise InputError(
                f"weights '{self.weights}': time_cond_proj_dim {self.denoiser.config.time_cond_proj_dim} "
                "marks a guidance-distilled model, which is not supported; choose its undistilled base"
            )

    @cached_property
    def _alphas_cumprod(self) -> Tensor:
        return self.scheduler().alphas_cumprod.float()

    @cached_property
    def _negatives(self) -> dict[int, dict[str, Tensor]]:
        return {}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        channels, size = self.denoiser.config.in_channels, self.denoiser.config.sample_size
        return (channels, size, size) if isinstance(size, int) else (channels, *size)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """prompt_embeds (B, tokens, D), pooled_prompt_embeds (B, D2) and time_ids (B, 6)."""
        if not prompts:
            raise InputError("no prompt to encode: the list is empty")
        with torch.no_grad():
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                list(prompts), device=self.device, do_classifier_free_guidance=False
            )
        return self._text(embeds, pooled)

    def unconditional(self, count: int) -> dict[str, Tensor]:
        """Zeros where the pipeline forces them for an empty prompt, else the encoded empty prompt."""
        # Encoded `count` at once, as the pipeline does it, because rounding depends on the batch.
        encoded = 1 if self.pipeline.config.force_zeros_for_empty_prompt else count
        with ENCODING:
            negatives = self._negatives.get(encoded)
            if negatives is None:
                with torch.no_grad():
                    _, embeds, _, pooled = self.pipeline.encode_prompt(
                        [""] * encoded, device=self.device, do_classifier_free_guidance=True
                    )
                negatives = self._text(embeds, pooled)
                self._negatives.clear()
                self._negatives[encoded] = negatives
        return {key: value.to(self.device).expand(count, *value.shape[1:]) for key, value in negatives.items()}

    def _text(self, embeds: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        _, height, width = self.latent_shape
        size = height * self.pipeline.vae_scale_factor, width * self.pipeline.vae_scale_factor
        # original size, crop, target size: the size that is made, uncropped, as the pipeline assumes
        time_ids = self.pipeline._get_add_time_ids(size, (0, 0), size, embeds.dtype, pooled.shape[-1])
        return {
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "time_ids": time_ids.to(embeds.device).repeat(len(embeds), 1),
        }

    def timesteps(self, u: Tensor) -> Tensor:
        return schedules.vp_timestep(u, len(self._alphas_cumprod))

    def _alpha_bar(self, t: Tensor) -> Tensor:
        return self._alphas_cumprod.to(t.device)[t]

    def log_snr(self, t: Tensor) -> Tensor:
        return schedules.vp_log_snr(self._alpha_bar(t))

    def weight(self, t: Tensor, bias: float) -> Tensor:
        return schedules.sigmoid_weight(self.log_snr(t), bias)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return schedules.vp_add_noise(latents, noise, self._alpha_bar(t))

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noise itself."""
        return noise

    def predict(self, denoiser: nn.Module, noisy: Tensor, t: Tensor, text: Text) -> Tensor:
        dtype = _input_dtype(denoiser, noisy.device)
        added = {
            "text_embeds": text["pooled_prompt_embeds"].to(dtype),
            "time_ids": text["time_ids"].to(dtype),
        }
        return denoiser(
            noisy.to(dtype),
            t,
            encoder_hidden_states=text["prompt_embeds"].to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]


def _input_dtype(denoiser: nn.Module, device: torch.device) -> torch.dtype:
    # Under autocast a reference stored in bf16 must see the float32 input that the policy sees.
    if torch.is_autocast_enabled(device.type):
        return torch.float32
    return next(p.dtype for p in denoiser.parameters() if p.is_floating_point())
