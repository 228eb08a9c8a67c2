"""The MMDiT family: velocity prediction on a rectified flow (SD3, SD3.5)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from capo import noise as schedules
from capo.backbones.base import Backbone
from capo.backbones.family import Configs, Text
from capo.backbones.finding import named_parts, pipeline_index
from capo.backbones.lora import JOINT_ATTENTION
from capo.backbones.models import Scheduler
from capo.backbones.schedulers import options_of
from capo.errors import InputError, ParameterError
from capo.runtime.reading import FOLDER_REMEDY

USUAL = 256  # T5 tokens, the pipeline's default
LONGEST = 512  # T5 tokens that the pipeline accepts at most


class MMDiTBackbone(Backbone):
    """StableDiffusion3Pipeline: SD3Transformer2DModel, two CLIP text encoders and an optional T5.

    Times are in the denoiser's units: `num_train_timesteps` (1000) times the flow's t in (0, 1).

    Args:
        weights: see `Backbone`.
        args: see `Backbone`.
        t5: whether to load the T5; without it, its tokens are zeros, as in the pipeline.
        sequence_length: number of T5 tokens, the pipeline's `max_sequence_length`.
        others: see `Backbone`.
    """

    pipeline_classes = ("StableDiffusion3Pipeline",)
    denoiser_class = "SD3Transformer2DModel"
    draws = tuple(schedules.FLOW_DRAWS)
    projected_text = ("prompt_embeds", "pooled_prompt_embeds")
    lora_targets = JOINT_ATTENTION

    def __init__(self, weights: str, *args, t5: bool = True, sequence_length: int = USUAL, **others):
        self.check_options(sequence_length=sequence_length)
        self.sequence_length = sequence_length
        super().__init__(weights, *args, unused=self.unused_parts(t5=t5), **others)
        self.check_index(pipeline_index(self.folder, self.pipeline_classes), weights, t5=t5)

    @classmethod
    def check_options(cls, sequence_length: int = USUAL, **options: object) -> None:
        if not 0 <= sequence_length <= LONGEST:
            raise ParameterError(
                "sequence_length", sequence_length, f"must be a whole number from 0 to {LONGEST}"
            )

    @classmethod
    def check_index(
        cls, index: Mapping[str, Any], weights: str = "", t5: bool = True, **options: object
    ) -> None:
        if t5 and "text_encoder_3" not in named_parts(index):
            raise InputError(
                f"weights '{weights}' have no text_encoder_3 (T5): set model.backbone.t5=false, "
                "or choose weights with it"
            )
        super().check_index(index, weights, t5=t5, **options)

    @classmethod
    def unused_parts(cls, t5: bool = True, **options: object) -> dict[str, None]:
        return {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}

    @classmethod
    def shapes_of_text(
        cls, configs: Configs, sequence_length: int = USUAL, **options: object
    ) -> dict[str, tuple[int, ...]]:
        config, tokens = configs[cls.denoiser_component], configs["text_encoder"]["max_position_embeddings"]
        return {
            "prompt_embeds": (tokens + sequence_length, config["joint_attention_dim"]),
            "pooled_prompt_embeds": (config["pooled_projection_dim"],),
        }

    def _converted(self, kind: type[Scheduler]) -> Scheduler:
        config = dict(self.pipeline.scheduler.config)
        shift = config.get("shift", config.get("flow_shift", 1.0))  # schedulers name it one way or the other
        config |= {
            "use_flow_sigmas": True,
            "shift": shift,
            "flow_shift": shift,
            "prediction_type": "flow_prediction",
        }
        return kind.from_config({key: value for key, value in config.items() if key in options_of(kind)})

    def check_schedule(self) -> None:
        """Raise InputError unless the scheduler is a rectified flow with fixed shift, predicting velocity.

        Such are FlowMatchEuler, and DPM-Solver++ with flow sigmas.
        """
        scheduler, place = self.scheduler(), f"weights '{self.weights}', scheduler/scheduler_config.json"
        config = scheduler.config
        # A config keeps keys that its class does not know, so the class's signature decides.
        if not ("shift" in options_of(type(scheduler)) or config.get("use_flow_sigmas")):
            raise InputError(
                f"{place}: {type(scheduler).__name__} is not a rectified flow; choose weights that were "
                "trained on one, and set model.backbone.scheduler to one too: "
                "FlowMatchEulerDiscreteScheduler or DPMSolverMultistepScheduler"
            )
        if config.get("use_dynamic_shifting"):
            raise InputError(f"{place}: use_dynamic_shifting is not supported; set a fixed shift there")
        prediction = config.get("prediction_type", "flow_prediction")
        if prediction != "flow_prediction":
            raise InputError(
                f"{place}: prediction_type '{prediction}' is not supported, only the flow's velocity "
                "('flow_prediction')"
            )

    @classmethod
    def shape_of_latent(cls, configs: Configs, **options: object) -> tuple[int, int, int]:
        config = configs[cls.denoiser_component]
        channels, *sides = super().shape_of_latent(configs, **options)
        side, most = config.get("patch_size", 2), config.get("pos_embed_max_size")  # 2: the library's own
        if any(size % side for size in sides) or (most and max(sides) > most * side):
            raise InputError(
                f"sample_size={config['sample_size']} in {cls.denoiser_component}/config.json: must be a "
                f"multiple of patch_size={side}"
                + (f", and at most pos_embed_max_size={most} times that" if most else "")
                + f"; {FOLDER_REMEDY}"
            )
        return channels, sides[0], sides[1]

    @property
    def _scale(self) -> int:
        return self.pipeline.scheduler.config.num_train_timesteps

    @property
    def token_limits(self) -> dict[str, int]:
        longest: int = self.pipeline.tokenizer_max_length
        limits = {"tokenizer": longest, "tokenizer_2": longest}
        if self.pipeline.tokenizer_3 is not None:
            limits["tokenizer_3"] = self.sequence_length
        return limits

    @property
    def call_options(self) -> dict[str, object]:
        return {} if self.sequence_length == USUAL else {"max_sequence_length": self.sequence_length}

    @property
    def text_settings(self) -> dict[str, object]:
        return {"sequence_length": self.sequence_length}

    def _encoded(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return prompt_embeds (B, CLIP's and T5's tokens, D) and pooled_prompt_embeds (B, D2)."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.sequence_length,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def _negative(self, count: int) -> dict[str, Tensor]:
        # Encode `count` at once, as the pipeline does: rounding depends on the batch size.
        return self._encoded([""] * count)

    def timesteps(self, u: Tensor, draw: str) -> Tensor:
        return schedules.flow_time(u, draw) * self._scale

    def log_snr(self, t: Tensor) -> Tensor:
        return schedules.flow_log_snr(t / self._scale)

    def weight(self, t: Tensor, bias: float) -> Tensor:
        return schedules.velocity_weight(self.log_snr(t), bias)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return schedules.flow_add_noise(latents, noise, t / self._scale)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the velocity, noise - latents, (B, C, H, W)."""
        return schedules.flow_target(latents, noise)

    @staticmethod
    def denoiser_inputs(noisy: Tensor, t: Tensor, text: Text) -> dict[str, object]:
        return {
            "hidden_states": noisy,
            "encoder_hidden_states": text["prompt_embeds"],
            "pooled_projections": text["pooled_prompt_embeds"],
            "timestep": t.expand(len(noisy)),
        }
