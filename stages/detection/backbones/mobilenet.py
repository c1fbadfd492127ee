"""MobileNetV2 (arXiv 1801.04381) and V3 (1905.02244) by torchvision, for the edge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, cast, get_args

from torch import Tensor, nn
from torchvision.models import mobilenet_v2, mobilenet_v3_large, mobilenet_v3_small
from torchvision.ops import SqueezeExcitation

from pipeline.config import BaseConfig
from stages.detection.backbone import Backbone, Norm, adopt

Variant = Literal["mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small"]
# The network, the last blocks of the stem and of each stride, their channels, and the eps of its normalisation. C5 is the
# final 1x1 convolution; the cut points of V2 are those of HEAD's students.
_NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...], tuple[int, ...], float]] = {
    "mobilenet_v2": (mobilenet_v2, ("1", "3", "6", "13", "18"), (24, 32, 96, 1280), 1e-5),
    "mobilenet_v3_large": (mobilenet_v3_large, ("1", "3", "6", "12", "16"), (24, 40, 112, 960), 1e-3),
    "mobilenet_v3_small": (mobilenet_v3_small, ("0", "1", "3", "8", "12"), (16, 24, 48, 576), 1e-3),
}


class Mean(nn.Module):
    """Over the map, BCHW to BC11: what torch's adaptive pooling computes, which is exported as a gathering of every cell."""

    def forward(self, map_BCHW: Tensor) -> Tensor:
        return map_BCHW.mean((2, 3), keepdim=True)


class MobileNet(Backbone):
    """Inverted residual blocks, named by their numbers."""

    class Config(BaseConfig):
        variant: Variant = "mobilenet_v2"
        """Which one."""

    variants = get_args(Variant)

    def __init__(self, config: MobileNet.Config, norm: Norm) -> None:
        super().__init__()
        make, self.cuts, self.channels, self.norm_eps = _NETWORKS[config.variant]
        momentum = 0.1 if config.variant == "mobilenet_v2" else 0.01
        network = make(norm_layer=partial(norm, eps=self.norm_eps, momentum=momentum))
        adopt(cast(nn.Module, network.features), self.cuts[-1], self)
        for module in self.modules():
            if isinstance(module, SqueezeExcitation):
                module.avgpool = Mean()

    @classmethod
    def build(cls, config: MobileNet.Config, norm: Norm) -> MobileNet:
        return cls(config, norm)

    def convert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key.removeprefix("features."): value for key, value in state.items()}
