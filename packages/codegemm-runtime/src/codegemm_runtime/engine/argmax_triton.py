"""The end of a step, in Triton: the largest logit of each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegemm_runtime.engine.fused_triton import launch_options

PART = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _largest_of_part(  # type: ignore[no-untyped-def]
    scores_ptr, values_ptr, places_ptr, vocabulary, PART: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * PART + tl.arange(0, PART)
    scores = tl.load(scores_ptr + row * vocabulary + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
    value, place = tl.max(scores, axis=0, return_indices=True)
    out = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(values_ptr + out, value)
    tl.store(places_ptr + out, tl.program_id(1) * PART + place)


@triton.jit  # type: ignore[untyped-decorator]
def _largest_of_all(  # type: ignore[no-untyped-def]
    values_ptr, places_ptr, tokens_ptr, parts, PARTS: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    values = tl.load(values_ptr + row * parts + part, mask=part < parts, other=float("-inf"))
    best = tl.argmax(values, axis=0)
    tl.store(tokens_ptr + row, tl.load(places_ptr + row * parts + best).to(tl.int64))


def first_largest(scores: Tensor) -> Tensor:
    """`fused.first_largest` in two launches: torch's own reads a row with one program, 27 us for 128256."""
    rows, vocabulary = scores.shape
    parts = triton.cdiv(vocabulary, PART)
    values = torch.empty(rows, parts, device=scores.device)
    places = torch.empty(rows, parts, dtype=torch.int32, device=scores.device)
    tokens = torch.empty(rows, dtype=torch.long, device=scores.device)
    options = launch_options(scores.device)
    _largest_of_part[(rows, parts)](scores.contiguous(), values, places, vocabulary, PART=PART, num_warps=4, **options)
    _largest_of_all[(rows,)](values, places, tokens, parts, PARTS=triton.next_power_of_2(parts), num_warps=4, **options)
    return tokens
