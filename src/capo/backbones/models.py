"""Types of diffusers' models and schedulers, for annotations.

Each class names in one place the methods that diffusers inherits from several mixins, and leaves configs
untyped, since their keys are known only at run time. At run time the names stand for the plain base classes.
"""

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import ModelMixin, SchedulerMixin
    from diffusers.loaders import PeftAdapterMixin

    class Denoiser(ModelMixin, PeftAdapterMixin):
        """A UNet or a transformer, which can take LoRA adapters."""

        config: Any
        peft_config: dict[str, Any]

        def to(self, *args: Any, **kwargs: Any) -> Self:
            """Move or convert the weights, as `torch.nn.Module.to`."""
            ...

    class Autoencoder(ModelMixin):
        """A VAE, between images and latents."""

        config: Any

        def to(self, *args: Any, **kwargs: Any) -> Self:
            """Move or convert the weights, as `torch.nn.Module.to`."""
            ...

        def register_to_config(self, **options: Any) -> None:
            """Set keys of the config."""

        def encode(self, x: Tensor, return_dict: bool = True) -> Any:
            """Encode pixels (B, 3, H, W) to a posterior of latents."""

        def decode(self, z: Tensor, return_dict: bool = True) -> Any:
            """Decode latents (B, C, h, w) to pixels."""

    class Scheduler(SchedulerMixin):
        """A noise schedule and the sampler's steps on it."""

        config: Any
        timesteps: Tensor
        alphas_cumprod: Tensor  # only on a variance-preserving schedule

        @classmethod
        def from_config(cls, config: Any, **options: Any) -> "Scheduler":
            """Build a scheduler from the config of any other."""
            ...

        def set_timesteps(self, steps: int, device: torch.device | None = None) -> None:
            """Set the times of `steps` steps."""

        def set_begin_index(self, begin: int) -> None:
            """Set the index of the first time."""

        def step(self, output: Tensor, t: Tensor, sample: Tensor, **options: Any) -> Any:
            """Take one step from x_t towards the image."""

else:
    Denoiser = Autoencoder = nn.Module
    Scheduler = object
