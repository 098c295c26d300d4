"""The processes of a run: one alone, or several started by torchrun that share every matrix row by row."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from codegemm_quant.loading import choose_device
from codegemm_quant.parallel import Team


@dataclass(frozen=True)
class Processes(Team):
    """This process's place among those of the run. Process r holds the r-th slice of every matrix's rows."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    """None when there is one process: nothing is sharded then."""

    def rows(self, total: int) -> slice:
        """The rows of a matrix of `total` rows that are here: FSDP's own split, in slices of ceil(total / size)."""
        share = -(-total // self.size)
        return slice(min(self.rank * share, total), min((self.rank + 1) * share, total))

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, of one shape, in a new first dimension."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        gathered = tensor.new_empty(self.size, *tensor.shape)
        dist.all_gather(list(gathered.unbind()), tensor.contiguous())
        return gathered

    def joined(self, rows: Tensor, total: int) -> Tensor:
        """This process's slice of `total` rows as the distributed tensor it is part of; alone, the slice itself."""
        if self.mesh is None:
            return rows
        shape = torch.Size((total, *rows.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows, self.mesh, [Shard(0)], shape=shape, stride=stride)


@contextmanager
def join_processes(device: str | None) -> Iterator[Processes]:
    """Join the processes torchrun has started, each on its own GPU of its host, or run alone on `device`.

    A process group that is there already is used and left.
    """
    if not dist.is_torchelastic_launched():
        yield Processes(0, 1, choose_device(device), None)
        return
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    chosen = choose_device(device)
    if chosen.type == "cuda":
        chosen = choose_device(f"cuda:{local}")
        torch.cuda.set_device(chosen)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    joining = not dist.is_initialized()
    if joining:
        dist.init_process_group(backend, timeout=timedelta(minutes=60))
    try:
        yield Processes(rank, size, chosen, init_device_mesh(chosen.type, (size,)))
    finally:
        if joining:
            dist.destroy_process_group()


def local_rows(tensor: Tensor) -> Tensor:
    """The part of a parameter or gradient that is here, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
