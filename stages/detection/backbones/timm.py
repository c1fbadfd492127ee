"""Any network of timm (extra `timm`, Apache-2.0) whose features have strides 4, 8, 16 and 32: MobileNetV4, EfficientNet-lite,
ConvNeXt and the like. Channels and strides are timm's own feature information. Nothing is downloaded.

Where timm joins a normalisation and its activation in one module, they are two here, so that who looks for batch
normalisations (freezing, folding, training for eight bits) finds plain ones and loses no activation.
"""

from __future__ import annotations

import importlib.util
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import field_validator
from torch import Tensor, nn

from pipeline.config import BaseConfig
from pipeline.errors import closest
from stages.detection.backbone import STRIDES, Backbone, Norm


class Timm(Backbone):
    """A network of timm by its name there, as `timm/mobilenetv4_conv_small`."""

    class Config(BaseConfig):
        variant: str
        """Its name in timm, without a tag of weights."""

        @field_validator("variant")
        @classmethod
        def _fits(cls, variant: str) -> str:
            """There is such a network and it has our strides; found from shapes alone."""
            with torch.device("meta"):
                _features(variant)
            return variant

    def __init__(self, config: Timm.Config, norm: Norm) -> None:
        super().__init__()
        self.network = _features(config.variant)
        stages = _stages(self.network)
        self.channels = tuple(one["num_chs"] for one in stages)
        ends = [_stem(self.network), *(one["module"] for one in stages)]
        self.cuts = tuple(f"network.{_flat(end, self.network)}" for end in ends)
        settings: Any = self.network.pretrained_cfg
        self.pixels = tuple(255 * value for value in settings["mean"]), tuple(255 * value for value in settings["std"])
        self.pairs = _plain_norms(self.network, norm)

    @classmethod
    def build(cls, config: Timm.Config, norm: Norm) -> Timm:
        return cls(config, norm)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network(images_BCHW))

    def convert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A normalisation may be half of a pair here, and timm's lists of features flatten `stages.0` to `stages_0`."""
        found = {}
        for own in self.state_dict():
            name = own.removeprefix("network.")
            pair = next((pair for pair in self.pairs if name.startswith(f"{pair}.norm.")), None)
            name = name.replace(f"{pair}.norm.", f"{pair}.") if pair else name
            for theirs in (name, re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", name)):
                if theirs in state:
                    found[own] = state[theirs]
        return found


def _features(variant: str) -> nn.Module:
    """The network with random weights, giving the maps of our strides.

    Raises ValueError where timm is not installed, does not know it, or its features have other strides.
    """
    if importlib.util.find_spec("timm") is None:
        raise ValueError(f"{variant} is a network of timm, which is not installed; pip install 'headstart[timm]'")
    timm: Any = importlib.import_module("timm")
    if not timm.is_model(variant):
        close = closest(variant, timm.list_models())
        raise ValueError(
            f"timm has no {variant}; " + (f"did you mean '{close}'?" if close else "see timm.list_models()")
        )
    try:
        network = timm.create_model(variant, features_only=True)
    except (RuntimeError, AttributeError) as problem:
        raise ValueError(f"timm gives no features of {variant}: {problem}; take a convolutional one") from problem
    reductions = network.feature_info.reduction()
    wanted = [number for number, reduction in enumerate(reductions) if reduction in STRIDES]
    form = getattr(network, "output_fmt", "NCHW")
    if [reductions[number] for number in wanted] != list(STRIDES) or form != "NCHW":
        raise ValueError(
            f"the features of timm's {variant} have the strides {reductions}, as {form}; give one with 4, 8, 16, 32 as NCHW"
        )
    made: nn.Module = timm.create_model(variant, features_only=True, out_indices=wanted)
    return made


def _stages(network: Any) -> list[dict[str, Any]]:
    """timm's information on each of our stages."""
    return list(network.feature_info.get_dicts())


def _stem(network: Any) -> str:
    """The module that ends the stem: what timm says gives stride 2, else the first of all."""
    known = network.feature_info.info
    return str(next((one["module"] for one in known if one["reduction"] == 2), next(iter(network.named_children()))[0]))


def _flat(module: str, network: nn.Module) -> str:
    """The name of a module of timm's information in a network whose lists may have been flattened."""
    return module if module.partition(".")[0] in dict(network.named_children()) else module.replace(".", "_", 1)


def _plain_norms(network: nn.Module, norm: Norm) -> list[str]:
    """Replace batch normalisations by ours; the names of those that had an activation, which follows as `act`."""
    pairs = []
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            plain = norm(module.num_features, eps=module.eps, momentum=module.momentum)
            act = getattr(module, "act", None)
            if act is None:
                network.set_submodule(name, plain)
            else:
                assert isinstance(module.drop, nn.Identity)
                network.set_submodule(name, nn.Sequential(OrderedDict(norm=plain, act=act)))
                pairs.append(name)
    return pairs
