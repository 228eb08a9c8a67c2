"""The network of the unconditional prediction under guidance: the policy, its base or another policy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from capo.backbones.base import Backbone
from capo.backbones.drawing import prepared
from capo.backbones.export import load_policy, policy_fingerprint
from capo.backbones.family import Text
from capo.backbones.lora import adapter_off
from capo.backbones.models import Denoiser
from capo.backbones.precision import stored_for
from capo.backbones.sampling import BASE, POLICY, SamplerSettings
from capo.errors import InputError


@dataclass(frozen=True)
class Unconditional:
    """A network that makes the unconditional prediction in place of the policy, and its fingerprint."""

    network: nn.Module
    fingerprint: str


class AdapterOff(nn.Module):
    """The base as a view of a LoRA policy, whose adapter is off during each pass and on again after it.

    It takes no memory of its own. Threads must not use the policy and this view at the same time.
    """

    def __init__(self, policy: nn.Module):
        super().__init__()
        self.policy = policy

    def forward(self, *args, **options):
        """Call the policy with its adapter off."""
        with adapter_off(self.policy):
            return self.policy(*args, **options)


def base_network(backbone: Backbone, precision: str) -> Denoiser:
    """The base's denoiser as it predicts beside a float32 policy: itself if it is stored so, else a copy."""
    base = backbone.denoiser
    return base if stored_for(base, precision) else backbone.reference(precision)


class UnconditionalText:
    """The unconditional conditioning of one prompt, encoded when it is first needed."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone

    @cached_property
    def text(self) -> dict[str, Tensor]:
        """Text inputs of `Backbone.predict`, batch 1, encoded on the CPU, where training has the encoders."""
        with self.backbone.visiting("cpu"):
            return self.backbone.unconditional(1)

    def at(self, rows: Tensor, text: Text) -> dict[str, Tensor]:
        """Replace the conditioning of B prompts, `text`, where the mask `rows` (B,) is true."""
        found = {}
        for name, value in text.items():
            mask = rows.to(value.device).view(-1, *[1] * (value.ndim - 1))
            found[name] = torch.where(mask, self.text[name].to(value), value)
        return found


def check_negative(settings: SamplerSettings) -> None:
    """Raise InputError unless these settings read a negative model as the base's unconditional prediction."""
    if settings.unconditional != POLICY:
        raise InputError(
            f"sampling.unconditional={settings.unconditional}: must be {POLICY} with selection.swap=true, "
            "whose negative model itself makes the unconditional prediction, that of the base"
        )
    if settings.guidance <= 1:
        raise InputError(
            f"sampling.guidance={settings.guidance:g}: must be above 1 with selection.swap=true: a negative "
            "model is validated as the unconditional prediction of the base, which only guidance reads"
        )


def unconditional_of(backbone: Backbone, settings: SamplerSettings) -> Unconditional | None:
    """Return what `settings.unconditional` names, ready to draw; None for the policy itself.

    The base's network is separate from any policy, so threads may sample with both. Raises InputError if a
    folder holds no policy of this model.
    """
    source = settings.unconditional
    if source == POLICY:
        return None
    if source == BASE:
        base = base_network(backbone, settings.precision)
        network = base if base is backbone.denoiser else prepared(base, settings.drawing)
        return Unconditional(network, backbone.fingerprints["denoiser"])
    network = load_policy(backbone, source, settings.drawing)
    return Unconditional(network, policy_fingerprint(backbone, source))
