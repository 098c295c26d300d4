"""Tuning everything that is not a code: codebooks, scales, norms and biases of a block or of the whole model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codegemm_kernels import NumericalError
from codegemm_quant.blocks import BlockCall
from codegemm_quant.fitted_linear import FittedLinear

VALIDATION_SHARE = 16
"""One batch in so many is held out for choosing the best state."""


@dataclass(frozen=True)
class TunePlan:
    """How long and how hard to tune, and what to say about it."""

    epochs: int
    learning_rate: float
    """Largest step, relative to the root mean square of each parameter; a cosine takes it to zero."""
    generator: torch.Generator
    """Orders the batches."""
    name: str
    """What is tuned, for error messages."""
    on_step: Callable[[float], None] = lambda _: None
    """Called after every step with the loss of its batch."""


@dataclass(frozen=True)
class TuneResult:
    """The loss on held-out batches, before and after."""

    before: float
    after: float


def tune(
    module: nn.Module, batches: int, gradients: Callable[[int], Tensor], loss: Callable[[int], Tensor], plan: TunePlan
) -> TuneResult:
    """Adam on the trainable parameters of `module`, one step a batch, under a cosine schedule; keeps the best state.

    `gradients(i)` runs forward and backward on batch i and returns its loss, `loss(i)` only the forward. Every
    sixteenth batch is held out and decides which epoch's state is kept; the state before tuning counts, so the module
    never gets worse on it. Steps are relative to the root mean square of each parameter. Raises NumericalError,
    naming the plan, when the loss is not finite.
    """
    held_out = list(range(0, batches, VALIDATION_SHARE))
    train = [i for i in range(batches) if i not in set(held_out)] or held_out
    fitted = [part for part in module.modules() if isinstance(part, FittedLinear)]
    parameters = [p for p in module.parameters() if p.requires_grad]

    def validate() -> float:
        with torch.no_grad():
            return float(torch.stack([loss(i) for i in held_out]).mean())

    start = lowest = validate()
    best = [p.detach().clone() for p in parameters]
    sizes = [max(float(p.detach().square().mean().sqrt()), 1e-4) for p in parameters]
    groups = [{"params": [p], "lr": plan.learning_rate * size} for p, size in zip(parameters, sizes, strict=True)]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
    steps = max(1, plan.epochs * len(train))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    for _ in range(plan.epochs):
        for pick in torch.randperm(len(train), generator=plan.generator).tolist():
            for linear in fitted:
                linear.refresh(training=True)
            value = gradients(train[pick])
            for linear in fitted:
                linear.collect_gradients()
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
            plan.on_step(float(value))
        for linear in fitted:
            linear.refresh(training=False)
        now = validate()
        if not math.isfinite(now):
            raise NumericalError(f"{plan.name}: the tuning loss is not finite; lower the tuning's learning rate")
        if now < lowest:
            lowest, best = now, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    for linear in fitted:
        linear.refresh(training=False)
    return TuneResult(start, lowest)


def tune_block(
    block: nn.Module, call: BlockCall, inputs: list[Tensor], targets: list[Tensor], plan: TunePlan
) -> TuneResult:
    """Bring the block's outputs on `inputs` to `targets`, lists of [batch, tokens, hidden].

    The loss is the mean squared error relative to the mean square of the target.
    """

    def loss(index: int) -> Tensor:
        target = targets[index].float()
        output = call.run(block, inputs[index]).float()
        return (output - target).square().mean() / target.square().mean().clamp_min(1e-30)

    def gradients(index: int) -> Tensor:
        value = loss(index)
        value.backward()
        return value.detach()

    return tune(block, len(inputs), gradients, loss, plan)
