"""Several processes that quantise one model: who owns which windows and rows, and the sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Team:
    """One process among `size`. Every process ends up with the same bits in everything that is shared."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def own(self, tensor: Tensor) -> Tensor:
        """This process's share of the first axis."""
        return tensor.tensor_split(self.size)[self.rank]

    def join(self, part: Tensor, length: int) -> Tensor:
        """Undo `own`: the shares of all processes, `length` long."""
        if self.size == 1:
            return part
        whole = part.new_zeros(length, *part.shape[1:])
        self.own(whole).copy_(part)
        return self.sum(whole)

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.size > 1:
            distributed.barrier()


ALONE = Team()


@contextmanager
def team_of_environment(device: torch.device) -> Iterator[Team]:
    """The processes that torchrun started, talking NCCL between GPUs and gloo between CPUs; one process without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Team(distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()
