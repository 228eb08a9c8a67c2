"""Model families (UNet, MMDiT) behind one interface, `Backbone`."""

from capo.backbones.base import Backbone
from capo.backbones.family import Family
from capo.backbones.mmdit import MMDiTBackbone
from capo.backbones.unet import UNetBackbone

# Class of a denoiser -> its family, for configs of which nothing else is known.
FAMILIES: dict[str, type[Family]] = {
    family.denoiser_class: family for family in (UNetBackbone, MMDiTBackbone)
}

__all__ = ["FAMILIES", "Backbone", "Family", "MMDiTBackbone", "UNetBackbone"]
