"""Denoising errors of policy and reference on the same noisy latents, with the weight of each pair's time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from capo.backbones.base import Backbone
from capo.errors import ParameterError
from capo.noise import constant_weight
from capo.objectives import PairErrors, Predictions, Requirements


@dataclass(frozen=True)
class Weighting:
    """Weight of a pair by its time: `sigmoid` with bias b (section 4.4), or `constant` (w = 1)."""

    kind: str = "sigmoid"
    bias: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("sigmoid", "constant"):
            raise ParameterError("kind", self.kind, "must be one of sigmoid, constant")

    def __call__(self, backbone: Backbone, t: Tensor) -> Tensor:
        """Weights (B,) float32 of the times t (B,)."""
        return (
            backbone.weight(t, self.bias) if self.kind == "sigmoid" else constant_weight(backbone.log_snr(t))
        )


class Pairs(Protocol):
    """What is read of B pairs: the fields of a `PreferenceBatch` that bear these names."""

    latents: Tensor
    noise: Tensor
    u: Tensor
    calibrated_rewards: Tensor
    text: dict[str, Tensor]


def denoising_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Denoising error: mean over channels, height and width of the squared difference.

    prediction and target (B, C, H, W) -> (B,) float32. It is computed in float32 whatever the precision of
    the network: a target dR / beta is about 7e-4, and rounding an error to bf16 changes it by 1e-3.
    """
    return (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))


def pair_errors(
    backbone: Backbone,
    policy: nn.Module,
    reference: Callable[[], AbstractContextManager[nn.Module]],
    batch: Pairs,
    needs: Requirements,
    weighting: Weighting,
    draw: str,
) -> PairErrors:
    """Denoising errors of policy and reference on B pairs; one forward pass of 2B latents through each.

    Only what the objective requires is computed; other fields are None.

    Args:
        backbone: the model family.
        policy: the network that is trained.
        reference: returns the context in which the reference runs, without gradients.
        batch: the pairs (a `PreferenceBatch`).
        needs: what the objective reads.
        weighting: weight of a pair by its time.
        draw: how times are drawn (`Backbone.timesteps`).
    """
    kinds = 2 if needs.loser else 1
    t = backbone.timesteps(batch.u, draw)
    times = t.repeat_interleave(kinds)
    latents, noise = batch.latents[:, :kinds].flatten(0, 1), batch.noise[:, :kinds].flatten(0, 1)
    text = {name: value.repeat_interleave(kinds, dim=0) for name, value in batch.text.items()}
    noisy, target = backbone.add_noise(latents, noise, times), backbone.target(latents, noise, times)
    predictions = {"policy": backbone.predict(policy, noisy, times, text), "target": target}
    own = denoising_error(predictions["policy"], target).unflatten(0, (-1, kinds)).unbind(1)
    known = {"weight": weighting(backbone, t), "policy_winner": own[0]}
    if needs.loser:
        known |= {
            "policy_loser": own[1],
            "gap": batch.calibrated_rewards[:, 0] - batch.calibrated_rewards[:, 1],
        }
    if needs.reference:
        with reference() as network:
            predictions["reference"] = backbone.predict(network, noisy, times, text)
        frozen = denoising_error(predictions["reference"], target).unflatten(0, (-1, kinds)).unbind(1)
        known |= dict(zip(("reference_winner", "reference_loser")[:kinds], frozen, strict=True))
    if needs.predictions:
        parts = {name: value.float().unflatten(0, (-1, kinds)) for name, value in predictions.items()}
        known["predictions"] = Predictions(**parts)
    return PairErrors(**known)
