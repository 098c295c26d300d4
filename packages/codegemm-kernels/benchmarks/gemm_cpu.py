"""Time `codegemm::gemm` on the CPU beside torch's dense product and a plain read of the same code bytes.

    uv run packages/codegemm-kernels/benchmarks/gemm_cpu.py --threads 1 2 --rows 1

Every timing goes over enough copies of its operands that they come from memory and not from a cache. Numbers are the
best of the calls, in microseconds, because on a shared machine the rest is other people's work; the last line of stdout
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from codegemm_kernels import CodebookScheme, ops

CACHE_BYTES = 96 << 20  # three times the last-level cache of the machine the numbers in docs/log.md are from
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def best_us(call: Callable[[int], object], copies: int, seconds: float) -> float:
    """Least time of call(copy) in microseconds, over at least `seconds` and one round of the copies."""
    call(0)
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < copies:
        begin = time.perf_counter_ns()
        call(len(times) % copies)
        times.append((time.perf_counter_ns() - begin) / 1000)
    return min(times)


def copies_of(tensor: Tensor) -> list[Tensor]:
    """A tensor and as many copies as overflow the cache."""
    return [tensor] + [tensor.clone() for _ in range(CACHE_BYTES // tensor.nbytes)]


def time_ours(scheme: CodebookScheme, N: int, K: int, x: Tensor, seconds: float) -> float:
    """Microseconds of our product."""
    shapes = scheme.shapes(N, K)
    codes = copies_of(torch.randint(-(2**31), 2**31, shapes["codes"]).int())
    codebooks, scales = torch.randn(shapes["codebooks"]).to(x.dtype), torch.rand(shapes["scales"]).to(x.dtype)
    return best_us(lambda i: ops.gemm(x, codes[i], codebooks, scales), len(codes), seconds)


def time_read(scheme: CodebookScheme, N: int, K: int, seconds: float) -> float:
    """Microseconds in which torch sums as many bytes as there are codes."""
    words = scheme.num_codebooks * K * N // (4 * scheme.vector_length)
    zeros = copies_of(torch.zeros(words))
    return best_us(lambda i: zeros[i].sum(), len(zeros), seconds)


def time_dense(N: int, K: int, x: Tensor, seconds: float) -> float:
    """Microseconds of torch's product with a dense matrix in x's dtype."""
    weights = copies_of(torch.randn(N, K).to(x.dtype))
    return best_us(lambda i: torch.nn.functional.linear(x, weights[i]), len(weights), seconds)


def measure(scheme: CodebookScheme, N: int, K: int, rows: int, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """Microseconds of our product, of a read of its codes, and of torch's dense product in fp32 and bf16."""
    x = torch.randn(rows, K)
    return {
        "ours": time_ours(scheme, N, K, x.to(dtype), seconds),
        "read": time_read(scheme, N, K, seconds),
        "float32": time_dense(N, K, x, seconds),
        "bfloat16": time_dense(N, K, x.bfloat16(), seconds),
    }


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=["m1v4g128", "m2v8g128"])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "14336x4096", "4096x14336"], metavar="NxK")
    parser.add_argument("--rows", nargs="+", type=int, default=[1], help="rows of x")
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each number")
    args = parser.parse_args()
    table = []
    names = ("N x K", "scheme", "rows", "threads", "ours", "read", "fp32", "bf16")
    print("{:>14} {:>9} {:>5} {:>7} {:>8} {:>8} {:>9} {:>9}".format(*names), file=sys.stderr)
    for shape in args.shapes:
        N, K = map(int, shape.split("x"))
        for threads in args.threads:
            torch.set_num_threads(threads)
            for scheme in args.schemes:
                for rows in args.rows:
                    t = measure(CodebookScheme.parse(scheme), N, K, rows, DTYPES[args.dtype], args.seconds)
                    table.append({"shape": shape, "scheme": scheme, "rows": rows, "threads": threads, **t})
                    print(
                        f"{shape:>14} {scheme:>9} {rows:>5} {threads:>7} {t['ours']:8.0f} {t['read']:8.0f} "
                        f"{t['float32']:9.0f} {t['bfloat16']:9.0f}",
                        file=sys.stderr,
                    )
    print(
        json.dumps({"instruction_set": ops.available_kernels()[0], "dtype": args.dtype, "unit": "us", "table": table})
    )


if __name__ == "__main__":
    main()
