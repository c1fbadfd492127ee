"""A path aggregation network of depthwise blocks: top-down as a feature pyramid, then bottom-up (arXiv 1803.01534).

    C5 --1x1--> + ------------------> block --> P5 --> P6 ...
                | up                    ^ down
    C4 --1x1--> + --block-------------> + block --> P4
                      | up                ^ down
    C3 --1x1--------> + --block--> P3 ----'

Maps are added where they meet, as published. A block is a depthwise 5x5 and a 1x1 convolution, each with batch
normalisation and ReLU: large kernels are cheap there and make up for few layers (arXiv 2111.00902).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops.misc import Conv2dNormActivation


def block(channels: int, stride: int = 1) -> nn.Sequential:
    """BCHW to BCHW, a depthwise and a pointwise convolution; stride 2 halves rows and columns."""
    return nn.Sequential(
        Conv2dNormActivation(channels, channels, 5, stride, groups=channels, inplace=False),
        Conv2dNormActivation(channels, channels, 1, inplace=False),
    )


class PathAggregation(nn.Module):
    """A neck that stands where torchvision's FeaturePyramidNetwork does: named maps in, named maps out, finest first.

    `extra` levels above the coarsest are blocks of stride 2.
    """

    def __init__(self, inside: Sequence[int], channels: int, extra: int) -> None:
        super().__init__()
        self.inner_blocks = nn.ModuleList(Conv2dNormActivation(one, channels, 1, inplace=False) for one in inside)
        self.top_down = nn.ModuleList(block(channels) for _ in inside[1:])
        self.down = nn.ModuleList(block(channels, 2) for _ in inside[1:])
        self.bottom_up = nn.ModuleList(block(channels) for _ in inside[1:])
        self.extra = nn.ModuleList(block(channels, 2) for _ in range(extra))

    def forward(self, stages: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Backbone stages BCHW by name to levels BCHW, all of one width, the extra ones named `extra0`, `extra1` ..."""
        maps = [inner(stage) for inner, stage in zip(self.inner_blocks, stages.values(), strict=True)]
        for number in range(len(maps) - 2, -1, -1):
            up = functional.interpolate(maps[number + 1], size=maps[number].shape[-2:], mode="nearest")
            maps[number] = self.top_down[number](maps[number] + up)
        for number, (down, mixed) in enumerate(zip(self.down, self.bottom_up, strict=True)):
            maps[number + 1] = mixed(maps[number + 1] + down(maps[number]))
        levels = dict(zip(stages, maps, strict=True))
        last = maps[-1]
        for number, further in enumerate(self.extra):
            last = levels[f"extra{number}"] = further(last)
        return levels
