"""A backbone with its feature pyramid (arXiv 1612.03144), from torchvision's blocks; the module names are torchvision's, so
its weights load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from pydantic import Field
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from pipeline.config import BaseConfig
from stages.detection.backbone import Backbone, BackboneChoice, Norm
from stages.detection.pan import PathAggregation
from stages.detection.published import listed
from stages.detection.records import Features

RGB = tuple[float, float, float]
IMAGENET_MEAN: RGB = (123.675, 116.28, 103.53)
IMAGENET_STD: RGB = (58.395, 57.12, 57.375)


class PyramidConfig(BaseConfig):
    """What every detector on a feature pyramid sets."""

    backbone: BackboneChoice = cast(Any, "resnet50")  # validated as what YAML says
    """The network under the neck: a variant's name (resnet18, mobilenet_v3_large, swin_t, timm/mobilenetv4_conv_small ...), or
    its family with settings."""
    backbone_norm: Literal["frozen", "batch"] = "frozen"
    """Batch normalisation with fixed statistics (for ImageNet weights) or trained (for random ones)."""
    trainable_layers: int = Field(default=3, ge=0, le=5)
    """How many of the backbone's five parts (stem, four stages) learn, from the last."""
    neck_channels: int = Field(default=256, ge=8)
    """Channels of the feature pyramid."""
    pixel_mean: RGB = IMAGENET_MEAN
    """What is taken from red, green and blue; ImageNet's unless the weights were trained otherwise."""
    pixel_std: RGB = IMAGENET_STD
    """By what they are then divided."""


class P6P7(LastLevelP6P7):  # type: ignore[misc]  # torchvision has no types
    """Two stride-2 convolutions, P7's from P6 after a ReLU or, as in OpenMMLab's RetinaNet, without."""

    def __init__(self, inside: int, channels: int, source: Literal["C5", "P5"], relu: bool) -> None:
        super().__init__(inside, channels)
        self.use_P5 = source == "P5"  # torchvision guesses it from equal channels
        self.relu = relu

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        if self.relu:
            found: tuple[list[Tensor], list[str]] = super().forward(p, c, names)
            return found
        p6 = self.p6(p[-1] if self.use_P5 else c[-1])
        return [*p, p6, self.p7(p6)], [*names, "p6", "p7"]


class Pyramid(nn.Module):
    """`body` gives C2-C5, `fpn` the levels of those from which the neck begins."""

    fpn: FeaturePyramidNetwork | PathAggregation

    def __init__(self, body: Backbone, fpn: FeaturePyramidNetwork) -> None:
        super().__init__()
        self.body = body
        self.fpn = fpn


def pyramid(
    config: PyramidConfig,
    finest: int,
    extra_levels: int,
    extra_from: Literal["C5", "P5"] = "C5",
    extra_relu: bool = True,
) -> tuple[Pyramid, tuple[int, ...]]:
    """A backbone with its FPN, and the strides of the levels.

    Levels run from P`finest` to P5; one extra level subsamples P5 (Faster R-CNN), two are stride-2 convolutions from C5
    (RetinaNet) or P5 (FCOS), `extra_from`: torchvision's ways.
    """
    body = config.backbone.cls.build(config.backbone.config, _norm(config.backbone_norm))
    body.freeze(config.trainable_layers)
    neck_channels = config.neck_channels
    extra: ExtraFPNBlock | None = None
    if extra_levels == 1:
        extra = LastLevelMaxPool()
    elif extra_levels == 2:
        extra = P6P7(body.channels[3] if extra_from == "C5" else neck_channels, neck_channels, extra_from, extra_relu)
    # All four stages are returned (methods read them), though the neck may begin at C3: `run_pyramid` feeds it its own.
    fpn = FeaturePyramidNetwork(list(body.channels[finest - 2 :]), neck_channels, extra)
    return Pyramid(body, fpn), tuple(2**level for level in range(finest, 6 + extra_levels))


def _norm(kind: Literal["frozen", "batch"]) -> Norm:
    if kind == "batch":
        return nn.BatchNorm2d

    # torchvision freezes statistics with eps 0: most of its published detection weights were made so. Classification
    # weights were not, see `carry_eps`.
    def frozen(channels: int, **_: float) -> nn.Module:
        return cast(nn.Module, FrozenBatchNorm2d(channels, eps=0.0))

    return frozen


def carry_eps(state: Mapping[str, Tensor], body: Backbone, ahead: str = "") -> dict[str, Tensor]:
    """A state dict whose network had `norm_eps` in its normalisations, for a backbone without any in its frozen ones: the
    variances take it up, and the numbers that come out are the same. `ahead` is what its keys begin with."""
    frozen = {
        f"{ahead}{name}.running_var"
        for name, one in body.named_modules()
        if isinstance(one, FrozenBatchNorm2d) and one.eps == 0
    }
    return {key: value + body.norm_eps if key in frozen else value for key, value in state.items()}


def load_body(body: Backbone, state: Mapping[str, Tensor]) -> None:
    """Put a classification checkpoint, or a detector's with this backbone in it, into a backbone.

    Raises ValueError naming the tensors that the backbone has and the checkpoint has not (or in another shape).
    """
    ahead = next((one for one in ("backbone.body.", "backbone.") if any(key.startswith(one) for key in state)), "")
    found = body.convert({key.removeprefix(ahead): value for key, value in state.items() if key.startswith(ahead)})
    own = {
        k: v
        for k, v in body.state_dict().items()
        if k.partition(".")[0] not in body.untaught and "num_batches" not in k
    }
    missing = [key for key, value in own.items() if key not in found or found[key].shape != value.shape]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(own)} backbone tensors are not in it or have another shape: {listed(missing)}; give "
            "the file of this very network"
        )
    body.load_state_dict(carry_eps({key: found[key] for key in own}, body), strict=False)


def run_pyramid(model: Pyramid, images_BCHW: Tensor) -> Features:
    """Normalised images to the backbone's stages and the neck's levels."""
    stages: tuple[Tensor, ...] = model.body(images_BCHW)
    feeding = stages[-len(model.fpn.inner_blocks) :]
    levels: dict[str, Tensor] = model.fpn({str(number): stage for number, stage in enumerate(feeding)})
    size = (images_BCHW.shape[-2], images_BCHW.shape[-1])
    return Features(stages, tuple(levels.values()), size)
