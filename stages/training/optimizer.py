"""Optimizer and learning rate. The rate is a function of the iteration alone, so there is no scheduler to save."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from pipeline.config import BaseConfig


class OptimizerConfig(BaseConfig):
    """How weights move."""

    name: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum 0.9, or AdamW."""
    lr: float = Field(default=0.01, gt=0)
    """Learning rate after the warm-up."""
    beta2: float = Field(default=0.999, gt=0, lt=1)
    """AdamW's memory of the gradients' size; below 0.999 a short training forgets the first, large gradients in time."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Weight decay of all parameters."""
    warmup: int = Field(default=500, ge=0)
    """Steps over which the rate rises linearly from a thousandth."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """After the warm-up: divide by ten at the milestones, fall to zero along a cosine, or stay."""
    milestones: tuple[float, ...] = (2 / 3, 11 / 12)
    """Where `step` divides the rate by ten, as shares of the whole training (8 and 11 of 12 epochs)."""
    clip: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient of all parameters together."""


def milestones(config: OptimizerConfig, iterations: int) -> tuple[int, ...]:
    """The iterations at which the rate drops; none where the schedule has none."""
    return tuple(round(share * iterations) for share in config.milestones) if config.schedule == "step" else ()


def rate(config: OptimizerConfig, iteration: int, iterations: int) -> float:
    """Learning rate at `iteration` (0-based) of `iterations`."""
    if iteration < config.warmup:
        return config.lr * (0.001 + 0.999 * iteration / config.warmup)
    if config.schedule == "cosine":
        done = (iteration - config.warmup) / max(1, iterations - config.warmup)
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    drops = sum(iteration >= milestone for milestone in milestones(config, iterations))
    return float(config.lr * 0.1**drops)


def make_optimizer(
    config: OptimizerConfig, groups: Sequence[tuple[list[nn.Parameter], float]]
) -> torch.optim.Optimizer:
    """An optimizer over (parameters, share of the learning rate) groups."""
    described = [{"params": parameters, "scale": scale} for parameters, scale in groups]
    if config.name == "sgd":
        return torch.optim.SGD(described, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
    return torch.optim.AdamW(described, lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group its share of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
