"""ResNet (arXiv 1512.03385) by torchvision; teachers and students of nearly all papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast, get_args

from torch import nn
from torchvision.models import resnet

from pipeline.config import BaseConfig
from stages.detection.backbone import Backbone, Norm, adopt

Variant = Literal["resnet18", "resnet34", "resnet50", "resnet101"]


class ResNet(Backbone):
    """Its stages are `layer1` to `layer4`; with frozen statistics it is torchvision's detection backbone."""

    class Config(BaseConfig):
        variant: Variant = "resnet50"
        """Which one."""
        style: Literal["pytorch", "caffe"] = "pytorch"
        """Where a block of three convolutions has its stride: in the 3x3, or in the first 1x1, as in weights that came from
        Caffe."""

    variants = get_args(Variant)
    cuts = ("maxpool", "layer1", "layer2", "layer3", "layer4")

    def __init__(self, config: ResNet.Config, norm: Norm) -> None:
        super().__init__()
        network = cast(Callable[..., resnet.ResNet], getattr(resnet, config.variant))(norm_layer=norm)
        width = network.inplanes // 8
        self.channels = (width, width * 2, width * 4, width * 8)
        adopt(network, "layer4", self)
        if config.style == "caffe":
            _stride_first(self)

    @classmethod
    def build(cls, config: ResNet.Config, norm: Norm) -> ResNet:
        return cls(config, norm)


def _stride_first(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, resnet.Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
