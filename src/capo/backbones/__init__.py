"""Model families (UNet, MMDiT) behind one interface, `Backbone`."""

from capo.backbones.base import Backbone
from capo.backbones.mmdit import MMDiTBackbone
from capo.backbones.unet import UNetBackbone

__all__ = ["Backbone", "MMDiTBackbone", "UNetBackbone"]
