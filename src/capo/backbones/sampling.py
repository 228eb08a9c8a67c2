"""Batched sampling with classifier-free guidance: a pipeline's own latents, for any denoiser of a family."""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from capo.backbones.base import Backbone
from capo.backbones.drawing import Drawing
from capo.backbones.family import Text
from capo.backbones.models import Scheduler
from capo.backbones.precision import AUTOCAST
from capo.backbones.schedulers import started
from capo.errors import InputError
from capo.runtime.threads import BATCHES, OPERATIONS, map_batches

# sources of a tuned policy's unconditional prediction; any other value is the folder of an exported policy
POLICY, BASE = "policy", "base"
Progress = Callable[[int], object]  # called after each denoising step with the number of images in the batch


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of the sampler.

    Attributes:
        steps: number of denoising steps.
        guidance: scale of classifier-free guidance; from 0 to 1 no unconditional pass is made.
        batch: images in one forward pass, before guidance doubles them.
        parallel: what the threads of a CPU share: `operations`, or whole `batches` (`capo.runtime.threads`).
        precision: precision of the denoiser's forward passes, by Lightning's name; mixed ones use autocast.
        decode: images that the VAE decodes at once; None: `batch`.
        unconditional: source of the unconditional prediction when a tuned policy is sampled: `policy`, `base`
            or the folder of an exported policy (`capo.backbones.unconditional` finds its network). The base's
            own images do not depend on it.
        channels_last: whether what draws has its convolutions in the channels-last memory format.
        compile: whether torch.compile is applied to the repeated blocks of what draws.
        text_dtype: dtype that sampling and training autocast to, in which pools store float32 text
            embeddings; None: pools store them as they were encoded.
    """

    steps: int
    guidance: float
    batch: int
    parallel: str = OPERATIONS
    precision: str = "32-true"
    decode: int | None = None
    unconditional: str = POLICY
    channels_last: bool = False
    compile: bool = False
    text_dtype: torch.dtype | None = None

    @property
    def drawing(self) -> Drawing:
        """How a network is stored and laid out that draws with these settings."""
        return Drawing(self.precision, self.channels_last, self.compile)

    @property
    def decoded(self) -> int:
        """Images that the VAE decodes at once."""
        return self.decode or self.batch

    def __post_init__(self) -> None:
        if self.parallel not in (OPERATIONS, BATCHES):
            raise InputError(
                f"sampling.parallel={self.parallel!r} is unknown; choose {OPERATIONS} or {BATCHES}"
            )
        if self.precision not in AUTOCAST:
            raise InputError(
                f"sampling.precision={self.precision!r} is unknown; choose one of {', '.join(AUTOCAST)}"
            )
        if self.steps < 1 or self.batch < 1:
            raise InputError(
                f"sampling.steps {self.steps} and sampling.batch {self.batch} must be at least 1"
            )
        if not math.isfinite(self.guidance):
            raise InputError(f"sampling.guidance {self.guidance} must be a finite number")


def is_guided(guidance: float) -> bool:
    """Whether a scale of guidance reads the unconditional prediction: one that is not from 0 to 1."""
    return not 0 <= guidance <= 1


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context in which a denoiser stored for `precision` is called on `device`."""
    dtype = AUTOCAST[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def candidate_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one CPU generator per candidate, so that its noise depends on its seed alone."""
    return [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]


def candidate_noise(seeds: Sequence[int] | Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Draw standard normal noise (B, *shape), float32 on the CPU, each candidate from its own generator."""
    generators = [
        seed if isinstance(seed, torch.Generator) else candidate_generators([seed])[0] for seed in seeds
    ]
    return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators])


def sample(
    backbone: Backbone,
    denoiser: nn.Module,
    text: Text,
    noise: Tensor,
    settings: SamplerSettings,
    progress: Progress | None = None,
    generators: Sequence[torch.Generator] | None = None,
    unconditional: nn.Module | None = None,
) -> Tensor:
    """Sample latents (B, C, H, W), float32 on the backbone's device, from standard normal noise (B, C, H, W).

    All B images form one batch, guidance included; `settings.batch` is ignored. In float32 the result equals
    `pipeline(..., output_type="latent")` at the same batch size bit for bit. With an `unconditional` network
    each step makes two passes of B images in place of one of 2B.

    Args:
        backbone: the model family.
        denoiser: the network to sample from: the base or a policy.
        text: the conditioning of B prompts, from `encode_prompts`.
        noise: the initial noise.
        settings: steps, guidance and precision.
        progress: called after each denoising step with B.
        generators: one per candidate, those that drew `noise`; needed by schedulers that draw noise at each
            step (DDPM, ancestral ones).
        unconditional: the network of the unconditional prediction, on the backbone's device; None: `denoiser`
            itself. Without guidance it is not read.

    Raises:
        InputError: `generators` are needed and missing, or the scheduler refuses that number of steps.
    """
    if noise.shape[1:] != backbone.latent_shape or any(len(value) != len(noise) for value in text.values()):
        raise ValueError(
            f"noise {tuple(noise.shape)} does not fit latents {backbone.latent_shape} and the text's batch "
            f"of {[len(value) for value in text.values()]}"
        )
    scheduler = started(backbone.scheduler(), settings.steps, backbone.device)
    step = _step_of(scheduler, generators)
    conditions = _conditions(backbone, text, len(noise), settings.guidance)
    # Flow schedulers have neither scale_model_input nor init_noise_sigma.
    scaled = getattr(scheduler, "scale_model_input", lambda latents, t: latents)
    with (
        backbone.placed(denoiser, unconditional),
        torch.inference_mode(),
        autocast(settings.precision, backbone.device),
    ):
        latents = noise.to(backbone.device, torch.float32) * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            noisy = scaled(latents, t)
            predicted = _guided(backbone, denoiser, unconditional, noisy, t, conditions, settings.guidance)
            # a scheduler's own matrix products (UniPC's) stay float32; autocast keeps its copies of weights
            with torch.autocast(backbone.device.type, enabled=False):
                latents = step(predicted, t, latents)
            if progress is not None:
                progress(len(noise))
    return latents.clone()  # cloned outside inference mode, so that autograd accepts it


