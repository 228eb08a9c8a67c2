"""Denoising errors of policy and reference on the same noisy latents, with the weight of each pair's time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from capo.backbones.base import Backbone
from capo.backbones.inversion import Inversion, invert
from capo.errors import ParameterError
from capo.noise import constant_weight
from capo.objectives import Group, PairErrors, Predictions, Requirements
from capo.runtime.processes import mean_over_processes


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


class KnownErrors(Protocol):
    """Errors of the reference that are known without a pass, such as `capo.data.reference_errors`."""

    def recall(self, batch: Any, candidates: int) -> Tensor | None:
        """Return errors (B, k) float32 of the first k `candidates` of the batch; None if not known."""

    def keep(self, batch: Any, errors: Tensor) -> None:
        """Take errors (B, k) that were just computed."""


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
    inversion: Inversion | None = None,
    known: KnownErrors | None = None,
) -> PairErrors:
    """Denoising errors of policy and reference on B pairs; one forward pass of 2B latents through each.

    Only what the objective requires is computed; other fields are None. Of an objective that reads each
    candidate, the passes are of all k B latents.

    Args:
        backbone: the model family.
        policy: the network that is trained.
        reference: returns the context in which the reference runs, without gradients.
        batch: the pairs (a `PreferenceBatch`).
        needs: what the objective reads.
        weighting: weight of a pair by its time.
        draw: how times are drawn (`Backbone.timesteps`).
        inversion: how the policy inverts the latents to noisy ones; None: the noise of the batch is added.
        known: errors of the reference that need no pass; what it lacks is computed and given to it.
    """
    kinds = _candidates_read(batch, needs)
    t = backbone.timesteps(batch.u, draw)
    times = t.repeat_interleave(kinds)
    latents, noise = batch.latents[:, :kinds].flatten(0, 1), batch.noise[:, :kinds].flatten(0, 1)
    text = {name: value.repeat_interleave(kinds, dim=0) for name, value in batch.text.items()}
    if inversion is None:
        noisy, target = backbone.add_noise(latents, noise, times), backbone.target(latents, noise, times)
    else:
        settings = asdict(inversion)
        noisy, target = invert(backbone, policy, latents, times, text, **settings, noise=noise)
    predictions = {"policy": backbone.predict(policy, noisy, times, text), "target": target}
    recalled = known.recall(batch, kinds) if known and needs.reference else None
    if needs.reference and recalled is None:
        with reference() as network:
            predictions["reference"] = backbone.predict(network, noisy, times, text)
    parts = {name: value.unflatten(0, (-1, kinds)) for name, value in predictions.items()}
    errors = _candidate_errors(parts)
    if recalled is not None:
        errors["reference"] = recalled
    elif known and needs.reference:
        known.keep(batch, errors["reference"])
    return _errors_of(errors, parts, batch.calibrated_rewards, weighting(backbone, t), needs)


def _candidates_read(batch: Pairs, needs: Requirements) -> int:
    """Number of candidates of a prompt that the objective reads; ValueError for pairs in larger groups."""
    held = batch.latents.shape[1]
    if needs.group:
        return held
    if held > 2:
        raise ValueError(f"an objective of pairs cannot read {held} candidates of a prompt; give it two")
    return 2 if needs.loser else 1


def _candidate_errors(predictions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Errors (B, k) of each network from its predictions and the target, (B, k, C, H, W) each."""
    target = predictions["target"].flatten(0, 1)
    return {
        name: denoising_error(value.flatten(0, 1), target).unflatten(0, value.shape[:2])
        for name, value in predictions.items()
        if name != "target"
    }


def _errors_of(
    errors: dict[str, Tensor],
    predictions: dict[str, Tensor],
    rewards: Tensor,
    weight: Tensor,
    needs: Requirements,
) -> PairErrors:
    """Collect what the objective reads.

    Args:
        errors: of the policy and, if it was asked, the reference: (B, k) each.
        predictions: policy, target and, where a pass was made, reference: (B, k, C, H, W) each.
        rewards: calibrated rewards of the batch, (B, 2) or (B, k).
        weight: (B,) weights of the times.
        needs: what the objective reads.
    """
    known: dict[str, Any] = {"weight": weight}
    for name, error in errors.items():
        known[f"{name}_winner"] = error[:, 0]
        known |= {f"{name}_loser": error[:, -1]} if needs.loser else {}
    if needs.loser:
        known["gap"] = rewards[:, 0] - rewards[:, -1]
    if needs.group:
        known["group"] = Group(rewards=rewards, **errors)
    if needs.kl:
        drift = (errors["reference"] - errors["policy"].detach()).mean()
        known["kl"] = mean_over_processes(drift).expand(len(weight))
    if needs.predictions:
        known["predictions"] = Predictions(**{name: value.float() for name, value in predictions.items()})
    return PairErrors(**known)
