"""Attention of one new token a sequence in one launch: norm, rotation, append to the cache, attention, sum of parts.
And what comes before the attention of a prompt.

A program owns one sequence, one key head with its group of query heads, and one part of the keys. How many parts there
are work for follows from the length on the device, so one captured launch is right for every context, and a short one
does not pay for a long one: programs without keys return. Positions and the first tile of keys and values are loaded
while the product before is still running. The new token's key and value never travel through memory:
the program of the last part starts its sums from them. The program that finishes last adds the parts up.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegemm_runtime.engine.cache import KVCache, splits_for
from codegemm_runtime.engine.decoder import Decoder
from codegemm_runtime.engine.fused_triton import launch_options

BLOCK = 64
"""Keys of a tile."""
ALONE = 4
"""Up to this many tiles make a single part: adding parts up takes longer than reading on."""
WARPS = 4
STAGES = 2


@triton.jit  # type: ignore[untyped-decorator]
def rotation(cos_ptr, sin_ptr, position, PAIRS: tl.constexpr, DP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each element's cosine and signed sine [DP] at a position, and its partner; elements that stay have 1 and 0."""
    d = tl.arange(0, DP)
    pair = position * PAIRS + tl.where(d < PAIRS, d, d - PAIRS)
    rotated = d < 2 * PAIRS
    cos = tl.load(cos_ptr + pair, mask=rotated, other=1.0)
    sin = tl.load(sin_ptr + pair, mask=rotated, other=0.0)
    partner = tl.where(rotated, tl.where(d < PAIRS, d + PAIRS, d - PAIRS), d)
    return cos, tl.where(d < PAIRS, -sin, sin), partner


