"""How a network is stored and laid out while it draws images: precision, memory format, compilation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from capo.backbones.parallel import lay_out
from capo.backbones.precision import half_stored

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Drawing:
    """How a network draws.

    Attributes:
        precision: precision of its passes, by Lightning's name; for a mixed one, linear and convolution
            weights are stored in autocast's dtype, to which it would cast them in every pass.
        channels_last: use the channels-last memory format for convolutions.
        compile: apply torch.compile to the repeated blocks.
    """

    precision: str = "32-true"
    channels_last: bool = False
    compile: bool = False

    @property
    def plain_blocks(self) -> bool:
        """Whether its results are those of a network that is neither compiled nor laid out anew."""
        return not (self.channels_last or self.compile)


PLAIN = Drawing()


def prepared(network: Network, drawing: Drawing) -> Network:
    """Store and lay out a network, in place, as it draws under `drawing`; return it.

    The precision alone changes no result: the weights are those that autocast would compute with.
    """
    half_stored(network, drawing.precision)
    lay_out(network, channels_last=drawing.channels_last, compiled=drawing.compile)
    return network
