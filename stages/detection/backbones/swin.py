"""Swin Transformer (arXiv 2103.14030, 2111.09883) by torchvision, for teachers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, cast, get_args

from torch import Tensor, nn
from torchvision.models import swin_transformer

from pipeline.config import BaseConfig
from stages.detection.backbone import Backbone, Norm, adopt

Variant = Literal["swin_t", "swin_s", "swin_v2_t", "swin_v2_s"]


class Swin(Backbone):
    """Its stages leave as BCHW, each through a layer normalisation of its own, as in detectors built on it (arXiv
    2103.14030, appendix A2.2). It has no batch normalisation: `backbone_norm` changes nothing."""

    class Config(BaseConfig):
        variant: Variant = "swin_t"
        """Which one."""

    variants = get_args(Variant)
    channels = (96, 192, 384, 768)
    cuts = ("0", "1", "3", "5", "7")
    untaught = ("norms",)

    def __init__(self, config: Swin.Config) -> None:
        super().__init__()
        network = cast(Callable[..., nn.Module], getattr(swin_transformer, config.variant))()
        adopt(cast(nn.Module, network.features), self.cuts[-1], self)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.channels)

    @classmethod
    def build(cls, config: Swin.Config, norm: Norm) -> Swin:
        return cls(config)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        stages: list[Tensor] = []
        value = images_BCHW
        for name, child in self.named_children():
            if name != "norms":
                value = child(value)  # BHWC from the first on
            if name in self.cuts[1:]:
                stages.append(self.norms[len(stages)](value).permute(0, 3, 1, 2))
        return tuple(stages)

    def convert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key.removeprefix("features."): value for key, value in state.items()}
