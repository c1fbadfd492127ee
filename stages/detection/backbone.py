"""Backbone: the network under a neck. A family of networks is one file of `backbones/`.

    images_BCHW --stem--> --stage--> C2 --stage--> C3 --stage--> C4 --stage--> C5
                               stride 4         8             16            32

In YAML the name of a variant is enough: `resnet18` is `{name: resnet, variant: resnet18}`, `timm/mobilenetv4_conv_small` is
`{name: timm, variant: mobilenetv4_conv_small}`. A path to a user's own file works as for any choice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator
from torch import Tensor, nn

from pipeline import lookup
from pipeline.config import BaseConfig, Choice
from pipeline.errors import did_you_mean

STRIDES = (4, 8, 16, 32)
Norm = Callable[..., nn.Module]  # from channels to a normalisation


class Backbone(nn.Module, ABC):
    """Four stages, C2 to C5. The modules carry the names of the network that its ImageNet weights were made for."""

    class Config(BaseConfig):
        """Each family has its own."""

    variants: ClassVar[tuple[str, ...]] = ()  # names in YAML that mean this family; its own name does so too
    channels: tuple[int, ...]  # of C2-C5
    cuts: tuple[str, ...]  # the modules that end the stem, C2, C3, C4 and C5
    norm_eps: float = 1e-5  # of the batch normalisations that its ImageNet weights were trained with
    untaught: ClassVar[tuple[str, ...]] = ()  # modules that no classification checkpoint has
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # mean and std of its weights; ImageNet's if None

    @classmethod
    @abstractmethod
    def build(cls, config: Any, norm: Norm) -> Backbone:
        """A network with random weights, whose batch normalisations, if it has any, `norm` makes."""

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Normalised images to C2-C5, BCHW; here of a network whose children run one after the other."""
        stages: list[Tensor] = []
        value = images_BCHW
        for name, child in self.named_children():
            value = child(value)
            if name in self.cuts[1:]:
                stages.append(value)
        return tuple(stages)

    def freeze(self, trainable: int) -> None:
        """Only the last `trainable` of the five parts (stem, four stages) learn, and what lies behind them."""
        if trainable == len(self.cuts):
            return
        last = self.cuts[len(self.cuts) - 1 - trainable]
        names = [name for name, _ in self.named_modules()]
        end = max(number for number, name in enumerate(names) if f"{name}.".startswith(f"{last}."))
        for name in names[1 : end + 1]:
            for parameter in self.get_submodule(name).parameters(recurse=False):
                parameter.requires_grad_(False)

    def convert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of a classifier of this family under our names; what is not the backbone's may stay in it."""
        return dict(state)


def adopt(network: nn.Module, last: str, into: Backbone) -> None:
    """Make the children of a network, up to the one named `last`, children of a backbone."""
    for name, child in network.named_children():
        into.add_module(name, child)
        if name == last:
            return


def family(value: object) -> object:
    """What YAML says of a backbone with its family's file for its name: a variant's name becomes a setting."""
    if not (isinstance(value, str) or (isinstance(value, Mapping) and isinstance(value.get("name"), str))):
        return value  # `Choice` says what is wrong with it
    settings: dict[str, Any] = {"name": value} if isinstance(value, str) else dict(value)
    name, package = str(settings["name"]), f"{__name__}s"
    families = lookup.names(package)
    if name in families or Path(name).suffix == ".py":
        return value
    ahead, slash, variant = name.partition("/")
    if slash and ahead in families:
        return {**settings, "name": ahead, "variant": variant}
    known: list[str] = []
    for one in families:
        variants = lookup.subclass(lookup.module(package, one), Backbone).variants
        if name in variants:
            return {**settings, "name": one, "variant": name}
        known += variants or [one]
    raise ValueError(f"no backbone '{name}'{did_you_mean(name, known)}")


BackboneChoice = Annotated[Choice[Backbone], BeforeValidator(family)]
