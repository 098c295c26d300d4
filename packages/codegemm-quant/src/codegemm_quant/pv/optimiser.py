"""One step of PV-tuning: the P step on everything continuous, then the V step on the codes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from codegemm_quant.pv.codes import CodeSearch
from codegemm_quant.pv.config import TuneConfig
from codegemm_quant.pv.lamb import Lamb, Rates, Slot
from codegemm_quant.pv.processes import Processes, local_rows
from codegemm_quant.pv.student import Student


class PVOptimiser:
    """What is trained of a student, and its steps.

    The gradient G of a quantised weight is that of the weight as it is, passed straight through to the latent weight U
    and, by the chain rule, to codebooks and scales. A step moves U, codebooks, scales and the other parameters along
    their gradients (LAMB or Adam), then re-encodes with the new codebooks those vectors that are furthest from U, and
    pulls U back by delta_decay. Each process does all of this for its own rows: only norms, codebook gradients and the
    distances that compete for the code budget are exchanged.
    """

    def __init__(self, student: Student, config: TuneConfig, processes: Processes) -> None:
        self.student, self.config, self.processes = student, config, processes
        self._codes, self._books, self._others = (
            part not in config.freeze for part in ("codes", "codebooks", "others")
        )
        latents: list[Slot] = []
        rest: list[Slot] = []
        for matrix in student.matrices:
            matrix.dense.requires_grad_(self._codes or self._books)
            if self._codes:
                matrix.follow()
                assert matrix.latent is not None
                latents.append(Slot(f"{matrix.name}.latent", matrix.latent, matrix.rows))
            if self._books:
                rest.append(Slot(f"{matrix.name}.codebooks", matrix.codebooks, None))
                rest.append(Slot(f"{matrix.name}.scales", matrix.scales, matrix.rows))
        for name, parameter in student.others.items():
            parameter.requires_grad_(self._others)
            if self._others:
                rest.append(Slot(name, parameter, parameter.shape[0]))
        continuous, latent = config.rates
        self._latents = Lamb(latents, Rates(latent, config.code_beta1, config.beta2, config.lamb), processes)
        self._rest = Lamb(rest, Rates(continuous, config.beta1, config.beta2, config.lamb), processes)

    def rate(self, number: int) -> float:
        """The share of the full learning rates in step `number`, which counts from 1."""
        config = self.config
        if number <= config.warmup:
            return number / config.warmup
        if config.schedule == "constant":
            return 1.0
        done = (number - 1 - config.warmup) / max(1, config.total_steps - config.warmup)
        return 0.5 * (1 + math.cos(math.pi * done))

    @torch.no_grad()
    def step(self, number: int) -> Tensor:
        """Step `number` (from 1) with the gradients that are there, which are cleared.

        Returns the share of all vectors that got new codes, as a tensor.
        """
        config, matrices, rate = self.config, self.student.matrices, self.rate(number)
        rest = self._continuous_gradients()
        self._latents.step([matrix.gradient() for matrix in matrices] if self._codes else [], number, rate)
        self._rest.step(rest, number, rate)
        changed = torch.zeros((), device=self.processes.device)
        if self._codes:
            chance = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
            for matrix in matrices:
                order = tuple(torch.randperm(len(matrix.codebooks), generator=chance).tolist())
                search = CodeSearch(order, config.beam_size, config.trust_ratio)
                changed += matrix.move_codes(search, config.max_code_change, config.delta_decay, self.processes)
        if self._codes or self._books:
            for matrix in matrices:
                matrix.refresh()
        for parameter in self.student.model.parameters():
            parameter.grad = None
        return self.processes.sum(changed) / sum(matrix.vectors for matrix in matrices)

    def state(self) -> dict[str, tuple[Tensor, int | None]]:
        """Latent weights and moments, named, with the number of their rows in all processes (see Student.tensors)."""
        found: dict[str, tuple[Tensor, int | None]] = {}
        for slot in [*self._latents.slots, *self._rest.slots]:
            parts = {"first": slot.first, "second": slot.second}
            if slot.name.endswith(".latent"):
                parts["value"] = slot.value
            found.update(
                {f"{slot.name}.{part}": (value, slot.rows) for part, value in parts.items() if value is not None}
            )
        return found

    def _continuous_gradients(self) -> list[Tensor]:
        """Gradients of codebooks, scales and other parameters, one for each slot."""
        gradients: list[Tensor] = []
        if self._books:
            books, scales = zip(*(matrix.collect() for matrix in self.student.matrices), strict=True)
            if self.processes.size > 1:
                flat = self.processes.sum(torch.cat([book.flatten() for book in books]))
                parts = flat.split([book.numel() for book in books])
                books = tuple(part.view_as(book) for part, book in zip(parts, books, strict=True))
            gradients += [gradient for pair in zip(books, scales, strict=True) for gradient in pair]
        if self._others:
            for parameter in self.student.others.values():
                value = local_rows(parameter.detach())
                gradients.append(torch.zeros_like(value) if parameter.grad is None else local_rows(parameter.grad))
        return gradients
