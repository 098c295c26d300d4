"""Which scheme each layer gets, so that a model has so many bits a weight and loses as little as possible."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from codegemm_kernels import BadInput, CodebookScheme
from codegemm_quant.block_fit import Streams, mixed_precision, stage_moments
from codegemm_quant.blocks import BlockCall, fitting_order
from codegemm_quant.fit import FitPlan, fit_matrix
from codegemm_quant.frame import ModelFrame
from codegemm_quant.hidden_states import HiddenStates
from codegemm_quant.parallel import ALONE
from codegemm_quant.progress_store import ProgressStore
from codegemm_quant.subject import Subject

LADDER = ("m1v8g128", "m1v4g-1", "m1v4g128", "m3v8g128", "m2v4g-1", "m2v4g128", "m3v4g128")
"""Candidates from 1.1 to 6.1 bits, of which those are used that a layer's shape allows."""
BATCHES = 2
"""Batches of windows that layers are measured on."""


@dataclass(frozen=True)
class Sensitivity:
    """What one layer costs and loses in each scheme."""

    weights: int
    bits: dict[CodebookScheme, float]
    """Stored bits of the whole layer."""
    loss: dict[CodebookScheme, float]
    """Relative squared change of its block's output when this layer alone is quantised."""


def candidates(rows: int, columns: int) -> list[CodebookScheme]:
    """The schemes of the ladder that a matrix of this shape can be stored in."""
    found = []
    for text in LADDER:
        scheme = CodebookScheme.parse(text)
        try:
            scheme.check_matrix(rows, columns)
        except BadInput:
            continue
        found.append(scheme)
    return found


def with_bits(subject: Subject, bits: float, damping: float, store: ProgressStore) -> Subject:
    """The same with a scheme for each linear, so that their mean is at most so many bits a weight.

    What was measured is kept in the store. The model's own scheme becomes the most frequent one.
    """

    def measure() -> dict[str, str]:
        plan = FitPlan(subject.scheme, 0, damping, subject.stored)
        return {name: str(scheme) for name, scheme in allocate(sensitivities(subject, plan), bits).items()}

    schemes = {name: CodebookScheme.parse(text) for name, text in store.remember("schemes", measure).items()}
    return replace(subject, scheme=Counter(schemes.values()).most_common(1)[0][0], schemes=schemes)


def sensitivities(subject: Subject, plan: FitPlan) -> dict[str, Sensitivity]:
    """Measure every linear of a dense model, block by block, on the first few windows."""
    found: dict[str, Sensitivity] = {}
    frame = ModelFrame(subject.model, subject.prefix, subject.blocks, subject.device, subject.compute)
    try:
        batches = subject.windows.split(subject.batch)[:BATCHES]
        calls, inputs = frame.calls(batches[0]), HiddenStates(subject.device)
        for batch in batches:
            inputs.append(frame.inputs(batch))
        for index in range(len(subject.blocks)):
            name, block = f"{subject.prefix}.{index}", subject.dense_block(index)
            linears = {linear: cast(nn.Linear, block.get_submodule(linear)) for linear in subject.linears(index)}
            with mixed_precision(subject.device, subject.compute):
                layers = block_sensitivities(block, linears, calls[index], inputs, plan, name)
                outputs = HiddenStates(subject.device)
                for hidden in inputs:
                    outputs.append(calls[index].run(block, hidden))
            inputs = outputs
            found |= {f"{name}.{linear}": layer for linear, layer in layers.items()}
    finally:
        frame.close()
    return found


@torch.no_grad()
def block_sensitivities(
    block: nn.Module, linears: Mapping[str, nn.Linear], call: BlockCall, inputs: HiddenStates, plan: FitPlan, name: str
) -> dict[str, Sensitivity]:
    """Measure every linear of a dense block on its inputs, with quick fits (no rounds of least squares).

    A layer's loss in the cheapest scheme is measured at the block's output; in the others it is taken to shrink as
    the relative error of the layer's own output does.
    """
    first = next(inputs.walk([0]))
    wanted = call.run(block, first).float()
    size = (wanted - first.float()).square().sum()  # what the block adds
    streams = Streams(call, inputs, inputs, inputs)
    found: dict[str, Sensitivity] = {}
    for stage in fitting_order(block, linears, call, first):
        moments = stage_moments(block, block, [group[0] for group in stage], streams, ALONE)
        for group in stage:
            for linear in group:
                dense = linears[linear].weight.data
                errors: dict[CodebookScheme, float] = {}
                for scheme in candidates(*dense.shape):
                    quick = replace(plan, scheme=scheme, rounds=0)
                    generator = torch.Generator().manual_seed(0)
                    with torch.autocast(dense.device.type, enabled=False):
                        fit = fit_matrix(dense, moments[group[0]][0], None, quick, generator, f"{name}.{linear}")
                    if not errors:
                        linears[linear].weight.data = fit.weight.dequantize().to(dense.dtype)
                        change = call.run(block, first).float() - wanted
                        linears[linear].weight.data = dense
                    errors[scheme] = fit.relative_error
                found[linear] = _sensitivity(dense, errors, float(change.square().sum() / size))
    return found


def _sensitivity(weight: Tensor, errors: dict[CodebookScheme, float], measured: float) -> Sensitivity:
    rows, columns = weight.shape
    reference = next(iter(errors.values()))
    loss = {scheme: measured * error / max(reference, 1e-12) for scheme, error in errors.items()}
    bits = {scheme: rows * columns * scheme.bits_per_weight(rows, columns) for scheme in errors}
    return Sensitivity(rows * columns, bits, loss)


def allocate(sensitivities: Mapping[str, Sensitivity], bits_per_weight: float) -> dict[str, CodebookScheme]:
    """The schemes with the least total loss that are found within the budget.

    Starts with the cheapest scheme everywhere and takes the step that saves the most loss for a bit as long as there
    are bits left. Raises BadInput when the budget is below the cheapest schemes.
    """
    chosen = {name: min(layer.bits, key=layer.bits.__getitem__) for name, layer in sensitivities.items()}
    budget = bits_per_weight * sum(layer.weights for layer in sensitivities.values())
    spent = sum(layer.bits[chosen[name]] for name, layer in sensitivities.items())
    if spent > budget:
        least = spent / sum(layer.weights for layer in sensitivities.values())
        raise BadInput(f"bits {bits_per_weight} is too few: the cheapest schemes take {least:.3f} bits a weight")
    steps = [(*_best_step(layer, chosen[name]), name) for name, layer in sensitivities.items()]
    heap = [step for step in steps if step[1]]
    heapq.heapify(heap)
    while heap:
        _, scheme_name, name = heapq.heappop(heap)
        layer, scheme = sensitivities[name], CodebookScheme.parse(scheme_name)
        more = layer.bits[scheme] - layer.bits[chosen[name]]
        if spent + more > budget:
            continue
        spent, chosen[name] = spent + more, scheme
        gain, following = _best_step(layer, scheme)
        if following:
            heapq.heappush(heap, (gain, following, name))
    return chosen


def _best_step(layer: Sensitivity, now: CodebookScheme) -> tuple[float, str]:
    """Minus the loss saved for each bit by the best dearer scheme, and its name; no name if none saves anything."""
    options = [
        ((layer.loss[scheme] - layer.loss[now]) / (bits - layer.bits[now]), str(scheme))
        for scheme, bits in layer.bits.items()
        if bits > layer.bits[now] and layer.loss[scheme] < layer.loss[now]
    ]
    return min(options, default=(0.0, ""))
