"""Post-training quantisation of a whole model: block after block, each calibrated on the output of those before it."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from codegemm_kernels import CheckpointMetadata, NumericalError
from codegemm_quant.bit_allocation import with_bits
from codegemm_quant.block_fit import BlockPlan, Streams, install, mixed_precision, quantize_block, stored_tensors
from codegemm_quant.blocks import BlockCall
from codegemm_quant.config import QuantizeConfig
from codegemm_quant.estimate import estimate
from codegemm_quant.export import export_checkpoint
from codegemm_quant.fit import FitPlan
from codegemm_quant.frame import ModelFrame
from codegemm_quant.hidden_states import HiddenStates
from codegemm_quant.layer_report import write_report
from codegemm_quant.loading import choose_device
from codegemm_quant.model_tune import VERSIONS, resample_windows, tune_model
from codegemm_quant.parallel import Team, team_of_environment
from codegemm_quant.progress import Progress
from codegemm_quant.progress_store import ProgressStore
from codegemm_quant.stage_clock import StageClock
from codegemm_quant.subject import Subject, check_out, open_subject
from codegemm_quant.tuning import TunePlan, split_batches


@dataclass(frozen=True)
class _Run:
    """What stays the same from block to block."""

    config: QuantizeConfig
    subject: Subject
    plan: BlockPlan
    team: Team
    store: ProgressStore
    progress: Progress


@dataclass
class _Result:
    """What has been quantised so far."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Stored tensors by full name."""
    reports: list[dict[str, Any]] = field(default_factory=list)
    divergence: dict[str, float] | None = None
    """From the dense model's predictions, before and after the whole model was tuned."""


def quantize(config: QuantizeConfig, model: Any = None, tokenizer: Any = None) -> dict[str, Any]:
    """Quantise a model and write the checkpoint folder `config.out`.

    model and tokenizer: loaded ones to use in the place of the folder `config.model`. Returns {"out", "scheme",
    "bits_per_weight", "seconds", "blocks", "effort", "stages"}: the defaults that were filled in, seconds by stage;
    for a dry run what `estimate` finds. An interrupted run leaves its finished blocks in `<out>.work` and continues
    there with `resume`. Raises BadInput for unusable input and NumericalError, naming the layer, when values stop
    being finite.
    """
    if config.dry_run:
        return estimate(config)
    started = time.monotonic()
    device = choose_device(config.device)
    clock = StageClock(device)
    with team_of_environment(device) as team, torch.no_grad(), _tensor_cores():
        with clock("load"):
            check_out(Path(config.out))
            subject = open_subject(config, device, team, model, tokenizer)
            store = ProgressStore.open(subject.work_folder, subject.settings, resume=config.resume, team=team)
        if config.bits is not None:
            with clock("sensitivity"):
                subject = with_bits(subject, config.bits, config.damping, store)
        with Progress(len(subject.names), len(subject.blocks), shown=team.leads) as progress:
            fit = FitPlan(subject.scheme, subject.effort.rounds, config.damping, subject.stored)
            tuning = (subject.effort.tune_epochs, config.tune_learning_rate)
            plan = BlockPlan(fit, subject.schemes, *tuning, subject.compute, team, clock, progress.tell)
            result = _quantize(_Run(config, subject, plan, team, store, progress))
        report = {
            "out": config.out,
            "scheme": str(subject.scheme) if config.bits is None else "mixed",
            "bits_per_weight": subject.bits_per_weight(),
            "seconds": time.monotonic() - started,
            "blocks": len(subject.blocks),
            "effort": asdict(subject.effort),
            "stages": clock.seconds,
        }
        if team.leads:
            _export(subject, result, lambda folder: write_report(folder, report, result.reports, result.divergence))
            shutil.rmtree(store.folder)
        team.wait()
    return report


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Let fp32 matrix products use TF32 where there is such a thing: H is of bf16 inputs, and choices are robust."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _quantize(run: _Run) -> _Result:
    """All blocks in order, then the model as a whole."""
    subject = run.subject
    frame = ModelFrame(subject.model, subject.prefix, subject.blocks, subject.device, subject.compute)
    try:
        batches = list(subject.windows.split(subject.batch))
        inputs, calls = subject.hidden_states(), frame.calls(batches[0])
        for batch in batches:
            inputs.append(frame.inputs(batch))
        result, kept, targets = _quantize_blocks(run, calls, inputs)
        if subject.effort.model_epochs and len(kept):
            with run.plan.clock("model tuning"):
                _tune_whole(run, frame, result, kept, targets)
        return result
    finally:
        frame.close()


