"""Batch normalisation folded into the convolutions before it, so that the exported weights are tensors we can name."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import FrozenBatchNorm2d

from stages.detection.detector import Detector


def _plain(norm: nn.Module) -> nn.BatchNorm2d:
    """A frozen normalisation as the ordinary one in eval mode."""
    if isinstance(norm, nn.BatchNorm2d):
        return norm
    assert isinstance(norm, FrozenBatchNorm2d)
    plain = nn.BatchNorm2d(len(norm.get_buffer("weight")), eps=norm.eps).eval()
    plain.load_state_dict(norm.state_dict(), strict=False)
    return plain


@torch.no_grad()
def folded(detector: Detector, images_BCHW: Tensor) -> Detector:
    """A copy of `detector` in eval mode without the batch normalisations that directly follow a convolution.

    Which follows which is read off one forward pass on `images_BCHW`: a normalisation belongs to the convolution whose
    output tensor it is given.
    """
    model = copy.deepcopy(detector).eval()
    made: dict[int, str] = {}
    kept: list[Tensor] = []  # so that no tensor's id is reused during the pass
    pairs: list[tuple[str, str]] = []
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):

            def after(_: nn.Module, __: object, output: Tensor, name: str = name) -> None:
                made[id(output)] = name
                kept.append(output)

            hooks.append(module.register_forward_hook(after))
        elif isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):

            def before(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                if id(inputs[0]) in made:
                    pairs.append((made[id(inputs[0])], name))

            hooks.append(module.register_forward_pre_hook(before))
    model.predict(model.features(images_BCHW))
    for hook in hooks:
        hook.remove()
    for convolution, norm in pairs:
        # Its types ask for classes that are known here by their names alone.
        fused = fuse_conv_bn_eval(model.get_submodule(convolution), _plain(model.get_submodule(norm)))  # type: ignore[type-var]
        model.set_submodule(convolution, fused)
        model.set_submodule(norm, nn.Identity())
    return model
