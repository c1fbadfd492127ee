"""The one training loop, for teacher, control and student: a task goes in, named losses come out, weights move.

Everything that happens in iteration k depends on the seed and on k: the batch, the random numbers, the learning rate.
So a run that was killed and continues from its last checkpoint ends, on a CPU, with the same bits. Ctrl-C and SIGTERM
are heard between steps, and leave a checkpoint.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from lightning_fabric import Fabric
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.config import BaseConfig
from pipeline.errors import PipelineError, UserError
from pipeline.log import logger, progress
from stages.training.checkpoint import Checkpoints
from stages.training.clock import Clock
from stages.training.interruption import uninterrupted
from stages.training.optimizer import OptimizerConfig, make_optimizer, milestones, rate, set_rate
from stages.training.scalars import Scalars, missing
from stages.training.task import TrainingTask

PRECISIONS: dict[str, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "fp32": "32-true",
    "bf16": "bf16-mixed",
    "fp16": "16-mixed",
}


class TrainingConfig(BaseConfig):
    """How long and how a detector is trained."""

    steps: int | None = Field(default=None, ge=0)
    """Length in iterations; give this or `epochs`."""
    epochs: float | None = Field(default=None, ge=0)
    """Length in passes over the training images; 0 only loads the weights."""
    batch_size: int = Field(default=16, ge=1)
    """Images an iteration."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and learning rate."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp32, or mixed precision by autocast."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights; where given, the average is what is kept."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` takes a GPU if there is one."""
    seed: int = Field(default=0, ge=0)
    """Decides initial weights, order of images and augmentation."""
    validate_every: int | None = Field(default=None, ge=1)
    """Steps between measurements of AP on validation images while training."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between checkpoints, from which a killed run continues."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl; each is the mean since the last."""
    tensorboard: bool = False
    """Write the same numbers as TensorBoard events too, for `tensorboard --logdir runs`; needs the extra `tensorboard`."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either `steps` or `epochs`")
        return self

    def iterations(self, iterations_per_epoch: int) -> int:
        """Length in iterations."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return round(self.epochs * iterations_per_epoch)


def device_of(config: TrainingConfig) -> torch.device:
    """Where a training will run. Raises UserError where that cannot be what was asked for."""
    there = torch.cuda.is_available()
    if config.device == "cuda" and not there:
        raise UserError(f"device: cuda asked for, torch {torch.__version__} finds none here; set device: cpu or auto")
    device = torch.device("cuda" if there and config.device != "cpu" else "cpu")
    if device.type == "cpu" and config.precision == "fp16":
        raise UserError("precision: fp16 does not exist on a CPU; set precision: bf16 or fp32")
    return device


class Movable(Protocol):
    """Targets of a batch."""

    def to(self, device: torch.device) -> Any: ...


@dataclass
class Fitted:
    """What a training left so far: its length, the seconds spent in steps (not in loading or validation), the sums of the
    losses since the last line of metrics.jsonl, the step after which AP was measured last, and the seconds in which steps
    waited for their batch."""

    iterations: int
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    summed: int = 0
    evaluated: int = 0
    waited: float = 0.0

    def add(self, values: dict[str, float]) -> None:
        """Count the losses of one step."""
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in values.items()}
        self.summed += 1

    def means(self) -> dict[str, float]:
        """The mean losses since the last call."""
        found = {name: value / self.summed for name, value in self.sums.items()}
        self.sums, self.summed = {}, 0
        return found


class Trainer:
    """One training in one directory (metrics.jsonl, checkpoints). `task` is trained in place; with `ema` the averaged
    weights are in it at the end."""

    def __init__(self, task: TrainingTask, config: TrainingConfig, iterations_per_epoch: int, directory: Path) -> None:
        self.config = config
        self.iterations = config.iterations(iterations_per_epoch)
        self.per_epoch = iterations_per_epoch
        self.milestones = milestones(config.optimizer, self.iterations)
        self.checkpoints = Checkpoints(directory)
        self.directory = directory
        device = device_of(config)
        if problem := missing(config.tensorboard):
            raise UserError(problem)
        self.fabric = Fabric(accelerator=device.type, devices=1, precision=PRECISIONS[config.precision])
        # Channels last: an eighth faster on CPUs, and what mixed precision wants on GPUs.
        self.task = task.to(memory_format=torch.channels_last)
        self.module, self.optimizer = self.fabric.setup(task, make_optimizer(config.optimizer, task.parameter_groups()))
        decay, kept = config.ema, self.task.student
        self.average: AveragedModel | None = None
        if decay:
            averaging = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(kept, multi_avg_fn=averaging, use_buffers=True)
        self.fitted = Fitted(0)
        self._saved = 0

    def fit(
        self,
        batches: Callable[[int], Iterator[tuple[Tensor, Movable]]],
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    ) -> Fitted:
        """Train from the last checkpoint, or from the start. `batches(k)` yields images and targets from step k on;
        `evaluate` gets the detector whose weights count.

        Raises PipelineError naming the loss that is not finite, and UserError where a checkpoint cannot be written. An
        interruption leaves a checkpoint of the last whole step.
        """
        self._resume()
        source = batches(self.fitted.iterations)
        with (
            Scalars(self.directory, self.fitted.iterations, self.config.tensorboard) as scalars,
            progress("train", total=self.iterations, unit="step", done=self.fitted.iterations) as advance,
        ):
            try:
                while True:
                    if evaluate and self._to_evaluate():
                        self._evaluate(evaluate, scalars)
                    if self._to_save():
                        self._save()
                    if self.fitted.iterations >= self.iterations:
                        break
                    begun = time.perf_counter()
                    images, targets = next(source)
                    self.fitted.waited += time.perf_counter() - begun
                    with uninterrupted():
                        values = self._advance(images, targets, scalars)
                    advance(1, loss=sum(values.values()))
            except KeyboardInterrupt:
                if self.fitted.iterations > self._saved:
                    self._save()
                    logger.info("interrupted: step %d is saved", self.fitted.iterations)
                raise
        if self.average:
            self.task.student.load_state_dict(self.average.module.state_dict())
        return self.fitted

    def _advance(self, images: Tensor, targets: Movable, scalars: Scalars) -> dict[str, float]:
        """One iteration and all that is noted of it; the losses as numbers."""
        iteration = self.fitted.iterations
        begun = time.perf_counter()
        values = self._step(images, targets, iteration)
        self.fitted.seconds += time.perf_counter() - begun
        self.fitted.iterations = done = iteration + 1
        self.fitted.add(values)
        if noted := self.task.observations():
            scalars.write(done, **noted)
        if done % self.config.log_every == 0 or done == self.iterations:
            scalars.write(done, lr=rate(self.config.optimizer, iteration, self.iterations), **self.fitted.means())
        return values

    def _to_evaluate(self) -> bool:
        done, every = self.fitted.iterations, self.config.validate_every
        due = bool(every) and done > 0 and (done % (every or 1) == 0 or done == self.iterations)
        return due and self.fitted.evaluated < done

    def _evaluate(self, evaluate: Callable[[nn.Module], dict[str, float]], scalars: Scalars) -> None:
        found = evaluate(self._kept())
        with uninterrupted():
            scalars.write(self.fitted.iterations, **found)
            self.fitted.evaluated = self.fitted.iterations

    def _to_save(self) -> bool:
        done = self.fitted.iterations
        return done > self._saved and (done % self.config.checkpoint_every == 0 or done == self.iterations)

    def _step(self, images: Tensor, targets: Movable, iteration: int) -> dict[str, float]:
        """One iteration; the losses as numbers."""
        seed = self.config.seed * 1_000_003 + iteration
        torch.manual_seed(seed)  # RoI sampling draws from the global generator
        random.seed(seed)  # a user's own method may draw from any of the three
        np.random.seed(seed % 2**32)
        self.module.train()
        set_rate(self.optimizer, rate(self.config.optimizer, iteration, self.iterations))
        clock = Clock(iteration, self.iterations, self.per_epoch, self.milestones)
        device = self.fabric.device
        losses: dict[str, Tensor] = self.module(
            # uint8 travels, a quarter of float's bytes; the detector normalises where it computes.
            images.to(device, memory_format=torch.channels_last, non_blocking=True),
            targets.to(device),
            clock,
        )
        total = torch.stack(list(losses.values())).sum()
        numbers = torch.stack([*(loss.detach().float() for loss in losses.values()), total.detach().float()])
        values = dict(zip([*losses, "total"], numbers.tolist(), strict=True))
        if not torch.isfinite(numbers).all():
            wrong = {name: value for name, value in values.items() if not abs(value) < float("inf")}
            wrong = {name: value for name, value in wrong.items() if name != "total" or len(wrong) == 1}
            raise PipelineError(
                f"training stopped at step {iteration}: loss {wrong} is not finite; lower optimizer.lr, set optimizer.clip, "
                "or train in fp32"
            )
        self.optimizer.zero_grad()
        self.fabric.backward(total)
        if self.config.optimizer.clip:
            self.fabric.clip_gradients(self.module, self.optimizer, max_norm=self.config.optimizer.clip)
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.task.student)
        return {name: values[name] for name in losses}

    def _kept(self) -> nn.Module:
        """The detector with the weights that will be kept."""
        return self.average.module if self.average else self.task.student

    def _save(self) -> None:
        """Write a checkpoint of this step."""
        with uninterrupted():
            self.checkpoints.save(
                {
                    "task": self.task.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "average": self.average.state_dict() if self.average else None,
                    "precision": self.fabric.strategy.precision.state_dict(),  # fp16: how far losses are scaled
                    "fitted": vars(self.fitted),
                }
            )
            self._saved = self.fitted.iterations

    def _resume(self) -> None:
        state = self.checkpoints.load(self.fabric.device)
        if state is None:
            return
        self.task.load_state_dict(state["task"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.fitted = Fitted(**state["fitted"])
        self._saved = self.fitted.iterations
