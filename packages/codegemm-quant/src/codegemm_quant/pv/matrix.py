"""One quantised matrix while it is tuned: the rows of it that this process holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from codegemm_quant.pv.codes import CodeSearch, update_codes
from codegemm_quant.pv.processes import Processes, local_rows
from codegemm_quant.weight import CodebookWeight, EntrySums


@dataclass
class TunedMatrix:
    """The parts of `name`'s weight [N, K], n of whose rows are here.

    The model's linear multiplies with `dense`, an ordinary (perhaps sharded) fp32 parameter that `refresh` writes and
    whose gradient `collect` turns into those of codebooks and scales. Codebooks are the same in all processes.
    """

    name: str
    dense: Tensor
    """The linear's weight, fp32 [N, K]; n rows of it here."""
    codes: Tensor
    """uint8 [n, J, m]."""
    codebooks: Tensor
    """fp32 [m, C, v]."""
    scales: Tensor
    """fp32 [n, G]."""
    latent: Tensor | None = None
    """U, fp32 [n, K]: the weight if it were not quantised, which the codes follow; None: codes are frozen."""

    @property
    def rows(self) -> int:
        """N, the rows in all processes."""
        return self.dense.shape[0]

    @property
    def vectors(self) -> int:
        """N * J, the vectors in all processes."""
        return self.rows * self.codes.shape[1]

    def weight(self) -> CodebookWeight:
        """The weight here as it is now; codes are a copy."""
        return CodebookWeight(self.codes.long(), self.codebooks, self.scales)

    def follow(self) -> None:
        """Give the matrix a latent weight that starts from the quantised one."""
        self.latent = self.weight().dequantize()

    @torch.no_grad()
    def refresh(self, stored: torch.dtype | None = None) -> None:
        """Write the dense weight: as it is, or as it would be after being stored in a dtype."""
        weight = self.weight() if stored is None else self.weight().rounded(stored)
        local_rows(self.dense).copy_(weight.dequantize())

    @torch.no_grad()
    def collect(self) -> tuple[Tensor, Tensor]:
        """Gradients of codebooks (the share of the rows here) and scales from the gradient of the dense weight.

        dL/dB_i[e] sums s * G over the vectors whose code is e, dL/ds sums G * (sum of entries) over the group.
        """
        gradient, weight = self.gradient(), self.weight()
        rows, groups = self.scales.shape
        scaled = gradient.view(rows, groups, -1) * self.scales.unsqueeze(-1)
        scales = (gradient * weight.unscaled()).view(rows, groups, -1).sum(-1)
        return EntrySums(self.codes)(scaled.view(rows, -1)), scales

    def gradient(self) -> Tensor:
        """The gradient of the dense weight's rows that are here, fp32 [n, K]; zero where no loss reached it."""
        if self.dense.grad is None:
            return torch.zeros_like(local_rows(self.dense))
        return local_rows(self.dense.grad).float()

    @torch.no_grad()
    def move_codes(self, search: CodeSearch, max_change: float, delta_decay: float, processes: Processes) -> Tensor:
        """The V step: at most ceil(max_change * N * J) vectors get new codes; then U is pulled back by delta_decay.

        Returns how many vectors changed here, as a tensor.
        """
        assert self.latent is not None
        budget = math.ceil(max_change * self.vectors)
        changed = update_codes(self.weight(), self.codes, self.latent, budget, search, processes)
        if delta_decay:
            self.latent.lerp_(self.weight().dequantize(), delta_decay)
        return changed
