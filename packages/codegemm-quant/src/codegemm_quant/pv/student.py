"""The model that is tuned: a quantised checkpoint as an ordinary model of fp32 weights, and back to a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from codegemm_kernels import BadInput, CheckpointError, CheckpointMetadata, unpack_codes
from codegemm_kernels.checkpoint import (
    TensorHeader,
    check_layer,
    checkpoint_files,
    quantized_names,
    read_config,
    read_headers,
)
from codegemm_kernels.model_card import REPORT_FILE
from codegemm_quant.blocks import find_blocks
from codegemm_quant.export import export_checkpoint
from codegemm_quant.pv.divergence import Learner, check_model
from codegemm_quant.pv.matrix import TunedMatrix
from codegemm_quant.pv.processes import Processes, local_rows
from codegemm_quant.weight import CodebookWeight


@dataclass
class Student:
    """A quantised model, spread over the processes by rows: codes and scales in the same way as FSDP's weights."""

    folder: Path
    model: Any
    tokenizer: Any
    learner: Learner
    metadata: CheckpointMetadata
    matrices: list[TunedMatrix]
    others: dict[str, Tensor]
    """Parameters that are not quantised, by name: fp32, perhaps sharded."""

    @property
    def stored(self) -> torch.dtype:
        """What floats are stored in."""
        dtype: torch.dtype = self.model.config.dtype
        return dtype

    def tensors(self) -> dict[str, tuple[Tensor, int | None]]:
        """Everything that tuning can change: the rows that are here, sharing memory, and the number of all rows.

        The number is None for what all processes hold alike.
        """
        found: dict[str, tuple[Tensor, int | None]] = {}
        for matrix in self.matrices:
            found[f"{matrix.name}.codes"] = (matrix.codes, matrix.rows)
            found[f"{matrix.name}.codebooks"] = (matrix.codebooks, None)
            found[f"{matrix.name}.scales"] = (matrix.scales, matrix.rows)
        return found | {name: (local_rows(p.detach()), p.shape[0]) for name, p in self.others.items()}

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of `tensors`."""
        return {name: tensor.clone() for name, (tensor, _) in self.tensors().items()}

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """Let the model compute with the values as they would be stored."""
        others = {name: local_rows(parameter.detach()) for name, parameter in self.others.items()}
        exact = {name: value.clone() for name, value in others.items()}
        for value in others.values():
            value.copy_(value.to(self.stored))
        for matrix in self.matrices:
            matrix.refresh(self.stored)
        try:
            yield
        finally:
            for name, value in others.items():
                value.copy_(exact[name])
            for matrix in self.matrices:
                matrix.refresh()


def load_student(folder: Path, processes: Processes, *, gradient_checkpointing: bool = False) -> Student:
    """Read the quantised checkpoint in `folder`; each process reads only its rows.

    Raises BadInput for a folder that is not quantised and CheckpointError for one that lacks or garbles a tensor.
    """
    from transformers import AutoTokenizer

    metadata = CheckpointMetadata.from_config(read_config(folder))
    if metadata is None:
        raise BadInput(f"{folder} is not quantised: make a checkpoint with `codegemm-quant quantize` first")
    headers = read_headers(checkpoint_files(folder))
    model = _skeleton(folder, torch.float32)
    check_model(model)
    coded = set(quantized_names(headers))
    _check(model, folder, metadata, headers, processes.size)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    learner = Learner(model)
    if processes.mesh is not None:
        for block in find_blocks(model)[1]:
            fully_shard(block, mesh=processes.mesh)
        fully_shard(learner, mesh=processes.mesh, reshard_after_forward=True)
    _allocate(model, processes.device)
    matrices, others = [], {}
    parameters = dict(model.named_parameters())
    names = [name.removesuffix(".weight") for name in parameters if name.removesuffix(".weight") in coded]
    for name in names:
        dense = parameters.pop(f"{name}.weight")
        rows = processes.rows(dense.shape[0])
        codes = unpack_codes(_read(headers[f"{name}.codes"], f"{name}.codes", (slice(None), slice(None), rows)))
        codebooks = _read(headers[f"{name}.codebooks"], f"{name}.codebooks", (slice(None),)).float()
        scales = _read(headers[f"{name}.scales"], f"{name}.scales", (slice(None), rows)).float().t()
        parts = (part.contiguous().to(processes.device) for part in (codes, codebooks, scales))
        matrices.append(TunedMatrix(name, dense, *parts))
        matrices[-1].refresh()
    for name, parameter in parameters.items():
        rows = processes.rows(parameter.shape[0])
        local_rows(parameter.data).copy_(_read(headers[name], name, (rows,)))
        others[name] = parameter
    model.config.dtype = _stored_dtype(headers, names)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return Student(folder, model, tokenizer, learner, metadata, matrices, others)


def export_student(
    student: Student, tensors: dict[str, Tensor], out: Path, processes: Processes, report: dict[str, Any]
) -> None:
    """Write the checkpoint `out` with `tensors`, named as in `Student.tensors`; the first process writes.

    report: content of quantization_report.json, from which the model card has its numbers.
    """
    stored: dict[str, Tensor] = {}
    for matrix in student.matrices:
        codes, scales = (
            _whole(tensors[f"{matrix.name}.{part}"], matrix.rows, processes) for part in ("codes", "scales")
        )
        if processes.leads:
            packed = CodebookWeight(codes.long(), tensors[f"{matrix.name}.codebooks"], scales).packed(student.stored)
            stored.update({f"{matrix.name}.{part}": value for part, value in packed.items()})
    for name, parameter in student.others.items():
        whole = _whole(tensors[name], parameter.shape[0], processes)
        if processes.leads:
            stored[name] = whole.to(student.stored).cpu()
    if processes.leads:
        model = _skeleton(student.folder, student.stored)
        _allocate(model, torch.device("cpu"))  # never read: every tensor of it has a value in `stored`
        names = [matrix.name for matrix in student.matrices]
        told = json.dumps(report, indent=2) + "\n"

        def also(folder: Path) -> None:
            (folder / REPORT_FILE).write_text(told)

        export_checkpoint(model, student.tokenizer, stored, student.metadata, names, student.stored, out, also)
    processes.wait()


def _whole(rows: Tensor, total: int, processes: Processes) -> Tensor:
    """All rows of a tensor of which each process holds a slice."""
    if processes.size == 1:
        return rows
    rows = rows.to(processes.device)
    share = -(-total // processes.size)
    padded = rows.new_zeros(share, *rows.shape[1:])
    padded[: len(rows)] = rows
    return processes.gather(padded).flatten(0, 1)[:total]


def _skeleton(folder: Path, dtype: torch.dtype) -> Any:
    """The checkpoint's model with dense linears, its buffers real and its parameters without memory."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for block in ("quantization_config", "codegemm"):
        if hasattr(config, block):
            delattr(config, block)
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


