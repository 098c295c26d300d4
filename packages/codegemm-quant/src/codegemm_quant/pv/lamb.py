"""Adam and LAMB over tensors that may be spread by rows over processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from codegemm_quant.pv.processes import Processes, local_rows

EPSILON = 1e-12
"""Added to the root of the second moment. Gradients of a mean divergence are near 1e-6, so it has to be far below."""
BUCKET = 1 << 26
"""Elements updated at once: temporaries of 256 MB each, however large the model is."""


@dataclass(frozen=True)
class Rates:
    """How a group of tensors is stepped."""

    learning_rate: float
    beta1: float
    beta2: float
    lamb: bool


@dataclass
class Slot:
    """One tensor that is trained, and the moments of its rows that are here."""

    name: str
    value: Tensor
    """Perhaps a sharded parameter. FSDP may give it other memory in its first forward pass: look at its rows anew."""
    rows: int | None
    """Rows in all processes; None when all hold the same."""
    first: Tensor | None = None
    second: Tensor | None = None


class Lamb:
    """Moments and steps of one group of tensors.

    With LAMB a step has the length learning_rate * |tensor| whatever the gradient's, except where one of the two is
    zero. Both moments are corrected for their start at zero before the length is taken, not after: the published order
    makes the first steps 2.24 times as long as asked for.
    """

    def __init__(self, slots: list[Slot], rates: Rates, processes: Processes) -> None:
        self.slots, self.rates, self.processes = slots, rates, processes
        for slot in slots:
            slot.second = torch.zeros_like(local_rows(slot.value))
            slot.first = torch.zeros_like(slot.second) if rates.beta1 else None

    @torch.no_grad()
    def step(self, gradients: list[Tensor], number: int, rate: float) -> None:
        """Step number `number` (from 1) with `rate` times the learning rate; one gradient for each slot."""
        start = 0
        for end in range(1, len(self.slots) + 1):
            size = sum(local_rows(slot.value).numel() for slot in self.slots[start : end + 1])
            if end == len(self.slots) or size > BUCKET:
                self._step(self.slots[start:end], gradients[start:end], number, rate * self.rates.learning_rate)
                start = end

    def _step(self, slots: list[Slot], gradients: list[Tensor], number: int, rate: float) -> None:
        beta1, beta2 = self.rates.beta1, self.rates.beta2
        values = [local_rows(slot.value) for slot in slots]
        seconds = [slot.second for slot in slots if slot.second is not None]
        torch._foreach_mul_(seconds, beta2)
        torch._foreach_addcmul_(seconds, gradients, gradients, 1 - beta2)
        lengths = torch._foreach_sqrt(seconds)
        torch._foreach_div_(lengths, math.sqrt(1 - beta2**number))
        torch._foreach_add_(lengths, EPSILON)
        if beta1:
            firsts = [slot.first for slot in slots if slot.first is not None]
            torch._foreach_lerp_(firsts, gradients, 1 - beta1)
            updates = torch._foreach_div(firsts, lengths)
            torch._foreach_div_(updates, 1 - beta1**number)
        else:
            updates = torch._foreach_div(gradients, lengths)
        if self.rates.lamb:
            sizes, steps = self._norms(values, slots), self._norms(updates, slots)
            ratios = torch.where((sizes > 0) & (steps > 0), sizes / steps, 1.0)
            torch._foreach_mul_(updates, list(ratios.unbind()))
        torch._foreach_add_(values, updates, alpha=-rate)

    def _norms(self, tensors: Sequence[Tensor], slots: list[Slot]) -> Tensor:
        """The norm of each whole tensor over all processes."""
        squares = torch.stack(torch._foreach_norm(list(tensors))).square()
        if self.processes.size > 1:
            once = torch.tensor(
                [slot.rows is not None or self.processes.leads for slot in slots], device=squares.device
            )
            squares = self.processes.sum(torch.where(once, squares, 0.0))
        return squares.sqrt()
