"""What lies between the products of a layer, one launch each on a GPU; the same in plain torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from codegemm_runtime.engine import attention
from codegemm_runtime.engine.attention import normalise
from codegemm_runtime.engine.cache import KVCache
from codegemm_runtime.engine.decoder import Decoder, Norm


def add_norm(residual: Tensor, branch: Tensor | None, branch_norm: Norm | None, norm: Norm) -> Tensor:
    """Add `branch` (normed by `branch_norm` if there is one) to `residual` in place; return the sum normed.

    Both are [rows, hidden].
    """
    if residual.is_cuda:
        from codegemm_runtime.engine import fused_triton

        return fused_triton.add_norm(residual, branch, branch_norm, norm)
    if branch is not None:
        residual += branch if branch_norm is None else normalise(branch, branch_norm)
    return normalise(residual, norm)


def first_largest(scores: Tensor) -> Tensor:
    """argmax over the last dimension of [rows, vocabulary], the first where several are equal."""
    if scores.is_cuda:
        from codegemm_runtime.engine import argmax_triton

        return argmax_triton.first_largest(scores)
    return scores.argmax(-1)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, for [rows, intermediate] whose rows may lie apart."""
    if gate.is_cuda:
        from codegemm_runtime.engine import fused_triton

        return fused_triton.gated(gate, up, activation)
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def place_prompt(
    decoder: Decoder, index: int, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, slot: int, start: int
) -> Tensor:
    """`attention.place_prompt`, in one launch on a GPU."""
    if q.is_cuda:
        from codegemm_runtime.engine import attention_triton

        return attention_triton.place_prompt(decoder, index, q, k, v, cache, slot, start)
    return attention.place_prompt(decoder, index, q, k, v, cache, slot, start)


def decode_attention(
    decoder: Decoder, index: int, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, lengths: Tensor
) -> Tensor:
    """`attention.decode_attention`, in one launch on a GPU."""
    if q.is_cuda:
        from codegemm_runtime.engine import attention_triton

        return attention_triton.decode_attention(decoder, index, q, k, v, cache, lengths)
    return attention.decode_attention(decoder, index, q, k, v, cache, lengths)
