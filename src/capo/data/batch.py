"""Batch of prompts with their candidates, the input of the training step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

TENSORS = ("latents", "noise", "u", "calibrated_rewards")  # fields of a batch; beside them stands its text


@dataclass
class PreferenceBatch:
    """Batch of B prompts with k candidates each; for pairs k = 2, and the winner comes first.

    Attributes:
        latents: (B, k, C, H, W) float32 latents, scaled as the denoiser expects them.
        noise: (B, k, C, H, W) standard normal noise.
        u: (B,) in [0, 1), which the backbone maps to the time that the candidates of a prompt share.
        calibrated_rewards: (B, k) calibrated rewards, averaged over the rewards; the difference of two is dR.
        text: name -> tensor with leading dimension B, the text inputs of `Backbone.predict`.
        prompt_ids: B prompt ids.
        times: entries per visit of a pair, which follow one another and differ in u and noise.
        digests: B digests of the samples (`capo.data.dataset.sample_digest`); empty if nobody asked for them.
    """

    latents: Tensor
    noise: Tensor
    u: Tensor
    calibrated_rewards: Tensor
    text: dict[str, Tensor]
    prompt_ids: list[str]
    times: int = 1
    digests: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in (*self._tensors().values(), *self.text.values()))

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in TENSORS}

    def halves(self) -> tuple[PreferenceBatch, PreferenceBatch]:
        """First half of the pairs, with all their entries, and the rest, which has more of an odd number."""
        rows = len(self.prompt_ids) // self.times // 2 * self.times

        def part(rows: slice) -> PreferenceBatch:
            tensors = {name: tensor[rows] for name, tensor in self._tensors().items()}
            text = {name: value[rows] for name, value in self.text.items()}
            ids, digests = self.prompt_ids[rows], self.digests[rows]
            return replace(self, text=text, prompt_ids=ids, digests=digests, **tensors)

        return part(slice(rows)), part(slice(rows, None))

    def pin_memory(self) -> PreferenceBatch:
        """Copy of the batch in pinned memory, for asynchronous transfer to a GPU; the loader calls this."""
        pinned = {name: tensor.pin_memory() for name, tensor in self._tensors().items()}
        return replace(self, **pinned, text={name: value.pin_memory() for name, value in self.text.items()})
