"""The interface of a model family and the code that all families share; each family has its own module."""

import logging
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock

import torch
from PIL import Image
from torch import Tensor, nn

from capo.backbones.family import Family, Text
from capo.backbones.finding import pipeline_folder
from capo.backbones.latents import from_denoiser, to_denoiser
from capo.backbones.loading import load_pipeline, load_vae
from capo.backbones.models import Scheduler
from capo.backbones.parts import DENOISER, TEXT, TEXT_ENCODER, Parts
from capo.backbones.precision import named_dtype
from capo.backbones.schedulers import scheduler_class
from capo.errors import InputError
from capo.runtime.batching import FittingBatch
from capo.runtime.fingerprints import component_fingerprint

# A tokenizer stores the padding of the current call, so threads must not call it at the same time.
ENCODING = Lock()


class Backbone(Parts, Family):
    """A frozen base pipeline: latent space, text conditioning, noise schedule and denoiser.

    Args:
        weights: a folder in diffusers' format, or a hub id.
        revision: commit, branch or tag of the hub id.
        variant: variant of the weight files, such as fp16.
        dtype: name of the dtype to load the weights in, whatever they are stored in.
        name: name of the model in results; by default the last part of `weights`.
        scheduler: a diffusers class that replaces the pipeline's own scheduler, built from its config.
        channels_last: modules (unet, vae) to keep in that memory format: faster convolutions, but results
            that differ from the plain pipeline's in the last bits.
        vae: a folder or hub id of an AutoencoderKL to use in place of the pipeline's own, for instance one
            for SDXL that does not overflow in float16.
        vae_revision: commit, branch or tag of `vae`.
        unused: components that are not loaded; by default `unused_parts()`.
        parts: which of DENOISER and TEXT are loaded. The others have configs and no weights, which are not
            read: enough for all that does not compute with them. The VAE is always loaded.

    Raises:
        InputError: the weights are missing, not safe to load or not of this family.
    """

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
        parts: Collection[str] = (DENOISER, TEXT),
    ):
        self.weights, self.revision, self.variant = str(weights), revision, variant
        self.dtype = named_dtype(dtype)
        self.name = name or Path(self.weights).name
        unused = self.unused_parts() if unused is None else unused
        self.folder = pipeline_folder(self.weights, revision, variant, unused)
        prefixes = {DENOISER: self.denoiser_component, TEXT: TEXT_ENCODER}
        hollow = tuple(prefix for part, prefix in prefixes.items() if part not in parts)
        self.pipeline = load_pipeline(self.folder, self.pipeline_classes, variant, self.dtype, unused, hollow)
        self._device = torch.device("cpu")
        self._vae_folder: Path | None = None
        self.other_scheduler, self.other_vae = (
            scheduler is not None,
            None if vae is None else (str(vae), vae_revision),
        )
        if vae is not None:
            self.pipeline.vae, self._vae_folder = load_vae(vae, vae_revision, self.dtype)
        self.check_schedule()  # before a conversion, which would hide what the weights were trained with
        if scheduler is not None:
            self.pipeline.scheduler = self._converted(scheduler_class(scheduler))
            self.check_schedule()
        self._channels_last = self.denoiser_component in channels_last
        for component in channels_last:
            getattr(self.pipeline, component).to(memory_format=torch.channels_last)
        if self.vae.config.get("force_upcast") and self.dtype == torch.float16:
            self.vae.float()  # as the pipeline does before decoding: SDXL's VAE overflows in float16
        for speaker in (type(self.pipeline).__module__, "transformers.tokenization_utils_base"):
            logging.getLogger(speaker).addFilter(_not_about_truncation)

    def _converted(self, kind: type[Scheduler]) -> Scheduler:
        """Build a scheduler of class `kind` from the config of the pipeline's scheduler."""
        return kind.from_config(self.pipeline.scheduler.config)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one latent at the size that the denoiser was trained for."""
        return self.shape_of_latent({self.denoiser_component: self.denoiser.config})

    @abstractmethod
    def check_schedule(self) -> None:
        """Raise InputError if this family cannot train with the pipeline's scheduler."""

    @property
    @abstractmethod
    def token_limits(self) -> dict[str, int]:
        """Tokenizer component -> most tokens of a prompt, special ones included, that the denoiser sees."""

    @abstractmethod
    def _encoded(self, prompts: list[str]) -> dict[str, Tensor]:
        """Encode B prompts with the pipeline's `encode_prompt`; leading dimension B."""

    @abstractmethod
    def _negative(self, count: int) -> dict[str, Tensor]:
        """Encode the negative branch for `count` images; leading dimension `count`, or 1 if all are equal."""

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode B prompts as the pipeline does, into all that `predict` needs; leading dimension B."""
        if not prompts:
            raise InputError("no prompt to encode: the list is empty")
        with self.placed(*self.text_encoders), torch.no_grad():
            return self._encoded(list(prompts))

    def unconditional(self, count: int) -> dict[str, Tensor]:
        """Return the pipeline's negative branch for `count` images, as `encode_prompts` returns prompts."""
        with ENCODING:
            kept = self._kept_negative
            if count not in kept and 0 not in kept:
                with self.placed(*self.text_encoders), torch.no_grad():
                    negative = {key: value.cpu() for key, value in self._negative(count).items()}
                same = count > 1 and all(len(value) == 1 for value in negative.values())
                kept[0 if same else count] = negative
            negative = kept.get(count) or kept[0]
        return {key: value.to(self.device).expand(count, *value.shape[1:]) for key, value in negative.items()}

    @cached_property
    def _kept_negative(self) -> dict[int, dict[str, Tensor]]:
        return {}

    def truncated(self, prompts: Sequence[str]) -> dict[str, int]:
        """Count, per tokenizer component, the prompts that it truncates at `token_limits`."""
        found = {}
        for component, limit in self.token_limits.items():
            ids = getattr(self.pipeline, component)(list(prompts), verbose=False).input_ids
            found[component] = sum(len(row) > limit for row in ids)
        return found

    @abstractmethod
    def timesteps(self, u: Tensor, draw: str) -> Tensor:
        """Map u (B,) in [0, 1) to times (B,) in the denoiser's units, rising with u; `draw` is in `draws`."""

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """Return the log-SNR (B,), float32, at times (B,)."""

    @abstractmethod
    def weight(self, t: Tensor, bias: float) -> Tensor:
        """Return the weight (B,), float32, of the squared error at times (B,) (CaPO, section 4.4)."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noise latents (B, C, H, W) to times (B,) with noise (B, C, H, W): x_t (B, C, H, W)."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the target of `predict` for x_t, (B, C, H, W)."""

    def predict(self, denoiser: nn.Module, noisy: Tensor, t: Tensor, text: Text) -> Tensor:
        """Return the output (B, C, H, W) of any denoiser of the family for x_t and times (B,) or ().

        The input is cast to the dtype that the denoiser computes in (`input_dtype`); autograd and autocast
        are left to the caller.
        """
        dtype = input_dtype(denoiser, noisy.device)
        words = {name: value.to(dtype) for name, value in text.items()}
        return denoiser(**self.denoiser_inputs(noisy.to(dtype), t, words), return_dict=False)[0]

    def scheduler(self) -> Scheduler:
        """Build a new scheduler of the pipeline's class and config; schedulers keep state between steps."""
        return type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)

    def decode(self, latents: Tensor, batch: int = 8) -> list[Image.Image]:
        """Decode latents (B, C, H, W) in the denoiser's scale to B 8-bit RGB images.

        The VAE decodes `batch` latents at a time, and fewer if the device runs out of memory; raises
        InputError if a single one does not fit.
        """
        with self.placed(self.vae), torch.inference_mode():
            parts = self._decoding(lambda part: self._pictures(latents[part]), len(latents), batch)
        return [image for images in parts for image in images]

    @cached_property
    def _decoding(self) -> FittingBatch:
        return FittingBatch(
            "the VAE",
            "set model.backbone.dtype=bfloat16, or score on a device with more memory "
            "(generate.py stage=score)",
        )

    @cached_property
    def sampling_fits(self) -> FittingBatch:
        """Halves the sampler's batch where the device runs out of memory."""
        return FittingBatch(
            "sampling",
            "set sampling.precision=bf16-mixed and model.backbone.dtype=bfloat16, or use a device with more "
            "memory",
        )

    def _pictures(self, latents: Tensor) -> list[Image.Image]:
        raw = from_denoiser(self.vae, latents.to(self.device, self.vae.dtype))
        return self.pipeline.image_processor.postprocess(
            self.vae.decode(raw, return_dict=False)[0], output_type="pil"
        )

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Encode pixels (B, 3, H, W) in [-1, 1] to the posterior's mode (B, C, h, w), in denoiser scale."""
        with self.placed(self.vae):
            posterior = self.vae.encode(images.to(self.device, self.vae.dtype)).latent_dist
            return to_denoiser(self.vae, posterior.mode())

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Content hashes, 64 hex digits each, of "denoiser", "latent_space" and "text_encoders"."""
        parts = self.pipeline.components.items()
        text = [
            name for name, part in parts if part is not None and name.startswith((TEXT_ENCODER, "tokenizer"))
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
        """Keywords with which the plain pipeline must be called to generate the same images."""
        return {}

    @property
    def text_settings(self) -> dict[str, object]:
        """JSON values that affect a prompt's conditioning besides the encoders' files."""
        return {}

    def sampler_identity(self) -> dict[str, object]:
        """Return the JSON values that, with denoiser, steps, guidance and seed, determine a latent.

        Fingerprints of latents include them.
        """
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
    # These warnings would print every truncated prompt; `Backbone.truncated` counts them instead.
    told = record.getMessage()
    return (
        "part of your input was truncated" not in told
        and "sequence length is longer than the specified maximum" not in told
    )


def input_dtype(denoiser: nn.Module, device: torch.device) -> torch.dtype:
    """Return the dtype that `predict` casts its input to: the denoiser's, or float32 under autocast.

    Under autocast a reference stored in bf16 must get the same input as the policy.
    """
    if torch.is_autocast_enabled(device.type):
        return torch.float32
    return next(p.dtype for p in denoiser.parameters() if p.is_floating_point())
