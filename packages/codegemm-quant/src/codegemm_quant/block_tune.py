"""Tuning one block: codebooks, scales, norms and biases against the dense block's output. Codes stay."""

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
"""One batch in so many is kept for choosing the best state."""


@dataclass(frozen=True)
class TuneResult:
    """Squared error of the block's output relative to the size of the target, on held-out batches."""

    before: float
    after: float


def block_error(block: nn.Module, call: BlockCall, inputs: list[Tensor], targets: list[Tensor]) -> float:
    """sum |block(x) - target|² / sum |target|² over batches."""
    difference = size = 0.0
    with torch.no_grad():
        for hidden, target in zip(inputs, targets, strict=True):
            output = call.run(block, hidden).float()
            difference += float((output - target.float()).square().sum(dtype=torch.float64))
            size += float(target.float().square().sum(dtype=torch.float64))
    return difference / max(size, 1e-30)


def tune_block(
    block: nn.Module,
    call: BlockCall,
    inputs: list[Tensor],
    targets: list[Tensor],
    *,
    epochs: int,
    learning_rate: float,
    generator: torch.Generator,
    name: str,
    on_step: Callable[[float], None] = lambda _: None,
) -> TuneResult:
    """Adam on everything in the block that is not a code, one step a batch, under a cosine schedule.

    inputs and targets are lists of [batch, tokens, hidden]; every sixteenth batch is held out and decides which
    epoch's state is kept; the state before tuning counts, so the block never gets worse on it. Steps are relative
    to the size of each parameter. `on_step` is called after every step with the relative error of its batch. Raises
    NumericalError, naming the block, when the loss is not finite.
    """
    held_out = list(range(0, len(inputs), VALIDATION_SHARE)) if len(inputs) > 1 else [0]
    train = [i for i in range(len(inputs)) if i not in held_out] or held_out
    fitted = [module for module in block.modules() if isinstance(module, FittedLinear)]
    parameters = [p for p in block.parameters() if p.requires_grad]
    check = ([inputs[i] for i in held_out], [targets[i] for i in held_out])
    start = lowest = block_error(block, call, *check)
    best = [p.detach().clone() for p in parameters]

    sizes = [max(float(p.detach().square().mean().sqrt()), 1e-4) for p in parameters]
    groups = [{"params": [p], "lr": learning_rate * size} for p, size in zip(parameters, sizes, strict=True)]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
    steps = epochs * len(train)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    for _ in range(epochs):
        for pick in torch.randperm(len(train), generator=generator).tolist():
            hidden, target = inputs[train[pick]], targets[train[pick]].float()
            for linear in fitted:
                linear.refresh(training=True)
            output = call.run(block, hidden).float()
            loss = (output - target).square().mean() / target.square().mean().clamp_min(1e-30)
            loss.backward()
            for linear in fitted:
                linear.collect_gradients()
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
            on_step(float(loss))
        for linear in fitted:
            linear.refresh(training=False)
        error = block_error(block, call, *check)
        if not math.isfinite(error):
            raise NumericalError(f"{name}: the loss of the block tuning is not finite; lower --tune-learning-rate")
        if error < lowest:
            lowest, best = error, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    for linear in fitted:
        linear.refresh(training=False)
    return TuneResult(start, lowest)
