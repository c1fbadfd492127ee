"""ShuffleNetV2 (arXiv 1807.11164) by torchvision: the backbone of NanoDet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast, get_args

from torch import nn
from torchvision.models import shufflenetv2

from pipeline.config import BaseConfig
from stages.detection.backbone import Backbone, Norm, adopt

Variant = Literal["shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0"]
WIDTHS = {
    "shufflenet_v2_x0_5": (24, 48, 96, 192),
    "shufflenet_v2_x1_0": (24, 116, 232, 464),
    "shufflenet_v2_x1_5": (24, 176, 352, 704),
    "shufflenet_v2_x2_0": (24, 244, 488, 976),
}


class ShuffleNet(Backbone):
    """C2 is what its pooling gives, without a block of its own; the classifier's `conv5` is left out, as NanoDet does."""

    class Config(BaseConfig):
        variant: Variant = "shufflenet_v2_x1_0"
        """Which one."""

    variants = get_args(Variant)
    cuts = ("conv1", "maxpool", "stage2", "stage3", "stage4")

    def __init__(self, config: ShuffleNet.Config, norm: Norm) -> None:
        super().__init__()
        self.channels = WIDTHS[config.variant]
        network = cast(Callable[..., nn.Module], getattr(shufflenetv2, config.variant))()
        adopt(network, "stage4", self)
        for name, module in list(self.named_modules()):  # torchvision lets nobody choose it here
            if isinstance(module, nn.BatchNorm2d):
                self.set_submodule(name, norm(module.num_features))

    @classmethod
    def build(cls, config: ShuffleNet.Config, norm: Norm) -> ShuffleNet:
        return cls(config, norm)
