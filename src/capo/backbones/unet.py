"""The UNet family: predicts noise or v on a discrete variance-preserving schedule (SD1.5, SDXL)."""

from functools import cached_property

import torch
from torch import Tensor

from capo import noise as schedules
from capo.backbones.base import Backbone
from capo.backbones.family import Configs, Text
from capo.backbones.inversion import Invertible
from capo.backbones.models import Scheduler
from capo.backbones.schedulers import options_of
from capo.errors import InputError

NOISE, VELOCITY = "epsilon", "v_prediction"  # what a network predicts, in diffusers' words
CLEAN = -1  # stands for the time before the first timestep, at which a latent holds no noise
TIME_IDS = 6  # numbers of SDXL's size conditioning: original size, crop, target size


class UNetBackbone(Backbone, Invertible):
    """UNet2DConditionModel of a StableDiffusionPipeline, or of an XL pipeline with text_time conditioning."""

    pipeline_classes = ("StableDiffusionXLPipeline", "StableDiffusionPipeline")
    denoiser_class = "UNet2DConditionModel"
    denoiser_component = "unet"
    kohya_prefix = "lora_unet"
    single_file = True
    lora_folders = "ComfyUI's `models/loras` or AUTOMATIC1111's `models/Lora`"
    draws = schedules.VP_DRAWS
    noise_sources = schedules.SOURCES
    projected_text = ("prompt_embeds", "pooled_prompt_embeds")  # not the time_ids, whose sines are taken

    @classmethod
    def unused_parts(cls, **options: object) -> dict[str, None]:
        return {"safety_checker": None}  # SD1.5's, which would black out images before they are scored

    @classmethod
    def shapes_of_text(cls, configs: Configs, **options: object) -> dict[str, tuple[int, ...]]:
        config, tokens = configs[cls.denoiser_component], configs["text_encoder"]["max_position_embeddings"]
        words = {"prompt_embeds": (tokens, config["cross_attention_dim"])}
        if config.get("addition_embed_type") != "text_time":
            return words
        sizes = TIME_IDS * config["addition_time_embed_dim"]
        pooled = config["projection_class_embeddings_input_dim"] - sizes
        return words | {"pooled_prompt_embeds": (pooled,), "time_ids": (TIME_IDS,)}

    def _converted(self, kind: type[Scheduler]) -> Scheduler:
        config = self.pipeline.scheduler.config
        # Some schedulers clip to [-1, 1] by default, which is right for pixels and wrong for latents.
        told = (
            {} if "clip_sample" in config or "clip_sample" not in options_of(kind) else {"clip_sample": False}
        )
        return kind.from_config(config, **told)

    @property
    def _text(self) -> "PlainText | XLText":
        return XLText() if hasattr(self.pipeline, "text_encoder_2") else PlainText()

    def check_schedule(self) -> None:
        """Raise InputError unless the scheduler has `alphas_cumprod` and predicts the noise or v.

        DDIM, DDPM, Euler and others do. A network that predicts the noise needs `alphas_cumprod` above 0.
        Guidance-distilled denoisers are refused too.
        """
        scheduler, place = self.scheduler(), f"weights '{self.weights}', scheduler/scheduler_config.json"
        if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("use_flow_sigmas"):
            raise InputError(
                f"{place}: {type(scheduler).__name__} has no alphas_cumprod, so it is not a discrete "
                "variance-preserving schedule; choose weights that were trained on one, and set "
                "model.backbone.scheduler to one too, such as DDIMScheduler"
            )
        prediction = scheduler.config.get("prediction_type", NOISE)
        if prediction not in (NOISE, VELOCITY):
            raise InputError(
                f"{place}: prediction_type '{prediction}' is not supported, only '{NOISE}' and '{VELOCITY}'; "
                "choose weights that predict the noise or v"
            )
        if prediction == NOISE and not (scheduler.alphas_cumprod > 0).all():
            raise InputError(
                f"{place}: {type(scheduler).__name__} ends in noise alone (its last alphas_cumprod is 0, as "
                "with rescale_betas_zero_snr), where predicting the noise carries no information about the "
                "image; choose weights that were trained without it, or that predict v"
            )
        if self.denoiser.config.get("time_cond_proj_dim") is not None:
            raise InputError(
                f"weights '{self.weights}': time_cond_proj_dim {self.denoiser.config.time_cond_proj_dim} "
                "marks a guidance-distilled model, which is not supported; choose its undistilled base"
            )

    @cached_property
    def _predicts_velocity(self) -> bool:
        return self.scheduler().config.get("prediction_type", NOISE) == VELOCITY

    @cached_property
    def _schedules(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    def _schedule(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`alphas_cumprod` and log-SNR of all timesteps, copied to a device once: each step reads them."""
        if device not in self._schedules:
            alphas = self.scheduler().alphas_cumprod.float()
            self._schedules[device] = alphas.to(device), schedules.vp_log_snr(alphas).to(device)
        return self._schedules[device]

    @property
    def token_limits(self) -> dict[str, int]:
        names = [
            name for name in ("tokenizer", "tokenizer_2") if getattr(self.pipeline, name, None) is not None
        ]
        return {name: getattr(self.pipeline, name).model_max_length for name in names}

    def _encoded(self, prompts: list[str]) -> dict[str, Tensor]:
        return self._text.encoded(self, prompts)

    def _negative(self, count: int) -> dict[str, Tensor]:
        return self._text.negative(self, count)

    def timesteps(self, u: Tensor, draw: str = "uniform") -> Tensor:
        return schedules.vp_time(u, self._schedule(u.device)[1], draw)

    def _alpha_bar(self, t: Tensor) -> Tensor:
        return self._schedule(t.device)[0][t]

    def log_snr(self, t: Tensor) -> Tensor:
        return schedules.vp_log_snr(self._alpha_bar(t))

    def weight(self, t: Tensor, bias: float) -> Tensor:
        weight = schedules.sigmoid_weight(self.log_snr(t), bias)
        # the squared error of the noise is alphas_cumprod times that of v
        return weight * self._alpha_bar(t) if self._predicts_velocity else weight

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return schedules.vp_add_noise(latents, noise, self._alpha_bar(t))

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the noise itself or, for a network that predicts it, v; (B, C, H, W)."""
        return schedules.vp_velocity(latents, noise, self._alpha_bar(t)) if self._predicts_velocity else noise

    def rising_times(self, t: Tensor, steps: int) -> Tensor:
        """Return timesteps (steps + 1, B) int64 from CLEAN to t, rounded to the nearest."""
        rows = torch.arange(steps + 1, device=t.device)[:, None]
        return ((t - CLEAN) * rows + steps // 2) // steps + CLEAN

    def network_time(self, t: Tensor) -> Tensor:
        return t.clamp(min=0)

    def _share_of_image(self, t: Tensor) -> Tensor:
        """Return `alphas_cumprod` (B,) at timesteps (B,), which is 1 for CLEAN."""
        return torch.where(t == CLEAN, 1.0, self._alpha_bar(t.clamp(min=0)))

    def predicted_noise(self, prediction: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        if not self._predicts_velocity:
            return prediction
        # v = sqrt(abar) eps - sqrt(1 - abar) x, and x_t = sqrt(abar) x + sqrt(1 - abar) eps
        abar = self._share_of_image(t)
        return schedules.vp_add_noise(prediction, noisy, abar)

    def ddim_step(self, noisy: Tensor, noise: Tensor, t: Tensor, later: Tensor) -> Tensor:
        return schedules.vp_ddim_step(noisy, noise, self._share_of_image(t), self._share_of_image(later))

    def deviation_between(self, t: Tensor, later: Tensor) -> Tensor:
        return schedules.vp_posterior_deviation(self._share_of_image(t), self._share_of_image(later))

    def noise_within(self, latents: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        return schedules.vp_noise_within(latents, noisy, self._alpha_bar(t))

    @staticmethod
    def denoiser_inputs(noisy: Tensor, t: Tensor, text: Text) -> dict[str, object]:
        sizes = (
            {"text_embeds": text["pooled_prompt_embeds"], "time_ids": text["time_ids"]}
            if "time_ids" in text
            else None
        )
        return {
            "sample": noisy,
            "timestep": t,
            "encoder_hidden_states": text["prompt_embeds"],
            "added_cond_kwargs": sizes,
        }


class PlainText:
    """SD1.5's conditioning: the last layer of one CLIP encoder, `prompt_embeds` (B, tokens, D)."""

    def encoded(self, backbone: UNetBackbone, prompts: list[str]) -> dict[str, Tensor]:
        return {"prompt_embeds": backbone.pipeline.encode_prompt(prompts, backbone.device, 1, False)[0]}

    def negative(self, backbone: UNetBackbone, count: int) -> dict[str, Tensor]:
        # Encode `count` at once, as the pipeline does: rounding depends on the batch size.
        return {"prompt_embeds": backbone.pipeline.encode_prompt([""] * count, backbone.device, 1, True)[1]}


class XLText:
    """SDXL's conditioning: `prompt_embeds` (B, T, D), `pooled_prompt_embeds` (B, D2), `time_ids` (B, 6)."""

    def encoded(self, backbone: UNetBackbone, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = backbone.pipeline.encode_prompt(
            prompts, device=backbone.device, do_classifier_free_guidance=False
        )
        return self._with_sizes(backbone, embeds, pooled)

    def negative(self, backbone: UNetBackbone, count: int) -> dict[str, Tensor]:
        # Zeros if the pipeline forces them; else encode `count` at once: rounding depends on the batch size.
        encoded = 1 if backbone.pipeline.config["force_zeros_for_empty_prompt"] else count
        _, embeds, _, pooled = backbone.pipeline.encode_prompt(
            [""] * encoded, device=backbone.device, do_classifier_free_guidance=True
        )
        return self._with_sizes(backbone, embeds, pooled)

    def _with_sizes(self, backbone: UNetBackbone, embeds: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        _, height, width = backbone.latent_shape
        pipeline = backbone.pipeline
        size = height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor
        # Original size, crop and target size: the generated size without a crop, the pipeline's default.
        time_ids = pipeline._get_add_time_ids(size, (0, 0), size, embeds.dtype, pooled.shape[-1])
        return {
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "time_ids": time_ids.to(embeds.device).repeat(len(embeds), 1),
        }
