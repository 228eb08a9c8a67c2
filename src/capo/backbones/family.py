"""What is known of a model family before weights are loaded: classes, options, shapes that configs imply."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from capo.backbones.lora import ATTENTION
from capo.errors import InputError
from capo.noise import DRAWN, PRIOR
from capo.runtime.reading import FOLDER_REMEDY

# What `predict` needs beside latents and time, each tensor with a leading batch dimension.
Text = Mapping[str, Tensor]
Configs = Mapping[str, Mapping]  # component of a pipeline -> its config.json


class Family(ABC):
    """A model family. `options` everywhere are the keywords that a backbone of it is made with.

    Attributes:
        pipeline_classes: diffusers classes whose folders it loads.
        denoiser_class: the diffusers class that is tuned.
        denoiser_component: the pipeline's name for it.
        draws: ways to draw a time (`Backbone.timesteps`).
        noise_sources: where the noise of a training sample may come from (`capo.noise.SOURCES`).
        projected_text: names of the text inputs that only linear layers of the denoiser read. Autocast rounds
            these to its own dtype, so a pool loses nothing by storing them in it.
        lora_targets: names of the modules that a low-rank adapter sits on.
        kohya_prefix: what stands before the names of an adapter's layers in other programs. An MMDiT's
            separate projections have no name of kohya's; OneTrainer's is one that ComfyUI knows them by.
        single_file: whether a whole model can be written in one file, in the layout of the published model.
        lora_folders: other programs that load such an adapter, and the folder for it, in words.
    """

    pipeline_classes: ClassVar[tuple[str, ...]]
    denoiser_class: ClassVar[str]
    denoiser_component: ClassVar[str] = "transformer"
    draws: ClassVar[tuple[str, ...]] = ("uniform",)
    noise_sources: ClassVar[tuple[str, ...]] = (DRAWN, PRIOR)
    projected_text: ClassVar[tuple[str, ...]] = ()
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION
    kohya_prefix: ClassVar[str] = "lora_transformer"
    single_file: ClassVar[bool] = False
    lora_folders: ClassVar[str] = "ComfyUI's `models/loras`"

    @classmethod  # noqa: B027 - a family may allow all values
    def check_options(cls, **options: object) -> None:
        """Raises ParameterError for a value that no backbone can be made with; types are checked already."""

    @classmethod
    def unused_parts(cls, **options: object) -> dict[str, None]:
        """Components of the pipeline that are neither loaded nor needed, as keywords for the loader."""
        return {}

    @classmethod
    def check_index(cls, index: Mapping[str, Any], weights: str = "", **options: object) -> None:
        """Raise InputError for `weights` whose model_index.json, `index`, is not that of this family."""
        part = cls.denoiser_component
        kind = [*index.get(part, ()), None, None][1]
        if kind != cls.denoiser_class:
            raise InputError(
                f"weights '{weights}': the class of '{part}' is {kind} there, and {cls.denoiser_class} for "
                f"{cls.__name__}; choose the model group that fits the weights, or correct denoiser_class or "
                "denoiser_component of that family"
            )
        spare = cls.unused_parts(**options)
        for name, entry in index.items():
            if name.startswith(("text_encoder", "tokenizer")) and name not in spare and entry == [None, None]:
                raise InputError(
                    f"weights '{weights}': model_index.json has no class for '{name}', which encodes "
                    f"prompts; {FOLDER_REMEDY}"
                )

    @classmethod
    def shape_of_latent(cls, configs: Configs, **options: object) -> tuple[int, int, int]:
        """(C, H, W) of one latent at the size the denoiser was trained for."""
        config = configs[cls.denoiser_component]
        size = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return config["in_channels"], height, width

    @classmethod
    @abstractmethod
    def shapes_of_text(cls, configs: Configs, **options: object) -> dict[str, tuple[int, ...]]:
        """The shapes of `Backbone.encode_prompts`, without the leading batch dimension."""

    @staticmethod
    @abstractmethod
    def denoiser_inputs(noisy: Tensor, t: Tensor, text: Text) -> dict[str, object]:
        """Keywords of the denoiser's forward pass: x_t (B, C, H, W), times (B,) or one time (), text."""
