"""Times codegemm::gemm against the bytes it reads and against other kernels: table, JSON file, roofline chart.

On a GPU every call is one of a CUDA graph of calls on different random weights, more of them than the L2 cache holds,
so codes come from memory as they do while a model decodes. Times are medians over replays of the graph.
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
PEERS = ("stream", "dense", "aqlm", "llama.cpp")
SHAPES = ("4096x4096", "6144x4096", "4096x14336", "28672x4096", "8192x8192", "10240x8192", "8192x28672", "57344x8192")
CPU_SHAPES = ("8192x2048", "2048x8192", "14336x4096", "4096x14336")


@dataclass(frozen=True)
class Bench:
    """What to time; shapes are N x K, out features by in features."""

    json: Path
    """File for all rows; the chart goes beside it as .png."""
    device: str = "cuda"
    """The GPU to time on, or cpu."""
    shapes: tuple[str, ...] = ()
    """Matrices, as NxK; on a GPU 4096+1024+1024x4096 are three that share x, timed in one grouped call and as one
    matrix. Default: eight of the Llamas, and on the CPU four smaller ones."""
    schemes: tuple[str, ...] = ("m1v4g128", "m2v8g128")
    """Codebooks, vector length and scale group size."""
    batches: tuple[int, ...] = (1, 2, 8, 16, 64)
    """Rows of x."""
    peers: str = "dense,stream"
    """What to time beside it: dense (torch's linear), stream (reading the same codes; on the CPU always), aqlm (its
    package's kernels, on a GPU), llama.cpp (its 2-bit products, on the CPU)."""
    dtype: str = "float16"
    """Type of activations, codebooks and scales: float16 or bfloat16; on the CPU also float32."""
    threads: tuple[int, ...] = (1, 2)
    """Threads, on the CPU."""
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
    if config.device == "cpu":
        return finish(config, run_on_cpu(config, peers))
    if config.dtype not in ("float16", "bfloat16"):
        raise BadInput(f"dtype {config.dtype!r} has no fast kernel: choose float16 or bfloat16")
    if not torch.cuda.is_available():
        raise BadInput("timing CUDA kernels needs a GPU that torch can see, and there is none")
    if "aqlm" in peers:
        aqlm_ops()
    torch.cuda.set_device(torch.device(config.device).index or 0)
    device = torch.device("cuda", torch.cuda.current_device())
    rate = read_rate(device)
    print(f"{torch.cuda.get_device_name(device)}, reads at {rate / 1e12:.2f} TB/s", file=sys.stderr)
    rows = []
    for shape in config.shapes or SHAPES:
        rows_of, K = parse_shape(shape)
        dense_us = {
            b: time_dense(sum(rows_of), K, b, config, device) if "dense" in peers else None for b in config.batches
        }
        for scheme in config.schemes:
            rows += time_scheme(rows_of, K, scheme, config, peers, dense_us, rate, device)
    return finish(config, {"device": torch.cuda.get_device_name(device), "read_rate": rate, "rows": rows})


def run_on_cpu(config: Bench, peers: list[str]) -> dict[str, Any]:
    """The result of a run on the CPU."""
    from bench.cpu_kernels import time_shape

    from codegemm_kernels import CodebookScheme
    from codegemm_kernels.errors import BadInput
    from codegemm_kernels.ops import available_kernels

    if config.dtype not in ("float16", "bfloat16", "float32"):
        raise BadInput(f"dtype {config.dtype!r} is not supported: choose float16, bfloat16 or float32")
    rows: list[dict[str, Any]] = []
    for threads in config.threads:
        for shape in config.shapes or CPU_SHAPES:
            (N,), K = parse_shape(shape)
            for scheme in map(CodebookScheme.parse, config.schemes):
                rows += time_shape(N, K, scheme, config.batches, threads, peers, getattr(torch, config.dtype))
    for row in rows:
        row["floor_us"] = row["least_stream_us"]
    return {"device": f"cpu, {available_kernels()[0]}", "rows": rows}


def finish(config: Bench, result: dict[str, Any]) -> dict[str, Any]:
    """Write the files; returns the rows."""
    config.json.parent.mkdir(parents=True, exist_ok=True)
    config.json.write_text(json.dumps({"torch": torch.__version__} | result, indent=1) + "\n")
    from bench import kernel_chart

    path = config.json.with_suffix(".png")
    if config.device == "cpu":
        kernel_chart.draw_ratios(result["rows"], path)
    else:
        kernel_chart.draw(result["rows"], result["read_rate"], path)
    return {"rows": result["rows"]}


def parse_shape(shape: str) -> tuple[list[int], int]:
    """`28672x4096` as ([28672], 4096), and `4096+1024x4096` as ([4096, 1024], 4096)."""
    from codegemm_kernels.errors import BadInput

    parts = shape.split("x")
    heights = parts[0].split("+")
    if len(parts) != 2 or not all(part.isdigit() for part in [*heights, parts[1]]):
        raise BadInput(f"shape {shape!r} is not of the form NxK, such as 28672x4096 or 4096+1024+1024x4096")
    return [int(height) for height in heights], int(parts[1])


@dataclass(frozen=True)
class Matrices:
    """Random weights of one shape and scheme, enough copies of them that none stays in the cache."""

    copies: int
    codes: Tensor
    codebooks: Tensor
    scales: Tensor

    @classmethod
    def random(cls, N: int, K: int, scheme: Any, dtype: torch.dtype, device: torch.device) -> Matrices:
        """N x K in the scheme given."""
        shapes = scheme.shapes(N, K)
        m, words, _ = shapes["codes"]
        copies = max(2, round(WEIGHT_BYTES / (m * words * N * 4)))
        codes = torch.randint(-(2**31), 2**31, (copies, *shapes["codes"]), device=device).to(torch.int32)
        codebooks = (torch.randn(shapes["codebooks"], device=device) / 2).to(dtype)
        scales = (0.02 + 0.005 * torch.randn((copies, *shapes["scales"]), device=device)).to(dtype)
        return cls(copies, codes, codebooks, scales)

    @property
    def bytes(self) -> int:
        """Of the codes and scales of one copy."""
        return self.codes[0].numel() * 4 + self.scales[0].numel() * self.scales.element_size()

    def weight(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, codebooks and scales of copy i."""
        return self.codes[i % self.copies], self.codebooks, self.scales[i % self.copies]


def time_scheme(
    heights: list[int],
    K: int,
    scheme_text: str,
    config: Bench,
    peers: list[str],
    dense_us: dict[int, float | None],
    rate: float,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Rows of one matrix, or of several that share x, in one scheme, one a batch size."""
    from codegemm_kernels import CodebookScheme, ops

    scheme, dtype, N = CodebookScheme.parse(scheme_text), getattr(torch, config.dtype), sum(heights)
    whole = Matrices.random(N, K, scheme, dtype, device)
    parts = [Matrices.random(height, K, scheme, dtype, device) for height in heights] if len(heights) > 1 else []
    never = torch.zeros(1, dtype=torch.int32, device=device)
    stream_us = graph_time(lambda i: read_all(whole.weight(i)[0], never), whole.copies) if "stream" in peers else None
    rows = []
    for batch in config.batches:
        x = torch.randn(batch, K, device=device).to(dtype)
        us = graph_time(lambda i, x=x: ops.gemm(x, *whole.weight(i)), whole.copies)
        row = {
            "shape": f"{'+'.join(map(str, heights))}x{K}",
            "scheme": scheme_text,
            "batch": batch,
            "us": us,
            "stream_us": stream_us,
            "dense_us": dense_us[batch],
            "aqlm_us": time_aqlm(x, N, scheme, whole.copies) if "aqlm" in peers else None,
            "floor_us": whole.bytes / rate * 1e6,
            "relative_error": relative_error(x, whole),
        }
        if parts:
            row["whole_us"] = us
            row["us"] = graph_time(lambda i, x=x: ops.gemm_grouped(x, *grouped(parts, i)), whole.copies)
        rows.append(row)
        say(row)
    return rows


def grouped(parts: list[Matrices], i: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[None]]:
    """Codes, codebooks, scales and the missing bias of copy i of every part."""
    weights = [part.weight(i) for part in parts]
    return [w[0] for w in weights], [w[1] for w in weights], [w[2] for w in weights], [None] * len(parts)


def relative_error(x: Tensor, matrices: Matrices) -> float:
    """|y - exact| / |exact| in Euclidean norms, on the first 2048 rows and 64 tokens: the exact product is slow."""
    from codegemm_kernels import ops, reference

    codes, codebooks, scales = matrices.weight(0)
    y = ops.gemm(x, codes, codebooks, scales)[:64, :2048].double()
    part = codes[:, :, :2048].contiguous(), codebooks.double(), scales[:, :2048].double()
    exact = reference.gemm(x[:64].double(), *part)
    return float((y - exact).norm() / exact.norm())


def say(row: dict[str, Any]) -> None:
    """One line of the table."""
    ratio = f"{row['us'] / row['stream_us']:5.2f} x stream" if row["stream_us"] else ""
    dense = f"dense {row['dense_us']:7.1f}" if row["dense_us"] else ""
    aqlm = f"aqlm {row['aqlm_us']:7.1f}" if row["aqlm_us"] else ""
    whole = f"as one matrix {row['whole_us']:7.2f}" if "whole_us" in row else ""
    print(
        f"{row['shape']:>12} {row['scheme']:>9} batch {row['batch']:>4} {row['us']:8.2f} us  "
        f"floor {row['floor_us']:6.2f}  {ratio}  {dense}  {aqlm}  {whole}  error {row['relative_error']:.1e}",
        file=sys.stderr,
        flush=True,
    )


def graph_time(call: Callable[[int], object], calls: int) -> float:
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


def read_rate(device: torch.device) -> float:
    """Bytes a second of reading 2 GB and doing nothing with them: the memory's practical ceiling."""
    data = torch.zeros(1 << 29, dtype=torch.int32, device=device)
    never = torch.zeros(1, dtype=torch.int32, device=device)
    return data.numel() * 4 / (graph_time(lambda _: read_all(data, never), 4) * 1e-6)


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


def time_aqlm(x: Tensor, N: int, scheme: Any, copies: int) -> float | None:
    """AQLM's product with one or two codebooks of 256 vectors of 8 (its 1x8, 2x8), the faster of its two kernels
    (row by row, or dequantising all of W); None for other schemes."""
    if scheme.num_codebooks > 2 or scheme.vector_length != 8:
        return None
    aqlm_ops()
    m, K = scheme.num_codebooks, x.shape[1]
    codes = torch.randint(-128, 128, (copies, N, K // 8, m), device=x.device, dtype=torch.int8)
    codebooks = torch.randn(m, 256, 1, 8, device=x.device, dtype=x.dtype)
    scales = torch.rand(N, 1, 1, 1, device=x.device, dtype=x.dtype)
    names = [f"code{m}x8_matmat"] if x.shape[0] == 1 else [f"code{m}x8_matmat", f"code{m}x8_matmat_dequant"]
    kernels = [getattr(torch.ops.aqlm, name) for name in names]
    return min(
        graph_time(lambda i, kernel=kernel: kernel(x, codes[i % copies], codebooks, scales, None), copies)
        for kernel in kernels
    )


if __name__ == "__main__":
    main()
