"""The networks of a policy's two predictions under guidance while it is validated during training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from capo.backbones.export import load_policy
from capo.backbones.lora import has_adapter
from capo.backbones.sampling import BASE, POLICY, SamplerSettings, is_guided
from capo.backbones.unconditional import AdapterOff, base_network, check_negative
from capo.module import PreferenceModule


@dataclass(frozen=True)
class UnconditionalBranch:
    """Finds the network that makes the unconditional prediction beside a policy in training.

    Attributes:
        module: the module that trains the policy, which may hold the base as its reference.
        settings: settings of the sampler.
        other: the network of the folder that `settings.unconditional` names; None for `policy` and `base`.
        negative: whether the policy is a negative model: the base is sampled, and the policy makes its
            unconditional prediction. `settings.unconditional` is `base` then, the network beside the policy.
    """

    module: PreferenceModule
    settings: SamplerSettings
    other: nn.Module | None = None
    negative: bool = False

    @contextmanager
    def sampled(
        self, policy: nn.Module, device: torch.device | str
    ) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        """Context manager that yields what is sampled on `device`, and its unconditional network or None."""
        with self.network(policy, device) as beside:
            if self.negative and beside is not None:
                yield beside, policy
            else:
                yield policy, beside

    @contextmanager
    def network(self, policy: nn.Module, device: torch.device | str) -> Iterator[nn.Module | None]:
        """Context manager that yields the network for work on `device`, or None for `policy` itself.

        What is not there yet is placed by whatever samples with it (`Backbone.placed`), for as long.

        On a CPU the base is the backbone's own denoiser, which threads may use beside the policy. Elsewhere
        batches are sampled one after another, and the base is what training holds on the device anyway: the
        reference, sharded like the policy, or the policy with its adapter off. A reference that follows the
        policy is not the base.
        """
        if self.settings.unconditional == POLICY or not is_guided(self.settings.guidance):
            yield None
        elif self.other is not None:
            yield self.other
        elif torch.device(device).type != "cpu" and has_adapter(policy):
            yield AdapterOff(policy)
        elif torch.device(device).type != "cpu" and self.module.reference_is_base:
            with self.module.reference() as network:
                yield network
        else:
            yield base_network(self.module.backbone, self.settings.precision)


def unconditional_branch(
    module: PreferenceModule, settings: SamplerSettings, negative: bool = False
) -> UnconditionalBranch:
    """Build what finds the network that `settings.unconditional` names; a folder's is loaded, on the CPU.

    With `negative` the policy is a negative model (`UnconditionalBranch`), which only `policy` allows. Raises
    InputError if a folder holds no policy of this model, and for a negative model that would not be read.
    """
    if negative:
        check_negative(settings)
        return UnconditionalBranch(module, replace(settings, unconditional=BASE), negative=True)
    if settings.unconditional in (POLICY, BASE):
        return UnconditionalBranch(module, settings)
    other = load_policy(module.backbone, settings.unconditional, settings.drawing)
    return UnconditionalBranch(module, settings, other)
