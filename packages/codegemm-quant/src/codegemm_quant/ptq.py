"""Post-training quantisation of a whole model: block after block, each calibrated on the output of those before it."""

from __future__ import annotations

import copy
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from codegemm_kernels import BadInput, CheckpointMetadata, CodebookScheme, NumericalError
from codegemm_quant.blocks import (
    BlockCall,
    capture_calls,
    capture_inputs,
    find_blocks,
    find_linears,
    input_groups,
    input_moments,
)
from codegemm_quant.calibration import calibration_windows
from codegemm_quant.config import QuantizeConfig
from codegemm_quant.export import export_checkpoint
from codegemm_quant.fit import FitPlan, fit_matrix
from codegemm_quant.fitted_linear import FittedLinear
from codegemm_quant.loading import choose_device, compute_dtype, load_dense
from codegemm_quant.model_tune import tune_model
from codegemm_quant.progress_store import ProgressStore
from codegemm_quant.tuning import TunePlan, tune_block

MAX_BATCH = 8


@dataclass(frozen=True)
class _Setting:
    """What stays the same from block to block."""

    config: QuantizeConfig
    fit: FitPlan
    device: torch.device
    compute: torch.dtype
    store: ProgressStore
    progress: tqdm[None]


@dataclass(frozen=True)
class _Streams:
    """What one block is fitted on: how it is called, its inputs in both models and the dense model's outputs."""

    call: BlockCall
    inputs: list[Tensor]
    dense_inputs: list[Tensor]
    targets: list[Tensor]


