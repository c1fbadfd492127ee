"""Global average pooling as the mean that it is.

torch.export takes an adaptive pooling to one place apart into a mean and a gather by computed indices, which costs a dozen
nodes and stores tensors that nobody learnt. A squeeze-and-excitation block (MobileNetV3) has one.
"""

from __future__ import annotations

from torch import Tensor, nn


class GlobalMean(nn.Module):
    """BCHW to BC11."""

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """The mean of each channel."""
        return map_BCHW.mean((2, 3), keepdim=True)


def with_global_means(model: nn.Module) -> None:
    """Put a mean in the place of every adaptive average pooling to one place, in the model itself."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
            model.set_submodule(name, GlobalMean())
