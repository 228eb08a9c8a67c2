"""The interface over model families; what they share stands here, what differs in a module per family."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import ClassVar

import torch
from diffusers import SchedulerMixin
from PIL import Image
from torch import Tensor, nn

from capo.backbones.latents import from_denoiser, to_denoiser
from capo.backbones.loading import load_pipeline, load_vae, pipeline_folder
from capo.backbones.lora import ATTENTION
from capo.backbones.precision import cpu_copy, named_dtype
from capo.backbones.schedulers import scheduler_class
from capo.errors import InputError
from capo.runtime.batching import FittingBatch
from capo.runtime.fingerprints import component_fingerprint

# What `predict` needs beside latents and time, each tensor with a leading batch dimension.
Text = Mapping[str, Tensor]
ENCODING = (
    Lock()
)  # a tokenizer keeps the padding of the call that it is in: lanes must not call it at the same time


class Backbone(ABC):
    """A frozen base pipeline: its latent space, its text conditioning, its noise schedule and its denoiser.

    Args:
        weights: a folder in diffusers' format, or a hub id with its `revision` and `variant`.
        dtype: what the weights are loaded in, whatever they are stored in.
        name: what results call the model; by default the last part of `weights`.
        scheduler: a diffusers class that replaces the pipeline's own scheduler, built from its config.
        channels_last: modules (unet, vae) to be kept in that memory format: faster convolutions, but results
            that differ from the plain pipeline's in the last bits.
        vae: a folder or hub id of an AutoencoderKL in place of the pipeline's own, with `vae_revision`: for SDXL one that
            float16 does not make overflow.
        unused: components that are not loaded, by default `unused_parts()`.

    Raises:
        InputError: weights that are not there, not safe to load or not of this family.
    """

    pipeline_classes: ClassVar[tuple[str, ...]]
    denoiser_component: ClassVar[str]
    draws: ClassVar[tuple[str, ...]]  # ways to draw a time that the family knows (`timesteps`)
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION  # what a low-rank adapter sits on

    def __init__(
        self,
        weights: str,
        revision: str | None = None,
        variant: str | None = None,
        dtype: str = "float32",
        name: str | None = None,
        scheduler: str | None = None,
        channels_last: Sequence[str] = (),
        vae: str | None = None,
        vae_revision: str | None = None,
        unused: Mapping[str, None] | None = None,
    ):
        self.weights, self.revision, self.variant = str(weights), revision, variant
        self.dtype = named_dtype(dtype)
        self.name = name or Path(self.weights).name
        unused = self.unused_parts() if unused is None else unused
        self.folder = pipeline_folder(self.weights, revision, variant, unused)
        self.pipeline = load_pipeline(self.folder, self.pipeline_classes, variant, self.dtype, unused)
        self._vae_folder: Path | None = None
        self.other_scheduler, self.other_vae = (
            scheduler is not None,
            None if vae is None else (str(vae), vae_revision),
        )
        if vae is not None:
            self.pipeline.vae, self._vae_folder = load_vae(vae, vae_revision, self.dtype)
        self.check_schedule()  # what the weights were trained with: a conversion would leave none of it to be seen
        if scheduler is not None:
            self.pipeline.scheduler = self._converted(scheduler_class(scheduler))
            self.check_schedule()
        for component in channels_last:
            getattr(self.pipeline, component).to(memory_format=torch.channels_last)
        if self.vae.config.get("force_upcast") and self.dtype == torch.float16:
            self.vae.float()  # as the pipeline does before it decodes: SDXL's VAE overflows in float16
        for speaker in (type(self.pipeline).__module__, "transformers.tokenization_utils_base"):
            logging.getLogger(speaker).addFilter(_not_about_truncation)

    @classmethod
    def unused_parts(cls, **options: object) -> dict[str, None]:
        """Components of the pipeline that a backbone made with `options` neither loads nor needs, as keywords for the loader."""
        return {}

    def _converted(self, kind: type[SchedulerMixin]) -> SchedulerMixin:
        """A scheduler of class `kind` for the pipeline's schedule."""
        return kind.from_config(self.pipeline.scheduler.config)

    @property
    def denoiser(self) -> nn.Module:
        """The frozen base, in eval mode."""
        return getattr(self.pipeline, self.denoiser_component)

    @property
    def vae(self) -> nn.Module:
        return self.pipeline.vae

    @property
    def device(self) -> torch.device:
        """Where text is encoded and images are decoded: the denoiser's, but within `visiting` the one that is visited."""
        return self.__dict__.get("_visited") or self.denoiser.device

    def to(self, device: str | torch.device) -> "Backbone":
        """Moves all of the pipeline's modules."""
        self.pipeline.to(device)
        return self

    @contextmanager
    def visiting(self, device: str | torch.device) -> Iterator["Backbone"]:
        """Within the block VAE and text encoders are on `device`, then where they were; the denoiser stays where it is."""
        parts = {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}
        homes = {name: part.device for name, part in parts.items() if name != self.denoiser_component}
        before = self.__dict__.get("_visited")
        self.__dict__["_visited"] = torch.device(device)
        try:
            for name in homes:
                parts[name].to(device)
            yield self
        finally:
            self.__dict__["_visited"] = before
            for name, home in homes.items():
                parts[name].to(home)

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent at the size the denoiser was trained for."""

    @abstractmethod
    def check_schedule(self) -> None:
        """Raises InputError where the pipeline's scheduler is none that this family can train with."""

    @property
    @abstractmethod
    def token_limits(self) -> dict[str, int]:
        """Tokenizer component -> most tokens, ends included, that the denoiser gets to see of a prompt."""

    @abstractmethod
    def _encoded(self, prompts: list[str]) -> dict[str, Tensor]:
        """What the pipeline's `encode_prompt` gives for B prompts."""

    @abstractmethod
    def _negative(self, count: int) -> dict[str, Tensor]:
        """The pipeline's negative branch for `count` images; leading `count`, or 1 where it is the same for all."""

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Text conditioning of B prompts as the pipeline computes it: all that `predict` needs, leading B."""
        if not prompts:
            raise InputError("no prompt to encode: the list is empty")
        with torch.no_grad():
            return self._encoded(list(prompts))

    def unconditional(self, count: int) -> dict[str, Tensor]:
        """The pipeline's negative branch, the keys and shapes of `encode_prompts`, leading `count`."""
        with ENCODING:
            kept = self._kept_negative
            if count not in kept and 0 not in kept:
                with torch.no_grad():
                    negative = self._negative(count)
                kept.clear()
                same = count > 1 and all(len(value) == 1 for value in negative.values())
                kept[0 if same else count] = negative
            negative = kept.get(count) or kept[0]
        return {key: value.to(self.device).expand(count, *value.shape[1:]) for key, value in negative.items()}

    @cached_property
    def _kept_negative(self) -> dict[int, dict[str, Tensor]]:
        return {}

    def truncated(self, prompts: Sequence[str]) -> dict[str, int]:
        """Tokenizer component -> how many of the prompts it cuts off at `token_limits`."""
        found = {}
        for component, limit in self.token_limits.items():
            ids = getattr(self.pipeline, component)(list(prompts), verbose=False).input_ids
            found[component] = sum(len(row) > limit for row in ids)
        return found

    @abstractmethod
    def timesteps(self, u: Tensor, draw: str) -> Tensor:
        """(B,) in [0, 1) -> times (B,) as the denoiser takes them, rising with u; `draw` is one of `draws`."""

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """Times (B,) -> log-SNR (B,) float32."""

    @abstractmethod
    def weight(self, t: Tensor, bias: float) -> Tensor:
        """Times (B,) -> weight of the squared error (B,) float32 (section 4.4, on the family's own error)."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Latents and noise (B, C, H, W), times (B,) -> x_t (B, C, H, W)."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What `predict` should return for x_t, (B, C, H, W)."""

    @abstractmethod
    def predict(self, denoiser: nn.Module, noisy: Tensor, t: Tensor, text: Text) -> Tensor:
        """Output (B, C, H, W) of any denoiser of the family for x_t (B, C, H, W), times (B,) or one time ().

        Casts its input to what the denoiser computes in; leaves autograd and autocast to the caller.
        """

    def scheduler(self) -> SchedulerMixin:
        """A new scheduler of the pipeline's class and config: schedulers carry state from step to step."""
        return type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)

    @torch.inference_mode()
    def decode(self, latents: Tensor, batch: int = 8) -> list[Image.Image]:
        """Latents (B, C, H, W) as the denoiser sees them -> B 8-bit RGB images, `batch` at a time, fewer where memory runs out."""
        return [
            image
            for images in self._decoding(lambda part: self._pictures(latents[part]), len(latents), batch)
            for image in images
        ]

    @cached_property
    def _decoding(self) -> FittingBatch:
        return FittingBatch(
            "the VAE",
            "set model.backbone.dtype=bfloat16, or score on a device with more memory (generate.py stage=score)",
        )

    def _pictures(self, latents: Tensor) -> list[Image.Image]:
        raw = from_denoiser(self.vae, latents.to(self.device, self.vae.dtype))
        return self.pipeline.image_processor.postprocess(
            self.vae.decode(raw, return_dict=False)[0], output_type="pil"
        )

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> the posterior's mode (B, C, h, w) as the denoiser sees it."""
        posterior = self.vae.encode(images.to(self.device, self.vae.dtype)).latent_dist
        return to_denoiser(self.vae, posterior.mode())

    def trainable_copy(self) -> nn.Module:
        """A copy of the denoiser to train, on the CPU: float32, all parameters trainable, no dropout, whatever its mode.

        Dropout would make policy and reference differ at equal weights.
        """
        policy = cpu_copy(self.denoiser).float().requires_grad_(True)
        for module in policy.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return policy

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Content hashes, 64 hex digits, of the files of "denoiser", "latent_space" and "text_encoders"."""
        parts = self.pipeline.components.items()
        text = [
            name
            for name, part in parts
            if part is not None and name.startswith(("text_encoder", "tokenizer"))
        ]
        vae = self._vae_folder
        return {
            "denoiser": component_fingerprint(self.folder, [self.denoiser_component], self.variant),
            "latent_space": component_fingerprint(
                vae or self.folder, ["." if vae else "vae"], None if vae else self.variant
            ),
            "text_encoders": component_fingerprint(self.folder, text, self.variant, self.text_settings),
        }

    @property
    def call_options(self) -> dict[str, object]:
        """Keywords that the plain pipeline has to be called with to draw the same images."""
        return {}

    @property
    def text_settings(self) -> dict[str, object]:
        """JSON values that move a prompt's conditioning beside the encoders' files."""
        return {}

    def sampler_identity(self) -> dict[str, object]:
        """JSON values that decide a latent beside denoiser, steps, guidance and seed: for fingerprints."""
        pipeline, scheduler = self.pipeline, self.pipeline.scheduler
        own = pipeline.components
        options = {
            key: value for key, value in pipeline.config.items() if not key.startswith("_") and key not in own
        }
        config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        return {
            "scheduler": type(scheduler).__name__,
            "config": config,
            "options": options,
            "latent_shape": list(self.latent_shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "text_encoders": self.fingerprints["text_encoders"],
        }


def _not_about_truncation(record: logging.LogRecord) -> bool:
    # every prompt that is cut off would be printed; they are counted instead (`Backbone.truncated`)
    told = record.getMessage()
    return (
        "part of your input was truncated" not in told
        and "sequence length is longer than the specified maximum" not in told
    )


def input_dtype(denoiser: nn.Module, device: torch.device) -> torch.dtype:
    """What `predict` casts to: float32 under autocast, where a reference stored in bf16 must see what the policy sees."""
    if torch.is_autocast_enabled(device.type):
        return torch.float32
    return next(p.dtype for p in denoiser.parameters() if p.is_floating_point())