@triton.jit  # type: ignore[untyped-decorator]
def turned(  # type: ignore[no-untyped-def]
    start_ptr, line, inside, norm_ptr, eps, cos, sin, partner,
    D: tl.constexpr, DP: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Rows [L, DP] of heads at start + line, normed and rotated, fp32."""
    d = tl.arange(0, DP)
    inside = inside & (d < D)[None, :]
    x = tl.load(start_ptr + line[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(start_ptr + line[:, None] + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        x = x * inverse * (tl.load(norm_ptr + d, mask=d < D, other=0.0).to(tl.float32) + OFFSET)[None, :]
        weight = tl.load(norm_ptr + partner, mask=d < D, other=0.0).to(tl.float32) + OFFSET
        other = other * inverse * weight[None, :]
    return x * cos[None, :] + other * sin[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def _capped(scores, scale, softcap, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores in units of log 2."""
    scores = scores * scale
    if SOFTCAP:
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    return scores * 1.4426950408889634


@triton.jit  # type: ignore[untyped-decorator]
def stored(  # type: ignore[no-untyped-def]
    x, data_ptr, scale_ptr, entry, inside, D: tl.constexpr, DP: tl.constexpr, INT8: tl.constexpr
):
    """Write entries x [L, DP] at the places `entry` [L] of a cache; returns what its readers will see, fp32."""
    d = tl.arange(0, DP)
    at = data_ptr + entry[:, None] * D + d[None, :]
    inside = inside[:, None] & (d < D)[None, :]
    if INT8:
        scale = tl.maximum(tl.max(tl.abs(x), axis=1) / 127, 1e-12)
        codes = tl.floor(x / scale[:, None] + 0.5)
        tl.store(scale_ptr + entry, scale, mask=tl.max(inside.to(tl.int32), axis=1) > 0)
        tl.store(at, codes.to(tl.int8), mask=inside)
        return codes * scale[:, None]
    rounded = x.to(data_ptr.dtype.element_ty)
    tl.store(at, rounded, mask=inside)
    return rounded.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]
    keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, base, start, end,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Keys and values [BLOCK, DP] from `start` on, with their scales; zeros from `end` on."""
    d = tl.arange(0, DP)
    at = start + tl.arange(0, BLOCK)
    entry = (base + at)[:, None] * D + d[None, :]
    inside = (at < end)[:, None] & (d < D)[None, :]
    keys = tl.load(keys_ptr + entry, mask=inside, other=0.0)
    values = tl.load(values_ptr + entry, mask=inside, other=0.0)
    key_scales = tl.full([BLOCK], 1.0, tl.float32)
    value_scales = key_scales
    if INT8:
        key_scales = tl.load(key_scales_ptr + base + at, mask=at < end, other=0.0)
        value_scales = tl.load(value_scales_ptr + base + at, mask=at < end, other=0.0)
    return keys, values, key_scales, value_scales


@triton.jit  # type: ignore[untyped-decorator]
def _absorb(  # type: ignore[no-untyped-def]
    q, keys, values, key_scales, value_scales, left, top, weight, sums, scale, softcap,
    BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Add a tile, of which the first `left` keys count, to the running maximum, weight and sums."""
    scores = tl.dot(q, tl.trans(keys.to(q.dtype)), input_precision="ieee")
    if INT8:
        scores *= key_scales[None, :]
    there = tl.arange(0, BLOCK) < left
    scores = tl.where(there[None, :], _capped(scores, scale, softcap, SOFTCAP), float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    shrink = tl.exp2(top - higher)
    probabilities = tl.exp2(scores - higher[:, None])
    weight = weight * shrink + tl.sum(probabilities, axis=1)
    if INT8:
        probabilities *= value_scales[None, :]
    sums = sums * shrink[:, None]
    sums += tl.dot(probabilities.to(q.dtype), values.to(q.dtype), input_precision="ieee")
    return higher, weight, sums


@triton.jit  # type: ignore[untyped-decorator]
def _decode_attention(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, q_stride, k_stride, v_stride, q_norm_ptr, k_norm_ptr, norm_eps, cos_ptr, sin_ptr,
    keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, lengths_ptr, out_ptr, partial_ptr, weights_ptr, arrived_ptr,
    capacity, window, scale, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, DP: tl.constexpr,
    GP: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, INT8: tl.constexpr, ALONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    # Until q, k and v are there: lengths and cache were written by the last step, which is over.
    place = tl.program_id(0)
    part = tl.program_id(1)
    slot = (place // KV_HEADS).to(tl.int64)
    head = place % KV_HEADS
    position = tl.minimum(tl.load(lengths_ptr + slot), capacity - 1)
    first = 0
    if WINDOW:
        first = tl.maximum(position + 1 - window, 0)
    tiles = tl.cdiv(position - first, BLOCK)
    size = tl.maximum(tl.where(tiles <= ALONE, tiles, tl.cdiv(tiles, SPLITS)), 1) * BLOCK
    parts = tl.maximum(tl.cdiv(position - first, size), 1)
    if part >= parts:
        return
    base = (slot * KV_HEADS + head) * capacity
    begin = first + part * size
    end = tl.minimum(begin + size, position)
    keys, values, key_scales, value_scales = _tile(
        keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, base, begin, end, D, DP, BLOCK, INT8
    )
    cos, sin, partner = rotation(cos_ptr, sin_ptr, position, PAIRS, DP)
    d = tl.arange(0, DP)
    row = tl.arange(0, GP)
    live = (row < GROUP)[:, None]
    if PDL:
        gdc_wait()
    q_start = q_ptr + slot * q_stride + head * GROUP * D
    q = turned(q_start, row * D, live, q_norm_ptr, norm_eps, cos, sin, partner, D, DP, NORM, OFFSET)
    q = q.to(q_ptr.dtype.element_ty)
    top = tl.full([GP], float("-inf"), tl.float32)
    weight = tl.zeros([GP], tl.float32)
    sums = tl.zeros([GP, DP], tl.float32)
    if part == parts - 1:
        line = tl.zeros([1], tl.int32)
        one = line == 0
        entry = base + position + line
        k_start = k_ptr + slot * k_stride + head * D
        k = turned(k_start, line, one[:, None], k_norm_ptr, norm_eps, cos, sin, partner, D, DP, NORM, OFFSET)
        k = stored(k.to(q_ptr.dtype.element_ty).to(tl.float32), keys_ptr, key_scales_ptr, entry, one, D, DP, INT8)
        v_start = v_ptr + slot * v_stride + head * D
        v = tl.load(v_start + line[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0).to(tl.float32)
        v = stored(v, values_ptr, value_scales_ptr, entry, one, D, DP, INT8)
        top = _capped(tl.sum(q.to(tl.float32) * k, axis=1), scale, softcap, SOFTCAP)
        weight += 1.0
        sums += v
    if begin < end:  # else the new token is alone, and a tile without keys has no maximum
        top, weight, sums = _absorb(
            q, keys, values, key_scales, value_scales, end - begin, top, weight, sums, scale, softcap,
            BLOCK, SOFTCAP, INT8,
        )  # fmt: skip
    for start in range(begin + BLOCK, end, BLOCK):
        keys, values, key_scales, value_scales = _tile(
            keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, base, start, end, D, DP, BLOCK, INT8
        )
        top, weight, sums = _absorb(
            q, keys, values, key_scales, value_scales, end - start, top, weight, sums, scale, softcap,
            BLOCK, SOFTCAP, INT8,
        )  # fmt: skip
    out_start = out_ptr + (slot * KV_HEADS + head) * GROUP * D
    kept = live & (d < D)[None, :]
    if parts == 1:
        y = sums / weight[:, None]
        tl.store(out_start + row[:, None] * D + d[None, :], y.to(out_ptr.dtype.element_ty), mask=kept)
        return
    mine = (place * GROUP + row) * SPLITS + part
    tl.store(partial_ptr + mine[:, None] * D + d[None, :], sums, mask=kept)
    tl.store(weights_ptr + mine * 2, top, mask=row < GROUP)
    tl.store(weights_ptr + mine * 2 + 1, weight, mask=row < GROUP)
    tl.debug_barrier()  # every thread's stores come before the count
    if tl.atomic_add(arrived_ptr + place, 1, sem="acq_rel") == parts - 1:
        tl.store(arrived_ptr + place, 0)  # for the next launch
        index = tl.arange(0, SPLITS)
        for g in tl.static_range(GROUP):
            theirs = (place * GROUP + g) * SPLITS + index
            tops = tl.load(weights_ptr + theirs * 2, mask=index < parts, other=float("-inf"), cache_modifier=".cg")
            parts_weights = tl.load(weights_ptr + theirs * 2 + 1, mask=index < parts, other=0.0, cache_modifier=".cg")
            there = (index < parts)[:, None] & (d < D)[None, :]
            lines = tl.load(partial_ptr + theirs[:, None] * D + d[None, :], mask=there, other=0.0, cache_modifier=".cg")
            shares = tl.exp2(tops - tl.max(tops, axis=0))
            y = tl.sum(lines * shares[:, None], axis=0) / tl.sum(parts_weights * shares, axis=0)
            tl.store(out_start + g * D + d, y.to(out_ptr.dtype.element_ty), mask=d < D)


def decode_attention(
    decoder: Decoder, index: int, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, lengths: Tensor
) -> Tensor:
    """`attention.decode_attention`; lengths are int32."""
    batch, width = q.shape
    layer = decoder.layers[index]
    group = decoder.heads // decoder.kv_heads
    splits = splits_for(batch, decoder.kv_heads)
    out = q.new_empty((batch, width))
    normed = layer.q_norm is not None
    q_norm, k_norm = layer.q_norm or layer.before_mlp, layer.k_norm or layer.before_mlp  # read where there are some
    constants: dict[str, Any] = {
        "KV_HEADS": decoder.kv_heads, "GROUP": group, "D": decoder.head_dim, "PAIRS": decoder.cos.shape[1],
        "DP": triton.next_power_of_2(decoder.head_dim), "GP": max(triton.next_power_of_2(group), 16),
        "BLOCK": BLOCK, "SPLITS": splits, "NORM": normed, "OFFSET": q_norm.offset,
        "WINDOW": layer.window is not None, "SOFTCAP": decoder.attention_softcap is not None, "INT8": cache.int8,
        "ALONE": ALONE,
    }  # fmt: skip
    scales = (cache.key_scales, cache.value_scales)
    _decode_attention[(batch * decoder.kv_heads, splits)](
        q, k, v, q.stride(0), k.stride(0), v.stride(0), q_norm.weight, k_norm.weight, q_norm.eps,
        decoder.cos, decoder.sin, cache.keys[index], cache.values[index],
        *((each[index] for each in scales) if cache.int8 else scales),
        lengths, out, cache.partial, cache.weights, cache.arrived,
        cache.capacity, layer.window or 0, decoder.attention_scale, decoder.attention_softcap or 0.0,
        **constants, num_warps=WARPS, num_stages=STAGES, **launch_options(q.device),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["slot", "start"])  # type: ignore[untyped-decorator]
def _place_prompt(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, q_stride, k_stride, v_stride, q_norm_ptr, k_norm_ptr, norm_eps, cos_ptr, sin_ptr,
    keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, out_ptr, capacity, slot, start,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HP: tl.constexpr, KP: tl.constexpr, D: tl.constexpr,
    PAIRS: tl.constexpr, DP: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    position = start + n
    cos, sin, partner = rotation(cos_ptr, sin_ptr, position, PAIRS, DP)
    d = tl.arange(0, DP)
    head = tl.arange(0, HP)
    live = head < HEADS
    q = turned(q_ptr + n * q_stride, head * D, live[:, None], q_norm_ptr, norm_eps, cos, sin, partner, D, DP,
               NORM, OFFSET)  # fmt: skip
    at = out_ptr + n * HEADS * D + head[:, None] * D + d[None, :]
    tl.store(at, q.to(out_ptr.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])
    head = tl.arange(0, KP)
    live = head < KV_HEADS
    entry = (slot.to(tl.int64) * KV_HEADS + head) * capacity + position
    k = turned(k_ptr + n * k_stride, head * D, live[:, None], k_norm_ptr, norm_eps, cos, sin, partner, D, DP,
               NORM, OFFSET)  # fmt: skip
    stored(k.to(out_ptr.dtype.element_ty).to(tl.float32), keys_ptr, key_scales_ptr, entry, live, D, DP, INT8)
    at = v_ptr + n * v_stride + head[:, None] * D + d[None, :]
    v = tl.load(at, mask=live[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    stored(v, values_ptr, value_scales_ptr, entry, live, D, DP, INT8)


def place_prompt(
    decoder: Decoder, index: int, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, slot: int, start: int
) -> Tensor:
    """`attention.place_prompt`; a token is one program."""
    layer = decoder.layers[index]
    out = q.new_empty((q.shape[0], decoder.heads, decoder.head_dim))
    q_norm, k_norm = layer.q_norm or layer.before_mlp, layer.k_norm or layer.before_mlp  # read where there are some
    scales = (cache.key_scales, cache.value_scales)
    _place_prompt[(q.shape[0],)](
        q, k, v, q.stride(0), k.stride(0), v.stride(0), q_norm.weight, k_norm.weight, q_norm.eps,
        decoder.cos, decoder.sin, cache.keys[index], cache.values[index],
        *((each[index] for each in scales) if cache.int8 else scales),
        out, cache.capacity, slot, start,
        HEADS=decoder.heads, KV_HEADS=decoder.kv_heads, HP=triton.next_power_of_2(decoder.heads),
        KP=triton.next_power_of_2(decoder.kv_heads), D=decoder.head_dim, PAIRS=decoder.cos.shape[1],
        DP=triton.next_power_of_2(decoder.head_dim), NORM=layer.q_norm is not None, OFFSET=q_norm.offset,
        INT8=cache.int8, num_warps=8,
    )  # fmt: skip
    return out
