"""The two passes over a decoder: a chunk of one prompt, and one new token of several sequences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from codegemm_runtime.engine.attention import prompt_attention
from codegemm_runtime.engine.cache import KVCache
from codegemm_runtime.engine.decoder import Decoder
from codegemm_runtime.engine.fused import add_norm, decode_attention, gated, place_prompt

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer number, q, k, v [rows, heads * head dim] to the attention's output of the same rows."""


def run_layers(decoder: Decoder, tokens: Tensor, attention: Attention, last_only: bool = False) -> Tensor:
    """Token ids [rows] to normed hidden states [rows, hidden], or [1, hidden] of the last row."""
    residual: Tensor = decoder.embedding(tokens)
    branch, branch_norm = None, None
    for index, layer in enumerate(decoder.layers):
        x = add_norm(residual, branch, branch_norm, layer.before_attention)
        (branch,) = layer.output(attention(index, *layer.qkv(x)))
        x = add_norm(residual, branch, layer.after_attention, layer.before_mlp)
        gate, up = layer.gate_up(x)
        (branch,) = layer.down(gated(gate, up, decoder.activation))
        branch_norm = layer.after_mlp
    if last_only:
        residual, branch = residual[-1:], branch[-1:] if branch is not None else None
    return add_norm(residual, branch, branch_norm, decoder.final_norm)


def logits_of(decoder: Decoder, hidden: Tensor) -> Tensor:
    """Logits [rows, vocabulary] of normed hidden states, soft-capped where the model is."""
    logits: Tensor = decoder.head(hidden)[0]
    if decoder.logit_softcap is not None:
        logits = decoder.logit_softcap * torch.tanh(logits / decoder.logit_softcap)
    return logits


def prefill(decoder: Decoder, cache: KVCache, tokens: Tensor, slot: int, chunk: int) -> Tensor:
    """Read a prompt [n] into a slot, `chunk` tokens at a time; the logits [1, vocabulary] after its last token."""
    hidden = tokens  # a prompt is never empty, so this is replaced
    for start in range(0, tokens.shape[0], chunk):
        part = tokens[start : start + chunk]
        end = start + part.shape[0]

        def attention(index: int, q: Tensor, k: Tensor, v: Tensor, start: int = start, end: int = end) -> Tensor:
            queries = place_prompt(decoder, index, q, k, v, cache, slot, start)
            keys, values = cache.read(index, slice(slot, slot + 1), end)
            return prompt_attention(decoder, decoder.layers[index], queries, keys[0], values[0], start)

        hidden = run_layers(decoder, part, attention, last_only=True)
    return logits_of(decoder, hidden)


def step(decoder: Decoder, cache: KVCache, tokens: Tensor, lengths: Tensor) -> Tensor:
    """One new token [batch] of slots 0 .. batch - 1, which hold `lengths` [batch] int32; logits [batch, vocabulary]."""

    def attention(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return decode_attention(decoder, index, q, k, v, cache, lengths)

    return logits_of(decoder, run_layers(decoder, tokens, attention))
