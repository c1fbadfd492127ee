"""A real small network for CPU runs: 0.3 million parameters."""

from __future__ import annotations

from torch import nn
from torchvision.models.resnet import BasicBlock

from pipeline.config import BaseConfig
from stages.detection.backbone import Backbone, Norm


class Tiny(Backbone):
    """A 3x3 stride-2 stem and four stages of one residual block, 16/32/64/128 channels wide."""

    class Config(BaseConfig):
        """It has no settings."""

    channels = (16, 32, 64, 128)
    cuts = ("stem", "layer1", "layer2", "layer3", "layer4")

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), norm(16), nn.ReLU(inplace=True))
        for number, (inside, outside) in enumerate(zip((16, *self.channels), self.channels, strict=False), 1):
            shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, 2, bias=False), norm(outside))
            self.add_module(f"layer{number}", BasicBlock(inside, outside, 2, shortcut, norm_layer=norm))

    @classmethod
    def build(cls, config: Tiny.Config, norm: Norm) -> Tiny:
        return cls(norm)