def quantize(config: QuantizeConfig) -> dict[str, Any]:
    """Quantise a model and write the checkpoint folder `config.out`.

    Returns {"out", "scheme", "bits_per_weight", "seconds", "blocks"}. An interrupted run leaves its finished blocks
    in `<out>.work` and continues there with `resume`. Raises BadInput for unusable input and NumericalError, naming
    the layer, when values stop being finite.
    """
    started = time.monotonic()
    out = Path(config.out)
    _check_out(out)
    scheme = CodebookScheme.parse(config.scheme)
    device = choose_device(config.device)
    model, tokenizer = load_dense(config.model)
    _check_length(model, config.sequence_length)
    prefix, blocks = find_blocks(model)
    chosen = 0
    for index, block in enumerate(blocks):
        for name, linear in find_linears(block, f"{prefix}.{index}", config.skip).items():
            scheme.check_matrix(linear.out_features, linear.in_features, f"{prefix}.{index}.{name}")
            chosen += 1
    if not chosen:
        raise BadInput(f"{config.model}: every linear layer is skipped, so there is nothing to quantise")
    windows = calibration_windows(config.data, tokenizer, config.samples, config.sequence_length, config.seed)
    stored = model.dtype if model.dtype in (torch.float16, torch.bfloat16) else torch.float16
    compute = compute_dtype(model.dtype, device)
    settings = config.settings() | {"text": sha256(windows.numpy().tobytes()).hexdigest()[:16]}
    store = ProgressStore.open(out.with_name(f"{out.name}.work"), settings, resume=config.resume)
    with tqdm(total=0, desc="quantise", unit="step", dynamic_ncols=True) as progress, torch.no_grad(), _tensor_cores():
        fit = FitPlan(scheme, config.rounds, config.damping, stored)
        setting = _Setting(config, fit, device, compute, store, progress)
        tensors, quantised = _quantize_blocks(setting, model, prefix, blocks, windows)
        if config.model_epochs:
            tensors = _tune_whole(setting, model, prefix, tensors, quantised, windows)
    dense = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in set(quantised)]
    metadata = CheckpointMetadata(scheme, {}, tuple(dense))
    bits, weights = 0.0, 0
    for name in quantised:
        linear = model.get_submodule(name)
        size = linear.out_features * linear.in_features
        bits, weights = bits + size * scheme.bits_per_weight(linear.out_features, linear.in_features), weights + size
    export_checkpoint(model, tokenizer, tensors, metadata, quantised, stored, out)
    shutil.rmtree(store.folder)
    return {
        "out": str(out),
        "scheme": str(scheme),
        "bits_per_weight": bits / weights,
        "seconds": time.monotonic() - started,
        "blocks": len(blocks),
    }


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Let fp32 matrix products use TF32 where there is such a thing: H is of bf16 inputs, and choices are robust."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _check_out(out: Path) -> None:
    """Raise BadInput when the checkpoint could not be written, before hours go into it."""
    if out.exists():
        raise BadInput(f"{out} exists already: choose another --out or delete it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise BadInput(f"cannot write in {out.parent} ({error.strerror}): choose another --out") from error


def _check_length(model: Any, sequence_length: int) -> None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise BadInput(f"sequence_length {sequence_length} is more than the {longest} positions the model has")


def _quantize_blocks(
    setting: _Setting, model: Any, prefix: str, blocks: nn.ModuleList, windows: Tensor
) -> tuple[dict[str, Tensor], list[str]]:
    """All blocks in order; returns stored tensors by full name and the names of the quantised modules.

    Two streams of hidden states run side by side: through the dense blocks, which gives each block its target, and
    through the quantised ones, which gives it the inputs it will really see.
    """
    config, device, compute = setting.config, setting.device, setting.compute
    batches = list(windows.split(batch_size(len(windows))))
    calls = [call.to(device, compute) for call in capture_calls(model, blocks, batches[0], torch.device("cpu"))]
    inputs = [h.to(device, compute) for h in capture_inputs(model, blocks[0], batches, torch.device("cpu"))]
    dense_inputs = inputs
    tensors: dict[str, Tensor] = {}
    quantised: list[str] = []
    setting.progress.reset(len(blocks))
    for index, block in enumerate(blocks):
        name = f"{prefix}.{index}"
        linears = list(find_linears(block, name, config.skip))
        dense = copy.deepcopy(block).requires_grad_(False).to(device, compute)
        with _autocast(device, compute):
            targets = [calls[index].run(dense, hidden) for hidden in dense_inputs]
            finished = setting.store.load(index)
            if finished is None:
                streams = _Streams(calls[index], inputs, dense_inputs, targets)
                setting.store.save(index, *_quantize_block(setting, dense, name, linears, streams, index))
                finished = setting.store.load(index)
                assert finished is not None
            block_tensors, report = finished
            install(dense, linears, block_tensors, compute, device)
            inputs = [calls[index].run(dense, hidden) for hidden in inputs]
        dense_inputs = targets
        if not all(torch.isfinite(hidden).all() for hidden in inputs):
            raise NumericalError(f"{name}: the quantised block's output is not finite")
        tensors.update({f"{name}.{key}": value for key, value in block_tensors.items()})
        quantised += [f"{name}.{linear}" for linear in linears]
        setting.progress.update()
        setting.progress.set_postfix(block=index, error=f"{report['error']:.4f}")
    return tensors, quantised


def _autocast(device: torch.device, compute: torch.dtype) -> Any:
    """Mixed precision around a block whose norms and biases are fp32 while they are tuned."""
    return nullcontext() if compute == torch.float32 else torch.autocast(device.type, compute)


def _quantize_block(
    setting: _Setting, dense: nn.Module, name: str, linears: list[str], streams: _Streams, index: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fit every linear of one block and tune the block. Returns its stored tensors and a report.

    Linears that share an input are fitted together; their inputs are taken from the block as quantised so far.
    """
    config, progress = setting.config, setting.progress
    generator = torch.Generator().manual_seed(config.seed * 100_003 + index)
    work = copy.deepcopy(dense)
    modules = {linear: cast(nn.Linear, work.get_submodule(linear)) for linear in linears}
    errors: dict[str, float] = {}
    for group in input_groups(work, modules, streams.call, streams.inputs[0]):
        hessian, cross = input_moments(work, dense, group[0], streams.call, streams.inputs, streams.dense_inputs)
        for linear in group:
            progress.set_postfix(block=index, fitting=linear)
            with torch.autocast(setting.device.type, enabled=False):  # the fit is fp32 throughout
                fit = fit_matrix(
                    modules[linear].weight.detach(), hessian, cross, setting.fit, generator, f"{name}.{linear}"
                )
            errors[linear] = fit.relative_error
            work.set_submodule(linear, FittedLinear(fit.weight, modules[linear].bias, setting.compute))
    for parameter in work.parameters():
        parameter.data = parameter.data.float()

    def show(loss: float) -> None:
        progress.set_postfix(block=index, tuning=f"{loss:.4f}")

    with torch.enable_grad():
        work.requires_grad_(True)
        tuned = tune_block(
            work,
            streams.call,
            streams.inputs,
            streams.targets,
            TunePlan(config.tune_epochs, config.tune_learning_rate, generator, name, show),
        )
    report = {"layers": errors, "error": tuned.after, "error_before_tuning": tuned.before}
    return _stored_tensors(work, setting.fit.dtype), report


def _stored_tensors(work: nn.Module, stored: torch.dtype) -> dict[str, Tensor]:
    """Stored tensors of a module by name inside it: packed linears and every other parameter."""
    tensors: dict[str, Tensor] = {}
    fitted = {name: module for name, module in work.named_modules() if isinstance(module, FittedLinear)}
    for name, module in fitted.items():
        tensors.update({f"{name}.{part}": value for part, value in module.packed(stored).items()})
    for name, parameter in work.named_parameters():
        if name.rpartition(".")[0] not in fitted:
            tensors[name] = parameter.detach().to(stored).cpu().contiguous()
    return tensors


def install(
    block: nn.Module, linears: list[str], tensors: dict[str, Tensor], compute: torch.dtype, device: torch.device
) -> None:
    """Put stored values into a dense block: its linears become FittedLinear, its norms and biases the saved ones."""
    for name in linears:
        parts = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.rpartition(".")[0] == name}
        block.set_submodule(name, FittedLinear.from_packed(parts, compute, device))
    for name, parameter in block.named_parameters():
        if name in tensors and name.rpartition(".")[0] not in linears:
            parameter.data = tensors[name].to(device, compute)
    block.requires_grad_(False)


def batch_size(windows: int) -> int:
    """The largest batch up to 8 that divides the number of windows: masks and positions are the same for all."""
    return max(size for size in range(1, MAX_BATCH + 1) if windows % size == 0)


def _tune_whole(
    setting: _Setting, model: Any, prefix: str, tensors: dict[str, Tensor], quantised: list[str], windows: Tensor
) -> dict[str, Tensor]:
    """Tune codebooks, scales and norms of all blocks together; returns the new stored tensors."""
    config, device, progress = setting.config, setting.device, setting.progress
    student = copy.deepcopy(model).requires_grad_(False).to(device, setting.compute)
    teacher = model.to(device, setting.compute).requires_grad_(False)
    install(student, quantised, tensors, setting.compute, device)
    for name, parameter in student.named_parameters():
        if name in tensors or name.rpartition(".")[0] in quantised:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    batches = [batch.to(device) for batch in windows.split(batch_size(len(windows)))]
    progress.set_postfix(tuning="model", refresh=False)
    progress.reset(config.model_epochs * len(batches))

    def show(loss: float) -> None:
        progress.update()
        progress.set_postfix(tuning="model", divergence=f"{loss:.4f}")

    with torch.enable_grad(), _autocast(device, setting.compute):
        generator = torch.Generator().manual_seed(config.seed)
        plan = TunePlan(config.model_epochs, config.model_learning_rate, generator, "the whole model", show)
        tuned = tune_model(student, teacher, batches, plan)
    progress.write(f"divergence from the dense model {tuned.before:.4f} -> {tuned.after:.4f}", file=sys.stderr)
    stored = _stored_tensors(student, setting.fit.dtype)
    return {name: stored[name] for name in tensors}
