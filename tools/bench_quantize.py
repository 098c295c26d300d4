"""Times the quantisation of decoder blocks of a real model's shape: seconds by stage, peak memory, errors, as JSON.

Weights are random and activations synthetic: hidden states whose features are correlated, with a spectrum that falls
like a power, and for the quantised stream the same with noise. So times and memory are those of the real model, errors
are not. Under torchrun each process has a share of every batch of windows.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPES = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    },
}
BATCH = 8
DECAY = 0.7
"""The standard deviation along the i-th direction of hidden states is i to this power, downwards."""
NOISE = 0.1
"""Size of what the quantised stream's inputs have beside the dense ones', relative to them."""


@dataclass(frozen=True)
class Bench:
    """What to time."""

    shape: str = "llama-3.1-8b"
    """llama-3.1-8b or tiny."""
    blocks: int = 1
    """Decoder blocks to quantise, one after the other."""
    json: Path | None = None
    """File for the result, which is also printed."""
    scheme: str = "m1v4g128"
    """Codebooks, vector length and scale group size."""
    windows: int = 256
    """Calibration windows."""
    length: int = 2048
    """Tokens in a window."""
    rounds: int = 4
    """Alternations of least squares and code sweeps for each matrix."""
    tune_epochs: int = 4
    """Passes over the windows that tune the block."""
    offload: bool = False
    """Keep hidden states in pinned host memory."""
    device: str | None = None
    """Default: the first GPU, or else the CPU."""
    debug: bool = False
    """Show the traceback of a failure."""


def main() -> None:
    """Entry point."""
    import tyro

    from codegemm_kernels.errors import run_command

    command = tyro.cli(Bench)
    sys.exit(run_command(lambda: bench(command), debug=command.debug))


def bench(command: Bench) -> dict[str, Any] | None:
    """Quantise the blocks; returns what is written to the file, None in all processes but the first."""
    from codegemm_kernels import BadInput, CodebookScheme
    from codegemm_quant.block_fit import BlockPlan
    from codegemm_quant.fit import FitPlan
    from codegemm_quant.loading import choose_device
    from codegemm_quant.parallel import team_of_environment
    from codegemm_quant.stage_clock import StageClock

    if command.shape not in SHAPES:
        raise BadInput(f"unknown shape {command.shape!r}: choose one of {', '.join(SHAPES)}")
    if command.windows % BATCH:
        raise BadInput(f"windows must be a multiple of {BATCH}, not {command.windows}")
    device = choose_device(command.device)
    torch.set_float32_matmul_precision("high")
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    clock = StageClock(device)
    fit = FitPlan(CodebookScheme.parse(command.scheme), command.rounds, 0.01, torch.bfloat16)
    for width in (SHAPES[command.shape]["hidden_size"], SHAPES[command.shape]["intermediate_size"]):
        fit.scheme.check_matrix(width, width)
    with team_of_environment(device) as team:
        if BATCH % team.size:
            raise BadInput(f"batches of {BATCH} windows cannot be shared by {team.size} processes: use 2, 4 or 8")
        plan = BlockPlan(fit, {}, command.tune_epochs, 4e-3, compute, team, clock)
        reports, started = [], time.perf_counter()
        for index in range(command.blocks):
            dense, streams = synthetic_block(command, plan, device, index)
            if index == 0:
                team.wait()
                started = time.perf_counter()  # making activations up is no part of quantising
                clock.seconds.clear()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
            reports.append(one_block(dense, streams, plan, index))
            print(f"block {index}: error {reports[-1]['error']:.4f}", file=sys.stderr)
        seconds = time.perf_counter() - started - clock.seconds.pop("activations", 0.0)
        peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
        peaks = team.join(torch.tensor([peak], device=device), team.size).tolist()
    result = {
        "command": " ".join(sys.argv),
        "shape": command.shape,
        "scheme": command.scheme,
        "blocks": command.blocks,
        "tokens": command.windows * command.length,
        "processes": team.size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "seconds_per_block": seconds / command.blocks,
        "stages": {stage: spent / command.blocks for stage, spent in clock.seconds.items()},
        "peak_gpu_gb": max(peaks),
        "peak_host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "reports": reports,
    }
    if command.json is not None and team.leads:
        command.json.write_text(json.dumps(result, indent=2) + "\n")
    return result if team.leads else None


def one_block(dense: Any, streams: Any, plan: Any, index: int) -> dict[str, Any]:
    """What a run does for each block, the forward passes included; returns the block's report."""
    from codegemm_quant.block_fit import install, mixed_precision, quantize_block, stored_tensors
    from codegemm_quant.blocks import linear_shapes
    from codegemm_quant.hidden_states import HiddenStates

    device = streams.inputs.device
    linears = list(linear_shapes(dense, "block", ()))
    with torch.no_grad(), mixed_precision(device, plan.compute):
        targets = HiddenStates(device, offload=streams.inputs.offload)
        with plan.clock("forward"):
            for hidden in streams.dense_inputs:
                targets.append(streams.call.run(dense, hidden))
        generator = torch.Generator().manual_seed(index)
        quantised, report = quantize_block(
            dense, f"block {index}", linears, replace(streams, targets=targets), plan, generator
        )
        with plan.clock("save"):
            tensors = stored_tensors(quantised, torch.bfloat16)
        del quantised
        outputs = HiddenStates(device, offload=streams.inputs.offload)
        with plan.clock("forward"):
            install(dense, linears, tensors, plan.compute)
            for hidden in streams.inputs:
                outputs.append(streams.call.run(dense, hidden))
    if not outputs.finite():
        raise ArithmeticError(f"block {index}: the quantised block's output is not finite")
    return report


@torch.no_grad()
def synthetic_block(command: Bench, plan: Any, device: torch.device, index: int) -> tuple[Any, Any]:
    """A random dense block and what it is called with: hidden states of both streams, no targets yet."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from codegemm_quant.block_fit import Streams
    from codegemm_quant.blocks import find_blocks
    from codegemm_quant.frame import ModelFrame, place
    from codegemm_quant.hidden_states import HiddenStates

    with plan.clock("activations"):
        config = LlamaConfig(**SHAPES[command.shape], num_hidden_layers=1, vocab_size=256)
        torch.manual_seed(index)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=plan.compute).eval()
        prefix, blocks = find_blocks(model)
        frame = ModelFrame(model, prefix, blocks, device, plan.compute)
        call = frame.calls(torch.zeros(BATCH // plan.team.size, command.length, dtype=torch.long))[0]
        frame.close()
        width = config.hidden_size
        sizes = torch.arange(1, width + 1, device=device) ** -DECAY
        mix = torch.randn(width, width, device=device) * (sizes / sizes.square().sum().sqrt()).unsqueeze(1)
        inputs = HiddenStates(device, offload=command.offload)
        dense_inputs = HiddenStates(device, offload=command.offload)
        for _ in range(command.windows // BATCH):
            dense: Tensor = torch.randn(BATCH, command.length, width, device=device) @ mix
            noisy = dense + NOISE * torch.randn_like(dense) * dense.std()
            inputs.append(plan.team.own(noisy).to(plan.compute))
            dense_inputs.append(plan.team.own(dense).to(plan.compute))
        block = blocks[0].requires_grad_(False)
        place(block, device, plan.compute)
        return block, Streams(call, inputs, dense_inputs, dense_inputs)


if __name__ == "__main__":
    main()