def _allocate(model: Any, device: torch.device) -> None:
    """Give parameters memory on the device, and move buffers there."""
    values = dict(model.named_buffers())
    model.to_empty(device=device)
    model.tie_weights()  # tied parameters were given memory one by one
    for name, buffer in model.named_buffers():
        buffer.copy_(values[name])


def _check(
    model: nn.Module, folder: Path, metadata: CheckpointMetadata, headers: dict[str, TensorHeader], processes: int
) -> None:
    """Raise when a tensor of the model is not in the checkpoint as it should be, or cannot be shared by rows."""
    names = quantized_names(headers)
    quantised = {f"{name}.weight" for name in names}
    for name, parameter in model.named_parameters():
        header = headers.get(name)
        if name in quantised:
            module = name.removesuffix(".weight")
            problems = check_layer(module, metadata.scheme_of(module), parameter.shape[0], parameter.shape[1], headers)
            if problems:
                raise CheckpointError(f"{folder}: {problems[0]}")
        elif header is None or header.shape != tuple(parameter.shape):
            stored = "missing" if header is None else f"stored as {list(header.shape)}"
            raise CheckpointError(f"{folder}: {name} is {stored}, but config.json makes it {list(parameter.shape)}")
        share = -(-parameter.shape[0] // processes)
        if share * (processes - 1) >= parameter.shape[0]:
            raise BadInput(f"{name} has {parameter.shape[0]} rows, too few for {processes} processes: use fewer")
    if unknown := sorted(quantised - dict(model.named_parameters()).keys()):
        raise CheckpointError(f"{folder}: {unknown[0]} is stored as codes, but the model has no such matrix")


def _read(header: TensorHeader, name: str, index: tuple[slice, ...]) -> Tensor:
    """A part of a stored tensor; the rest of it is not read."""
    with safe_open(header.file, framework="pt") as file:
        part: Tensor = file.get_slice(name)[index]
    return part


def _stored_dtype(headers: dict[str, TensorHeader], names: list[str]) -> torch.dtype:
    """The dtype of the stored codebooks."""
    return {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[headers[f"{names[0]}.codebooks"].dtype]
