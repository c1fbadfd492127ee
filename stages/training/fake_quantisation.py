"""A detector that trains as if its convolutions computed in eight bits, and keeps its own weights.

Each convolution sees its input and its weights rounded to what eight bits can hold, with the scales that ONNX Runtime's
quantizer would take: a range of the input for each level of the pyramid, one step for each output channel of the weights.
Gradients pass through the rounding (torch's fake quantisation). Normalisation by batch keeps the statistics that it has:
an export folds them into the weights, where rounding by channel is the same before and after.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Self

import torch
from torch import Tensor, nn

from pipeline.errors import UserError, did_you_mean
from stages.artifacts.exported_model import Int8Runtime
from stages.detection.detector import Detector

_MOMENTUM = 0.05  # of the ranges: twenty batches, so that they follow the weights and forget the first ones
_SMALLEST = 1e-8  # range of a map that is all zero


class FakeQuantised(nn.Conv2d):
    """A convolution with the parameters of another, rounded before they are used.

    `sizes` are the (rows, columns) of the maps that it is given, each with a range of its own: a head's convolution runs
    once a level. `signed` rounds around zero (TensorRT), else a zero point makes use of all of the range (CPUs).
    """

    ranges_S2: Tensor

    def __init__(self, plain: nn.Conv2d, sizes: Sequence[tuple[int, int]], signed: bool) -> None:
        # The ignores: a Conv2d keeps as tuple[int, ...] what its constructor declares as pairs.
        super().__init__(
            plain.in_channels,
            plain.out_channels,
            plain.kernel_size,  # type: ignore[arg-type]
            plain.stride,  # type: ignore[arg-type]
            plain.padding,  # type: ignore[arg-type]
            plain.dilation,  # type: ignore[arg-type]
            plain.groups,
            plain.bias is not None,
            plain.padding_mode,
            device="meta",
        )
        self.weight, self.bias = plain.weight, plain.bias
        self.sizes, self.signed = list(sizes), signed
        self.register_buffer("ranges_S2", torch.zeros(len(sizes), 2, device=plain.weight.device))

    def forward(self, input: Tensor) -> Tensor:
        rounded = self._input(input.float()).to(input.dtype)
        made: Tensor = self._conv_forward(rounded, self._weights().to(self.weight.dtype), self.bias)
        return made

    def _input(self, map_BCHW: Tensor) -> Tensor:
        index = self.sizes.index((map_BCHW.shape[-2], map_BCHW.shape[-1]))
        if self.training:
            self._observe(map_BCHW.detach(), index)
        low, high = self.ranges_S2[index].unbind()
        if self.signed:
            scale = torch.maximum(-low, high).clamp(min=_SMALLEST) / 127
            zero, least, most = torch.zeros_like(scale, dtype=torch.int32), -128, 127
        else:
            scale = (high - low).clamp(min=_SMALLEST) / 255
            zero, least, most = (-low / scale).round().to(torch.int32), 0, 255
        return torch.fake_quantize_per_tensor_affine(map_BCHW, scale, zero, least, most)

    def _observe(self, map_BCHW: Tensor, index: int) -> None:
        # Zero is always in: what pads a map must be exact.
        seen = torch.stack([map_BCHW.amin().clamp(max=0), map_BCHW.amax().clamp(min=0)])
        known = self.ranges_S2[index]
        self.ranges_S2[index] = torch.where(known.any(), known.lerp(seen, _MOMENTUM), seen)

    def _weights(self) -> Tensor:
        weight = self.weight.float()
        scale = weight.detach().flatten(1).abs().amax(1).clamp(min=_SMALLEST) / 127
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)


class Settled(nn.BatchNorm2d):
    """A batch normalisation with the parameters and statistics of another, that normalises by those in training too."""

    def __init__(self, plain: nn.BatchNorm2d) -> None:
        super().__init__(plain.num_features, plain.eps, plain.momentum, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.running_mean, self.running_var = plain.running_mean, plain.running_var
        self.num_batches_tracked = plain.num_batches_tracked

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


def fake_quantise(
    detector: Detector, height: int, width: int, runtime: Int8Runtime, float_layers: Sequence[str] = ()
) -> list[str]:
    """Replace the convolutions of a detector in place, but for those that names or patterns in `float_layers` mean, and
    settle its batch normalisations. Returns the names of the convolutions replaced.

    The sizes of their maps are read off one pass of an empty canvas. Raises UserError for a pattern that means none.
    """
    convolutions = {name: one for name, one in detector.named_modules() if isinstance(one, nn.Conv2d)}
    for pattern in float_layers:
        if not any(fnmatchcase(name, pattern) for name in convolutions):
            raise UserError(f"float_layers: no layer {pattern}{did_you_mean(pattern, convolutions)}")
    sizes = _sizes(detector, convolutions, height, width)
    replaced = [name for name in sizes if not any(fnmatchcase(name, pattern) for pattern in float_layers)]
    for name in replaced:
        detector.set_submodule(name, FakeQuantised(convolutions[name], sizes[name], runtime == "tensorrt"))
    for name, module in list(detector.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            detector.set_submodule(name, Settled(module))
    return replaced


@torch.no_grad()
def _sizes(
    detector: Detector, convolutions: dict[str, nn.Conv2d], height: int, width: int
) -> dict[str, list[tuple[int, int]]]:
    """The distinct sizes of the maps that each convolution is given; one that never runs has none and is left out."""
    found: dict[str, dict[tuple[int, int], None]] = {}

    def watch(name: str, inputs: tuple[Tensor, ...]) -> None:
        found.setdefault(name, {})[inputs[0].shape[-2], inputs[0].shape[-1]] = None

    hooks = [
        one.register_forward_pre_hook(lambda _, inputs, name=name: watch(name, inputs))
        for name, one in convolutions.items()
    ]
    training = detector.training
    device = next(detector.parameters()).device
    detector.eval()
    detector.predict(detector.features(torch.zeros((1, 3, height, width), dtype=torch.uint8, device=device)))
    detector.train(training)
    for hook in hooks:
        hook.remove()
    return {name: list(sizes) for name, sizes in found.items()}
