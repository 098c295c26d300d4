"""Tuning everything that is not a code: codebooks, scales, norms and biases of a block or of the whole model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codegemm_kernels import NumericalError
from codegemm_quant.adam import RelativeAdam
from codegemm_quant.blocks import BlockCall
from codegemm_quant.capture import CapturedStep
from codegemm_quant.fitted_linear import FittedLinear
from codegemm_quant.hidden_states import HiddenStates
from codegemm_quant.parallel import ALONE, Team

VALIDATION_SHARE = 16
"""One batch in so many is held out for choosing the best state."""

Fetch = Callable[[Sequence[int]], Iterator[tuple[Tensor, ...]]]
"""Batches by number, each a tuple of tensors whose first axis is windows, one after the other."""


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
    windows: int | None = None
    """Windows that go through the module at once; None for the whole batch."""
    team: Team = ALONE
    """Each process has a share of every batch's windows."""
    versions: int = 1
    """Versions of all batches, one after the other; each pass is over the next, and the first alone is held out of."""


@dataclass(frozen=True)
class TuneResult:
    """The loss on held-out batches, before and after."""

    before: float
    after: float


def split_batches(batches: int) -> tuple[list[int], list[int]]:
    """Those that train, and every sixteenth, which is held out; a batch that is alone is both."""
    held_out = list(range(0, batches, VALIDATION_SHARE))
    return [i for i in range(batches) if i not in set(held_out)] or held_out, held_out


def tune(module: nn.Module, batches: int, fetch: Fetch, loss: Callable[..., Tensor], plan: TunePlan) -> TuneResult:
    """Adam on the trainable parameters of `module`, one step a batch, under a cosine schedule; keeps the best state.

    `fetch` gives `plan.versions` times as many batches as `batches` says.
    `loss(*tensors)` is the mean over the windows of (a part of) a batch. Every sixteenth batch is held out and
    decides which epoch's state is kept; the state before tuning counts, so the module never gets worse on it.
    Gradients of several parts are added in fp32. Raises NumericalError, naming the plan, when the loss is not finite.
    """
    train, held_out = split_batches(batches)
    parameters = [p for p in module.parameters() if p.requires_grad]
    fitted = [part for part in module.modules() if isinstance(part, FittedLinear)]
    optimiser = RelativeAdam(parameters, plan.learning_rate, plan.epochs * len(train))

    def step(*tensors: Tensor) -> Tensor:
        return _step(fitted, parameters, optimiser, loss, plan, tensors)

    def validate() -> float:
        for linear in fitted:
            linear.refresh(training=False)
        with torch.no_grad():
            losses = [loss(*part) * share for tensors in fetch(held_out) for part, share in _parts(tensors, plan)]
        return float(plan.team.sum(torch.stack(losses).sum() / len(held_out))) / plan.team.size

    start = lowest = validate()
    best = [p.detach().clone() for p in parameters]
    take = CapturedStep(step, parameters[0].device, worth_while=plan.epochs * len(train) > 2 * CapturedStep.WARM_UP)
    for epoch in range(plan.epochs):
        first = epoch % plan.versions * batches
        order = [first + train[i] for i in torch.randperm(len(train), generator=plan.generator).tolist()]
        for tensors in fetch(order):
            plan.on_step(float(take(*tensors)))
        now = validate()
        if not math.isfinite(now):
            raise NumericalError(f"{plan.name}: the tuning loss is not finite; lower the tuning's learning rate")
        if now < lowest:
            lowest, best = now, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    for linear in fitted:
        linear.refresh(training=False)
    return TuneResult(start, lowest)


def _step(
    fitted: list[FittedLinear],
    parameters: list[nn.Parameter],
    optimiser: RelativeAdam,
    loss: Callable[..., Tensor],
    plan: TunePlan,
    tensors: tuple[Tensor, ...],
) -> Tensor:
    for parameter in parameters:
        parameter.grad = None
    for linear in fitted:
        linear.refresh(training=True)
    total = torch.zeros((), device=parameters[0].device)
    for part, share in _parts(tensors, plan):
        value = loss(*part) * share
        value.backward()
        for linear in fitted:
            linear.collect_gradients()
        total += value.detach()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    if plan.team.size > 1:
        for gradient in [*gradients, total]:
            plan.team.sum(gradient).div_(plan.team.size)
    optimiser.step(gradients)
    return total


def _parts(tensors: tuple[Tensor, ...], plan: TunePlan) -> Iterator[tuple[tuple[Tensor, ...], float]]:
    """A batch in parts of `plan.windows`, each with its share of the batch."""
    windows = len(tensors[0])
    for part in zip(*(tensor.split(plan.windows or windows) for tensor in tensors), strict=True):
        yield part, len(part[0]) / windows


def tune_block(
    block: nn.Module, call: BlockCall, inputs: HiddenStates, targets: HiddenStates, plan: TunePlan
) -> TuneResult:
    """Bring the block's outputs on `inputs` to `targets`.

    The loss is the mean squared error relative to the mean square of all targets.
    """
    squares = torch.stack([target.float().square().mean() for target in targets])
    size = (plan.team.sum(squares.mean()) / plan.team.size).clamp_min(1e-30)

    def loss(hidden: Tensor, target: Tensor) -> Tensor:
        return (call.run(block, hidden).float() - target.float()).square().mean() / size

    def fetch(order: Sequence[int]) -> Iterator[tuple[Tensor, ...]]:
        return zip(inputs.walk(order), targets.walk(order), strict=True)

    return tune(block, len(inputs), fetch, loss, plan)
