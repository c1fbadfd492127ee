"""Backbones with a feature pyramid, from torchvision's blocks; the module names are torchvision's, so its weights load.

Each backbone gives four stages, C2-C5, at strides 4, 8, 16 and 32. `tiny` is a real small network for CPU runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.models import mobilenetv2, resnet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from pipeline.config import BaseConfig
from stages.detection.records import Features

BackboneName = Literal["tiny", "resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2"]
STRIDES = {2: 4, 3: 8, 4: 16, 5: 32}


class PyramidConfig(BaseConfig):
    """What every detector on a feature pyramid sets."""

    backbone: BackboneName = "resnet50"
    """The network under the neck."""
    backbone_norm: Literal["frozen", "batch"] = "frozen"
    """Batch normalisation with fixed statistics (for ImageNet weights) or trained (for random ones)."""
    trainable_layers: int = Field(default=3, ge=0, le=5)
    """How many of the backbone's five parts (stem, four stages) learn, from the last."""
    neck_channels: int = Field(default=256, ge=8)
    """Channels of the feature pyramid."""


class Tiny(nn.Module):
    """A 3x3 stride-2 stem and four stages of one residual block, 16/32/64/128 channels wide."""

    def __init__(self, norm: Callable[..., nn.Module]) -> None:
        super().__init__()
        widths = (16, 32, 64, 128)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), norm(16), nn.ReLU(inplace=True))
        for number, (inside, outside) in enumerate(zip((16, *widths), widths, strict=False), 1):
            shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, 2, bias=False), norm(outside))
            self.add_module(f"layer{number}", resnet.BasicBlock(inside, outside, 2, shortcut, norm_layer=norm))


def _stages(name: BackboneName, norm: Callable[..., nn.Module]) -> tuple[nn.Module, list[str], list[int]]:
    """The network, the names of the modules that end C2-C5, and their channels."""
    layers = ["layer1", "layer2", "layer3", "layer4"]
    if name == "tiny":
        return Tiny(norm), layers, [16, 32, 64, 128]
    if name == "mobilenet_v2":
        # The cut points of HEAD's MobileNetV2 students: the last block of each stride, and the final 1x1 convolution.
        return mobilenetv2.mobilenet_v2(norm_layer=norm).features, ["3", "6", "13", "18"], [24, 32, 96, 1280]
    network = cast(Callable[..., resnet.ResNet], getattr(resnet, name))(norm_layer=norm)
    width = network.inplanes // 8
    return network, layers, [width, width * 2, width * 4, width * 8]


def _freeze(network: nn.Module, name: BackboneName, trainable: int) -> None:
    """Only the last `trainable` of the five parts (stem, four stages) learn."""
    if name == "mobilenet_v2":
        parts = [
            ["0", "1"],
            ["2", "3"],
            ["4", "5", "6"],
            [str(i) for i in range(7, 14)],
            [str(i) for i in range(14, 19)],
        ]
    else:
        parts = [["conv1", "bn1", "stem"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]]
    frozen = {child for part in parts[: 5 - trainable] for child in part}
    for child, module in network.named_children():
        if child in frozen:
            module.requires_grad_(False)


def pyramid(
    config: PyramidConfig, finest: int, extra_levels: int, extra_from: Literal["C5", "P5"] = "C5"
) -> tuple[BackboneWithFPN, tuple[int, ...]]:
    """A backbone with its FPN, and the strides of the levels.

    Levels run from P`finest` to P5; one extra level subsamples P5 (Faster R-CNN), two are stride-2 convolutions from C5
    (RetinaNet) or P5 (FCOS), `extra_from`: torchvision's ways.
    """
    # torchvision freezes statistics with eps 0: its published detection weights were made so. Classification weights
    # were not, see `load_imagenet`.
    norms: dict[str, Callable[..., nn.Module]] = {"frozen": FrozenBatchNorm2d, "batch": nn.BatchNorm2d}
    network, layers, channels = _stages(config.backbone, norms[config.backbone_norm])
    _freeze(network, config.backbone, config.trainable_layers)
    neck_channels = config.neck_channels
    if config.backbone_norm == "frozen":
        for module in network.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.eps = 0.0
    used = range(finest - 2, 4)
    extra: ExtraFPNBlock | None = None
    if extra_levels == 1:
        extra = LastLevelMaxPool()
    elif extra_levels == 2:
        extra = LastLevelP6P7(channels[3] if extra_from == "C5" else neck_channels, neck_channels)
        extra.use_P5 = extra_from == "P5"  # torchvision guesses it from equal channels
    # All four stages are returned (methods read them), though the neck may begin at C3: `run_pyramid` feeds it its own.
    returned = {layer: str(i) for i, layer in enumerate(layers)}
    model = BackboneWithFPN(network, returned, [channels[i] for i in used], neck_channels, extra_blocks=extra)
    model.fpn.extra_blocks = extra  # BackboneWithFPN puts a max-pool where it is given none
    return model, tuple(2**level for level in range(finest, 6 + extra_levels))


def run_pyramid(model: BackboneWithFPN, images_BCHW: Tensor) -> Features:
    """Normalised images to the backbone's stages and the neck's levels."""
    stages: dict[str, Tensor] = model.body(images_BCHW)
    feeding = list(stages)[-len(model.fpn.inner_blocks) :]
    levels: dict[str, Tensor] = model.fpn({name: stages[name] for name in feeding})
    size = (images_BCHW.shape[-2], images_BCHW.shape[-1])
    return Features(tuple(stages.values()), tuple(levels.values()), size)


def load_imagenet(model: BackboneWithFPN, file: Path) -> None:
    """Put a torchvision classification checkpoint into the backbone.

    Raises ValueError naming the tensors that the backbone has and the file has not (or in another shape).
    """
    state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    state = {key.removeprefix("features."): value for key, value in state.items()}
    own = model.body.state_dict()
    missing = [k for k, v in own.items() if "num_batches" not in k and (k not in state or state[k].shape != v.shape)]
    if missing:
        raise ValueError(
            f"{file}: {len(missing)} of {len(own)} backbone tensors are not in it or have another shape, {missing[:3]} first"
        )
    model.body.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    for module in model.body.modules():
        if isinstance(module, FrozenBatchNorm2d) and module.eps == 0:
            module.running_var += 1e-5  # the eps of the network that was trained, exactly, where ours has none
