"""One decoder block: fit every linear on the inputs it will see, then tune what is not a code."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from codegemm_kernels import CodebookScheme
from codegemm_quant.blocks import BlockCall, fitting_order, inputs_of, is_routed
from codegemm_quant.fit import FitPlan, fit_matrix
from codegemm_quant.fitted_linear import FittedLinear
from codegemm_quant.hidden_states import HiddenStates
from codegemm_quant.parallel import Team
from codegemm_quant.stage_clock import StageClock
from codegemm_quant.tuning import TunePlan, tune_block


@dataclass(frozen=True)
class BlockPlan:
    """What every block of a run is quantised with."""

    fit: FitPlan
    schemes: Mapping[str, CodebookScheme]
    """Schemes by full name, where they differ from `fit.scheme`."""
    epochs: int
    learning_rate: float
    compute: torch.dtype
    """What products are computed in."""
    team: Team
    clock: StageClock
    tell: Callable[[dict[str, Any]], None] = lambda _: None
    """Called with what is being done: the layer and how well it went, or the loss of tuning."""


@dataclass(frozen=True)
class Streams:
    """What one block is fitted on: how it is called, its inputs in both models and the dense model's outputs."""

    call: BlockCall
    inputs: HiddenStates
    dense_inputs: HiddenStates
    targets: HiddenStates


def mixed_precision(device: torch.device, compute: torch.dtype) -> Any:
    """Autocast around a block whose norms and biases are fp32 while they are tuned.

    Without its cache, which would keep a copy of parameters from before the optimiser's step.
    """
    return nullcontext() if compute == torch.float32 else torch.autocast(device.type, compute, cache_enabled=False)


def quantize_block(
    dense: nn.Module, name: str, linears: list[str], streams: Streams, plan: BlockPlan, generator: torch.Generator
) -> tuple[nn.Module, dict[str, Any]]:
    """Fit the named linears of a block and tune the block.

    Linears that share an input are fitted together; their inputs are taken from the block as quantised so far.
    Returns the quantised block, its parameters in fp32, and the report: the block's relative error and its layers'.
    """
    work = copy.deepcopy(dense)
    modules = {linear: cast(nn.Linear, work.get_submodule(linear)) for linear in linears}
    layers: dict[str, dict[str, Any]] = {}
    first = next(streams.inputs.walk([0]))
    for stage in fitting_order(work, modules, streams.call, first):
        with plan.clock("statistics"):
            moments = stage_moments(work, dense, [group[0] for group in stage], streams, plan.team)
        for group in stage:
            moment, cross = moments.pop(group[0])
            for linear in group:
                plan.tell({"layer": linear, "stage": "fit"})
                full = f"{name}.{linear}"
                fit_plan = replace(plan.fit, scheme=plan.schemes.get(full, plan.fit.scheme))
                weight = modules[linear].weight.detach()
                with plan.clock("fit"), torch.autocast(weight.device.type, enabled=False):  # fp32 throughout
                    fit = fit_matrix(weight, moment, cross, fit_plan, generator, full, plan.team)
                if fit.damping > plan.fit.damping and plan.team.leads:
                    print(
                        f"{full}: the second moment of its inputs is singular; damped by {fit.damping:g} of its mean",
                        file=sys.stderr,
                    )
                plan.tell({"layer": linear, "stage": "fitted", "error": f"{fit.relative_error:.4f}"})
                layers[linear] = {
                    "scheme": str(fit_plan.scheme),
                    "bits_per_weight": fit_plan.scheme.bits_per_weight(*weight.shape),
                    "relative_error": fit.relative_error,
                    "relative_error_of_kmeans": fit.start_error,
                    "damping": fit.damping,
                }
                work.set_submodule(linear, FittedLinear(fit.weight, modules[linear].bias, plan.compute))
    for parameter in work.parameters():
        parameter.data = parameter.data.float()

    def show(loss: float) -> None:
        plan.tell({"stage": "tune", "error": f"{loss:.4f}"})

    with plan.clock("block tuning"), torch.enable_grad():
        work.requires_grad_(True)
        tune_plan = TunePlan(plan.epochs, plan.learning_rate, generator, name, show, None, plan.team)
        tuned = tune_block(work, streams.call, streams.inputs, streams.targets, tune_plan)
    return work, {"error": tuned.after, "error_before_tuning": tuned.before, "layers": layers}


@torch.no_grad()
def stage_moments(
    block: nn.Module, dense: nn.Module, linears: list[str], streams: Streams, team: Team
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Second moments of the inputs of linears: H = XᵀX / tokens and C = DᵀX / tokens, fp32 [K, K], by name.

    X are a linear's inputs in the (partly quantised) block fed by the quantised model, D those of the dense model.
    No C for the experts of a mixture: what the two models route to one of them need not be the same tokens.
    """
    widths = {name: cast(nn.Linear, block.get_submodule(name)).in_features for name in linears}
    device = streams.inputs.device
    own = {name: torch.zeros(width, width, device=device) for name, width in widths.items()}
    cross = {name: torch.zeros_like(own[name]) for name in linears if not is_routed(block, name)}
    tokens = {name: torch.zeros((), device=device) for name in linears}
    for hidden, dense_hidden in zip(streams.inputs, streams.dense_inputs, strict=True):
        inputs = inputs_of(block, linears, streams.call, hidden)
        wanted = inputs_of(dense, list(cross), streams.call, dense_hidden) if cross else {}
        for name, x in inputs.items():
            own[name].addmm_(x.t(), x)
            tokens[name] += len(x)
            if name in cross:
                cross[name].addmm_(wanted[name].t(), x)
    moments: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name in linears:
        count = team.sum(tokens[name]).clamp_min(1)
        both = team.sum(cross[name]).div_(count) if name in cross else None
        moments[name] = team.sum(own[name]).div_(count), both
    return moments


def stored_tensors(block: nn.Module, stored: torch.dtype) -> dict[str, Tensor]:
    """Stored tensors of a quantised block by name inside it, on the CPU: packed linears and every other parameter."""
    tensors: dict[str, Tensor] = {}
    fitted = {name: module for name, module in block.named_modules() if isinstance(module, FittedLinear)}
    for name, module in fitted.items():
        tensors.update({f"{name}.{part}": value for part, value in module.packed(stored).items()})
    for name, parameter in block.named_parameters():
        if name.rpartition(".")[0] not in fitted:
            tensors[name] = parameter.detach().to(stored).cpu().contiguous()
    return tensors


def install(block: nn.Module, linears: list[str], tensors: dict[str, Tensor], compute: torch.dtype) -> None:
    """Put stored values into a dense block: its linears become FittedLinear, its norms and biases the saved ones."""
    device = next(block.parameters()).device
    for name in linears:
        parts = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.rpartition(".")[0] == name}
        block.set_submodule(name, FittedLinear.from_packed(parts, compute, device))
    for name, parameter in block.named_parameters():
        if name in tensors and name.rpartition(".")[0] not in linears:
            parameter.data = tensors[name].to(device, compute)
    block.requires_grad_(False)
