"""Times codegemm::gemm against the bytes it reads and against other kernels: table, JSON file, roofline chart.

Every call is one of a CUDA graph of calls on different random weights, more of them than the L2 cache holds, so codes
come from memory as they do while a model decodes. Times are medians over replays of the graph.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WEIGHT_BYTES = 320e6  # of codes in one graph: 5 times the L2 of an H200
DENSE_BYTES = 1e9
REPLAYS = 11
PEERS = ("stream", "dense", "aqlm")


@dataclass(frozen=True)
class Bench:
    """What to time; shapes are N x K, out features by in features."""

    json: Path
    """File for all rows; the chart goes beside it as .png."""
    device: str = "cuda"
    """The GPU to time on."""
    shapes: tuple[str, ...] = (
        "4096x4096",
        "6144x4096",
        "4096x14336",
        "28672x4096",
        "8192x8192",
        "10240x8192",
        "8192x28672",
        "57344x8192",
    )
    """Matrices, as NxK."""
    schemes: tuple[str, ...] = ("m1v4g128", "m2v8g128")
    """Codebooks, vector length and scale group size."""
    batches: tuple[int, ...] = (1, 2, 8, 16, 64)
    """Rows of x."""
    peers: str = "dense,stream"
    """What to time beside it: dense (torch's linear), stream (reading the same codes), aqlm (its package's kernels)."""
    dtype: str = "float16"
    """Type of activations, codebooks and scales: float16 or bfloat16."""
    debug: bool = False
    """Show the traceback of a failure."""


def main() -> None:
    """Entry point."""
    import tyro

    config = tyro.cli(Bench, description=__doc__)
    from codegemm_kernels.errors import run_command

    sys.exit(run_command(lambda: run(config), debug=config.debug))


def run(config: Bench) -> dict[str, Any]:
    """Time everything and write the files; returns the rows."""
    from codegemm_kernels.errors import BadInput

    peers = [peer for peer in config.peers.split(",") if peer]
    if set(peers) - set(PEERS):
        raise BadInput(f"unknown peers in {config.peers!r}: choose from {', '.join(PEERS)}")
    if config.dtype not in ("float16", "bfloat16"):
        raise BadInput(f"dtype {config.dtype!r} has no fast kernel: choose float16 or bfloat16")
    if not torch.cuda.is_available():
        raise BadInput("timing CUDA kernels needs a GPU that torch can see, and there is none")
    if "aqlm" in peers:
        aqlm_ops()
    device = torch.device(config.device)
    torch.cuda.set_device(device)
    rate = copy_rate(device)
    print(f"{torch.cuda.get_device_name(device)}, copies at {rate / 1e12:.2f} TB/s", file=sys.stderr)
    rows = []
    for shape in config.shapes:
        N, K = parse_shape(shape)
        dense_us = {b: time_dense(N, K, b, config, device) if "dense" in peers else None for b in config.batches}
        for scheme in config.schemes:
            rows += time_scheme(N, K, scheme, config, peers, dense_us, rate, device)
    config.json.parent.mkdir(parents=True, exist_ok=True)
    result = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__, "copy_rate": rate, "rows": rows}
    config.json.write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, config.json.with_suffix(".png"))
    return {"rows": rows}


def parse_shape(shape: str) -> tuple[int, int]:
    """`28672x4096` as (N, K)."""
    from codegemm_kernels.errors import BadInput

    parts = shape.split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise BadInput(f"shape {shape!r} is not of the form NxK, such as 28672x4096")
    return int(parts[0]), int(parts[1])


def time_scheme(
    N: int,
    K: int,
    scheme_text: str,
    config: Bench,
    peers: list[str],
    dense_us: dict[int, float | None],
    rate: float,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Rows of one matrix in one scheme, one a batch size."""
    from codegemm_kernels import CodebookScheme, ops, reference

    scheme = CodebookScheme.parse(scheme_text)
    dtype = getattr(torch, config.dtype)
    shapes = scheme.shapes(N, K)
    m, words, _ = shapes["codes"]
    copies = max(2, round(WEIGHT_BYTES / (m * words * N * 4)))
    codes = torch.randint(-(2**31), 2**31, (copies, *shapes["codes"]), device=device, dtype=torch.int64).to(torch.int32)
    codebooks = (torch.randn(shapes["codebooks"], device=device) / 2).to(dtype)
    scales = (0.02 + 0.005 * torch.randn((copies, *shapes["scales"]), device=device)).to(dtype)
    never = torch.zeros(1, dtype=torch.int32, device=device)
    floor_bytes = codes[0].numel() * 4 + scales[0].numel() * 2
    stream_us = graph_time(lambda i: read_all(codes[i % copies], never), copies) if "stream" in peers else None
    aqlm_us = time_aqlm(N, K, scheme, copies, dtype, device) if "aqlm" in peers else None
    rows = []
    for batch in config.batches:
        x = torch.randn(batch, K, device=device).to(dtype)
        us = graph_time(lambda i, x=x: ops.gemm(x, codes[i % copies], codebooks, scales[i % copies]), copies)
        part = slice(0, min(N, 2048))  # of the rows: the exact product is slow
        weight = (codes[0][:, :, part].contiguous(), codebooks, scales[0][:, part].contiguous())
        exact = reference.gemm(x.double(), weight[0], weight[1].double(), weight[2].double())
        y = ops.gemm(x, codes[0], codebooks, scales[0])[:, part].double()
        row = {
            "shape": f"{N}x{K}",
            "scheme": scheme_text,
            "batch": batch,
            "us": us,
            "stream_us": stream_us,
            "dense_us": dense_us[batch],
            "aqlm_us": aqlm_us if batch == 1 else None,
            "floor_us": floor_bytes / rate * 1e6,
            "relative_error": float((y - exact).norm() / exact.norm()),
        }
        rows.append(row)
        say(row)
    return rows