def _quantize_blocks(
    run: _Run, calls: list[BlockCall], inputs: HiddenStates
) -> tuple[_Result, nn.ModuleList, HiddenStates]:
    """All blocks in order. Returns also the quantised blocks, if they are to be tuned together, and the dense outputs.

    Two streams of hidden states run side by side: through the dense blocks, which gives each block its target, and
    through the quantised ones, which gives it the inputs it will really see.
    """
    subject, clock = run.subject, run.plan.clock
    result, kept, dense_inputs = _Result(), nn.ModuleList(), inputs
    keep, steps = subject.effort.model_epochs > 0 and subject.fits_whole(), 0
    for index in range(len(subject.blocks)):
        name, linears = f"{subject.prefix}.{index}", subject.linears(index)
        run.progress.block(index)
        with clock("forward"), mixed_precision(subject.device, subject.compute):
            dense = subject.dense_block(index)
            targets = _outputs(dense, calls[index], dense_inputs, subject)
        finished = run.store.load(index)
        if finished is None:
            generator = torch.Generator().manual_seed(run.config.seed * 100_003 + index)
            streams = Streams(calls[index], inputs, dense_inputs, targets)
            with mixed_precision(subject.device, subject.compute):
                quantised, report = quantize_block(dense, name, linears, streams, run.plan, generator)
            with clock("save"):
                run.store.save(index, stored_tensors(quantised, subject.stored), report)
            del quantised
            finished = run.store.load(index)
            assert finished is not None
        tensors, report = finished
        with clock("forward"), mixed_precision(subject.device, subject.compute):
            install(dense, linears, tensors, subject.compute)
            inputs = _outputs(dense, calls[index], inputs, subject)
        if not inputs.finite():
            raise NumericalError(f"{name}: the quantised block's output is not finite")
        dense_inputs = targets
        if keep:
            kept.append(dense)
        result.tensors |= {f"{name}.{key}": value for key, value in tensors.items()}
        result.reports.append({"name": name, **report})
        run.progress.finished(steps := steps + len(linears) + 1)
    return result, kept, dense_inputs


def _outputs(block: nn.Module, call: BlockCall, inputs: HiddenStates, subject: Subject) -> HiddenStates:
    outputs = subject.hidden_states()
    for hidden in inputs:
        outputs.append(call.run(block, hidden))
    return outputs


def _tune_whole(run: _Run, frame: ModelFrame, result: _Result, blocks: nn.ModuleList, targets: HiddenStates) -> None:
    """Tune codebooks, scales, norms and what is around the blocks together; puts new stored tensors into the result."""
    config, subject = run.config, run.subject
    for parameter in blocks.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    at_once, epochs = subject.windows_at_once(), subject.effort.model_epochs
    calls = frame.calls(subject.windows[:at_once])
    run.progress.restart(epochs * len(split_batches(len(targets))[0]))

    def show(loss: float) -> None:
        run.progress.tell({"stage": "tune the model", "divergence": f"{loss:.4f}"})

    versions = min(VERSIONS, epochs)
    generator = torch.Generator().manual_seed(config.seed)
    plan = TunePlan(epochs, config.model_learning_rate, generator, "the whole model", show, at_once, run.team, versions)
    with mixed_precision(subject.device, subject.compute):
        windows, targets = _versions(run, frame, targets, versions)
        with torch.enable_grad():
            tuned = tune_model(frame, blocks, calls, windows, targets, plan)
    result.divergence = {"before": tuned.before, "after": tuned.after}
    if run.team.leads:
        tqdm.write(f"divergence from the dense model {tuned.before:.4f} -> {tuned.after:.4f}", file=sys.stderr)
    result.tensors |= frame.stored_tensors(subject.stored)
    for index, block in enumerate(blocks):
        tensors = stored_tensors(block, subject.stored)
        result.tensors |= {f"{subject.prefix}.{index}.{key}": value for key, value in tensors.items()}


def _versions(run: _Run, frame: ModelFrame, targets: HiddenStates, versions: int) -> tuple[list[Tensor], HiddenStates]:
    """Token ids of all batches in so many versions, and the dense outputs for them, of which `targets` come first."""
    subject, team = run.subject, run.team
    first = [batch.to(subject.device) for batch in subject.windows.split(subject.batch)]
    windows, count = list(first), len(subject.windows) * team.size
    places = [
        (number * team.size + team.rank) * subject.batch + place
        for number in range(len(first))
        for place in range(subject.batch)
    ]
    for version in range(1, versions):
        seeds = [(run.config.seed * VERSIONS + version) * count + place for place in places]
        windows += resample_windows(frame, first, targets, subject.windows_at_once(), seeds)
    states, calls = subject.hidden_states(), frame.calls(first[0])
    for tokens in windows[len(first) :]:
        states.append(frame.inputs(tokens))
    for index in range(len(subject.blocks)):
        states = _outputs(subject.dense_block(index), calls[index], states, subject)
    return windows, targets.followed_by(states)


def _export(subject: Subject, result: _Result, also: Callable[[Path], None]) -> None:
    quantised = list(subject.names)
    linears = [name for name, module in subject.model.named_modules() if isinstance(module, nn.Linear)]
    left = tuple(name for name in linears if name not in subject.names)
    metadata = CheckpointMetadata(subject.scheme, subject.overrides(), left)
    model, tokenizer, stored = subject.model, subject.tokenizer, subject.stored
    export_checkpoint(model, tokenizer, result.tensors, metadata, quantised, stored, subject.out, also)
