"""The CPU half of bench_kernels: products and a plain read of as many bytes, in turn, then torch's dense product.

The machine is shared, so what is compared is timed in the same loop; the dense product is not, as it would leave
nothing of the others in the caches. Every call takes the next of enough copies of its operands that they come from
memory and not from a cache.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from bench import llama_cpp
from torch import Tensor

from codegemm_kernels import CodebookScheme, ops, reference

CACHE_BYTES = 160 << 20  # five times the last-level cache of the machine that docs/log.md is about
DENSE_BYTES = 200 << 20
LLAMA_KEYS = {"TQ2_0": "llama_tq2_0_us", "Q2_K": "llama_q2_k_us"}  # llama.cpp's formats and their column
SECONDS = 0.4  # for each row, and again for the dense products
MIN_ROUNDS = 15


def time_shape(
    N: int, K: int, scheme: CodebookScheme, batches: tuple[int, ...], threads: int, peers: list[str], dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Rows of one matrix in one scheme, one a batch size, on `threads` threads."""
    torch.set_num_threads(threads)
    shapes = scheme.shapes(N, K)
    codes = torch.randint(-(2**31), 2**31, shapes["codes"]).to(torch.int32)
    codebooks = (torch.randn(shapes["codebooks"]) / 2).to(dtype)
    scale = (0.02 + 0.005 * torch.randn(shapes["scales"])).to(dtype)
    copies = max(2, CACHE_BYTES // codes.nbytes)
    tiled = [ops.tile(codes, scheme.vector_length, len(scale)) for _ in range(copies)]
    scales = [scale.clone() for _ in range(copies)]
    # Not zeros: memory that was never written is one page of the kernel, which stays in the cache.
    ones = [torch.ones((codes.nbytes + scale.nbytes) // 4) for _ in range(copies)]
    dense = {
        name: [torch.full((N, K), 0.01, dtype=kind) for _ in range(max(2, DENSE_BYTES // (N * K * kind.itemsize)))]
        for name, kind in (("dense", torch.bfloat16), ("dense_fp32", torch.float32))
        if "dense" in peers
    }
    rows = []
    for batch in batches:
        x = torch.randn(batch, K).to(dtype)
        calls: dict[str, Callable[[int], object]] = {
            "us": lambda i, x=x: ops.gemm(x, tiled[i % copies], codebooks, scales[i % copies]),
            "stream_us": lambda i: ones[i % copies].sum(),
        }
        times = in_turn(calls)
        for name, weights in dense.items():
            inputs = x.to(weights[0].dtype)
            times |= in_turn(
                {f"{name}_us": lambda i, w=weights, x=inputs: torch.nn.functional.linear(x, w[i % len(w)])}
            )
        for name, key in LLAMA_KEYS.items() if "llama.cpp" in peers else ():
            with llama_cpp.matrix_product(N, K, batch, name, copies, threads) as product:
                times |= in_turn({key: product})
        row = {"shape": f"{N}x{K}", "scheme": str(scheme), "batch": batch, "threads": threads}
        row |= {name: statistics.median(each) for name, each in times.items()}
        row |= {f"least_{name}": min(each) for name, each in times.items()}
        rows.append(row | {"bytes": codes.nbytes + scale.nbytes, "relative_error": error(x, codes, codebooks, scale)})
        say(rows[-1])
    return rows


def in_turn(calls: dict[str, Callable[[int], object]]) -> dict[str, list[float]]:
    """Microseconds of the calls, each in its turn, round after round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    start = time.perf_counter()
    for i in range(10**6):
        if i >= MIN_ROUNDS and time.perf_counter() - start > SECONDS:
            break
        for name, call in calls.items():
            begin = time.perf_counter_ns()
            call(i)
            times[name].append((time.perf_counter_ns() - begin) / 1e3)
    return times


def error(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> float:
    """|y - exact| / |exact| in Euclidean norms, of 8 rows among all: the exact product is slow."""
    some = slice(None, None, max(1, len(x) // 8))
    y = ops.gemm(x, codes, codebooks, scales)[some].double()
    exact = reference.gemm(x[some].double(), codes, codebooks.double(), scales.double())
    return float((y - exact).norm() / exact.norm())


def say(row: dict[str, Any]) -> None:
    """One line of the table: medians, and the ratio of medians and of least times."""
    dense = f"dense bf16 {row['dense_us']:8.0f}  fp32 {row['dense_fp32_us']:8.0f}" if "dense_us" in row else ""
    dense += "".join(f"  {name} {row[key]:8.0f}" for name, key in LLAMA_KEYS.items() if key in row)
    ratio = f"{row['us'] / row['stream_us']:5.2f} x stream ({row['least_us'] / row['least_stream_us']:.2f} of least)"
    print(
        f"{row['shape']:>12} {row['scheme']:>9} batch {row['batch']:>4} threads {row['threads']} {row['us']:8.0f} us  "
        f"{ratio}  {dense}  error {row['relative_error']:.1e}",
        file=sys.stderr,
        flush=True,
    )
