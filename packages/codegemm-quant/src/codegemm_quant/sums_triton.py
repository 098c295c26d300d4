"""Sums by codebook entry on a GPU, over vectors that are sorted by entry, in a fixed order and without atomics."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

VECTORS = 128
"""Vectors that a program gathers at once."""
RUN = 4096
"""Vectors of one entry that one program sums, on average."""


@triton.jit  # type: ignore[untyped-decorator]
def _sum_kernel(  # type: ignore[no-untyped-def]
    values_ptr, order_ptr, starts_ptr, sums_ptr, vectors, V: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    entry, split, book = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    entries, splits = tl.num_programs(0), tl.num_programs(1)
    first = tl.load(starts_ptr + book * (entries + 1) + entry)
    last = tl.load(starts_ptr + book * (entries + 1) + entry + 1)
    length = (last - first + splits - 1) // splits
    begin = first + split * length
    end = tl.minimum(begin + length, last)
    part = tl.arange(0, V)
    total = tl.zeros([B, V], dtype=tl.float32)
    for at in range(begin, end, B):
        place = at + tl.arange(0, B)
        inside = place < end
        vector = tl.load(order_ptr + book.to(tl.int64) * vectors + place, mask=inside, other=0).to(tl.int64)
        total += tl.load(values_ptr + vector[:, None] * V + part[None, :], mask=inside[:, None], other=0.0)
    out = ((split * tl.num_programs(2) + book) * entries + entry) * V
    tl.store(sums_ptr + out + part, tl.sum(total, axis=0))


def sorted_sums(values: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """values fp32 [P, v], order int32 [m, P] of vectors sorted by entry, starts int32 [m, C + 1] -> [m, C, v]."""
    (num_codebooks, vectors), entries, v = order.shape, starts.shape[1] - 1, values.shape[1]
    splits = max(1, vectors // (entries * RUN))
    sums = values.new_empty(splits, num_codebooks, entries, v)
    grid = (entries, splits, num_codebooks)
    _sum_kernel[grid](values.contiguous(), order, starts, sums, vectors, V=v, B=VECTORS)
    return sums.sum(0) if splits > 1 else sums[0]