def say(row: dict[str, Any]) -> None:
    """One line of the table."""
    ratio = f"{row['us'] / row['stream_us']:5.2f} x stream" if row["stream_us"] else ""
    dense = f"dense {row['dense_us']:7.1f}" if row["dense_us"] else ""
    aqlm = f"aqlm {row['aqlm_us']:7.1f}" if row["aqlm_us"] else ""
    print(
        f"{row['shape']:>12} {row['scheme']:>9} batch {row['batch']:>4} {row['us']:8.2f} us  "
        f"floor {row['floor_us']:6.2f}  {ratio}  {dense}  {aqlm}  error {row['relative_error']:.1e}",
        file=sys.stderr,
        flush=True,
    )


def graph_time(call: Callable[[int], Tensor | None], calls: int) -> float:
    """Microseconds a call: `call(0)` .. `call(calls - 1)` in one graph, median over its replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles, loads modules and makes handles before the capture
        call(0)
        call(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            call(i)
    times = []
    for _ in range(REPLAYS + 2):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / calls)
    return sorted(times[2:])[REPLAYS // 2]


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written: the memory's practical ceiling."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (graph_time(lambda _: target.copy_(source), 4) * 1e-6)


def time_dense(N: int, K: int, batch: int, config: Bench, device: torch.device) -> float:
    """torch's linear of the same shape."""
    dtype = getattr(torch, config.dtype)
    copies = max(2, round(DENSE_BYTES / (2 * N * K)))
    weights = [torch.randn(N, K, device=device, dtype=dtype) for _ in range(copies)]
    x = torch.randn(batch, K, device=device).to(dtype)
    return graph_time(lambda i: torch.nn.functional.linear(x, weights[i % copies]), max(copies, 10))


tl: Any = None  # triton.language, once read_all has imported it


def _read(source, never, count, WORDS: tl.constexpr, LOADS: tl.constexpr):  # type: ignore[no-untyped-def]
    mix = tl.zeros((WORDS,), tl.int32)
    for k in tl.static_range(LOADS):
        at = (tl.program_id(0) * LOADS + k) * WORDS + tl.arange(0, WORDS)
        mix |= tl.load(source + at, mask=at < count, other=0, eviction_policy="evict_first")
    if tl.max(mix, axis=0) == -123456789:
        tl.store(never, 1)


@cache
def read_kernel() -> Any:
    """The compiled `_read`. Triton is imported here: it exists only beside a torch for GPUs."""
    global tl
    import triton
    import triton.language

    tl = triton.language
    return triton.jit(_read)


def read_all(data: Tensor, never: Tensor) -> None:
    """Read a contiguous int32 tensor of fewer than 2^31 words and do nothing with it, 16 bytes a thread and load."""
    words, loads = 2048, 4
    programs = -(-data.numel() // (words * loads))
    read_kernel()[(programs,)](data, never, data.numel(), words, loads, num_warps=8)


def aqlm_ops() -> Any:
    """The kernels of the aqlm package; BadInput where it is not installed."""
    from codegemm_kernels.errors import BadInput

    try:
        import aqlm.inference_kernels.cuda_kernel as kernels
    except ImportError as error:
        raise BadInput(
            f"the peer aqlm needs the package aqlm[gpu] ({error}): install it, or leave it out of --peers"
        ) from error
    return kernels


def time_aqlm(N: int, K: int, scheme: Any, copies: int, dtype: torch.dtype, device: torch.device) -> float | None:
    """AQLM's product for one row of x with codebooks of 256 vectors of 8 (its 2x8); None for other schemes."""
    if (scheme.num_codebooks, scheme.vector_length) != (2, 8):
        return None
    aqlm_ops()
    codes = torch.randint(-128, 128, (copies, N, K // 8, 2), device=device, dtype=torch.int8)
    codebooks = torch.randn(2, 256, 1, 8, device=device, dtype=dtype)
    scales = torch.rand(N, 1, 1, 1, device=device, dtype=dtype)
    x = torch.randn(1, K, device=device, dtype=dtype)
    matvec = torch.ops.aqlm.code2x8_matmat
    return graph_time(lambda i: matvec(x, codes[i % copies], codebooks, scales, None), copies)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Achieved bandwidth of codes and scales over bytes, one line a scheme and batch, with the memory's ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for scheme, batch in sorted({(row["scheme"], row["batch"]) for row in rows}):
        line = sorted(
            (row["floor_us"], row["floor_us"] / row["us"])
            for row in rows
            if (row["scheme"], row["batch"]) == (scheme, batch)
        )
        axes.plot([x for x, _ in line], [y for _, y in line], marker="o", label=f"{scheme}, batch {batch}")
    streams = sorted({(row["floor_us"], row["floor_us"] / row["stream_us"]) for row in rows if row["stream_us"]})
    if streams:
        axes.plot([x for x, _ in streams], [y for _, y in streams], "k--", label="reading the codes only")
    axes.axhline(1, color="grey")
    axes.set_xscale("log")
    axes.set_xlabel("bytes of codes and scales, in microseconds at copy speed")
    axes.set_ylabel("share of copy speed reached")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
