"""A batch of prompts with their candidates, as the training step reads it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass
class PreferenceBatch:
    """B prompts with k candidates each; pairs: k = 2, the winner first.

    Attributes:
        latents: (B, k, C, H, W) as the denoiser sees them, float32.
        noise: (B, k, C, H, W) standard normal.
        u: (B,) in [0, 1), from which the backbone makes the time that the candidates of a prompt share.
        calibrated_rewards: (B, k), averaged over the rewards; the difference of two is dR.
        text: what `Backbone.predict` needs, each with leading B.
        prompt_ids: B ids.
    """

    latents: Tensor
    noise: Tensor
    u: Tensor
    calibrated_rewards: Tensor
    text: dict[str, Tensor]
    prompt_ids: list[str]

    def pin_memory(self) -> PreferenceBatch:
        """The batch in memory from which a GPU copies by itself; the loader calls this."""
        pinned = {
            name: getattr(self, name).pin_memory() for name in ("latents", "noise", "u", "calibrated_rewards")
        }
        return replace(self, **pinned, text={name: value.pin_memory() for name, value in self.text.items()})