def _conditions(backbone: Backbone, text: Text, count: int, guidance: float) -> Text:
    """Move text to the backbone's device; with guidance, (2B, ...) with the negative branch first."""
    text = {key: value.to(backbone.device) for key, value in text.items()}
    if not is_guided(guidance):
        return text
    negative = backbone.unconditional(count)
    return {key: torch.cat([negative[key].to(value.dtype), value]) for key, value in text.items()}


def _guided(
    backbone: Backbone,
    denoiser: nn.Module,
    unconditional: nn.Module | None,
    noisy: Tensor,
    t: Tensor,
    conditions: Text,
    guidance: float,
) -> Tensor:
    """Return the guided prediction `eps_u + g (eps_c - eps_u)`, (B, C, H, W), float32.

    Both branches run in one forward pass, unless eps_u comes from a network of its own.
    """
    if not is_guided(guidance):
        return backbone.predict(denoiser, noisy, t, conditions).float()
    if unconditional is None:
        both = backbone.predict(denoiser, torch.cat([noisy, noisy]), t, conditions).float()
        without, with_text = both.chunk(2)
    else:
        negative, positive = (
            {key: value.chunk(2)[half] for key, value in conditions.items()} for half in (0, 1)
        )
        without = backbone.predict(unconditional, noisy, t, negative).float()
        with_text = backbone.predict(denoiser, noisy, t, positive).float()
    return without + guidance * (with_text - without)


def _step_of(scheduler: Scheduler, generators: Sequence[torch.Generator] | None) -> Callable[..., Tensor]:
    """Wrap scheduler.step with the arguments that pipelines pass where it accepts them: eta 0, generators."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    accepted = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"eta": 0.0} if "eta" in accepted else {}
    probe = torch.Generator("cpu").manual_seed(0)
    if "generator" in accepted:
        options["generator"] = probe if generators is None else list(generators)
    untouched = probe.get_state()

    def step(predicted: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        latents = scheduler.step(predicted, t, latents, **options, return_dict=False)[0]
        if not torch.equal(probe.get_state(), untouched):
            raise InputError(
                f"{type(scheduler).__name__} draws noise at each step: pass `generators`, one per candidate, "
                "or choose a deterministic scheduler (model.backbone.scheduler=DDIMScheduler)"
            )
        return latents

    return step


def encode_unconditional(backbone: Backbone, settings: SamplerSettings, images: Iterable[int]) -> None:
    """Encode the negative branch for the batches in which so many images each are sampled, and keep it.

    Called before a denoiser is on the device, it spares the memory for text encoders beside it.
    """
    if not is_guided(settings.guidance):
        return
    batch = settings.batch
    counts = {size for each in images for size in (min(batch, each), each % batch) if size}
    with backbone.placed(*backbone.text_encoders):
        for count in sorted(counts):
            backbone.unconditional(count)


def sample_prompts(
    backbone: Backbone,
    denoiser: nn.Module,
    text: Text,
    seeds: Sequence[Sequence[int]],
    settings: SamplerSettings,
    progress: Progress | None = None,
    unconditional: nn.Module | None = None,
) -> Tensor:
    """Sample latents (P, K, C, H, W), float32 on the CPU, for P prompts with K seeds each.

    `text` has leading dimension P. Candidates are batched in order, `settings.batch` at a time, across
    prompts; the last batch may be smaller, and all are where the device runs out of memory
    (`Backbone.sampling_fits`). `progress` is called after each denoising step with the number of
    images in its batch; `unconditional` is that of `sample`, and threads may share it.

    Raises:
        InputError: a single image does not fit into the device's memory.
        ValueError: prompts have different numbers of seeds.
    """
    prompts, candidates = len(seeds), len(seeds[0])
    if any(len(row) != candidates for row in seeds):
        raise ValueError(
            f"every prompt needs the same number of seeds, not {sorted({len(row) for row in seeds})}"
        )
    flat = [seed for row in seeds for seed in row]
    lock = Lock()

    def report(images: int) -> None:
        with lock:
            if progress is not None:
                progress(images)

    def drawn(first: int, last: int) -> Tensor:
        generators = candidate_generators(flat[first:last])
        rows = torch.arange(first, last) // candidates
        conditions = {key: value[rows.to(value.device)] for key, value in text.items()}
        noise = candidate_noise(generators, backbone.latent_shape)
        return sample(
            backbone, denoiser, conditions, noise, settings, report, generators, unconditional
        ).cpu()

    def batch(start: int) -> Tensor:
        count = min(settings.batch, len(flat) - start)
        parts = backbone.sampling_fits(lambda part: drawn(start + part.start, start + part.stop), count)
        return torch.cat(parts)

    starts = range(0, len(flat), settings.batch)
    with backbone.placed(denoiser, unconditional):
        latents = torch.cat(map_batches(batch, starts, settings.parallel, backbone.device))
    return latents.unflatten(0, (prompts, candidates))
