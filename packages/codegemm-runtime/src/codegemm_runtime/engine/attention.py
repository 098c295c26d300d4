"""Attention in torch: of a prompt on every device, and of one new token a sequence where there is no fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from codegemm_runtime.engine.cache import KVCache
from codegemm_runtime.engine.decoder import Decoder, Layer, Norm


def normalise(x: Tensor, norm: Norm) -> Tensor:
    """RMSNorm over the last dimension, in fp32, in the dtype of x."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    return (wide * (norm.weight.float() + norm.offset)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + P) of x [n, heads, head dim] by cos and sin [n, P]; later elements stay."""
    pairs = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    first, second = x[..., :pairs].float(), x[..., pairs : 2 * pairs].float()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return turned if 2 * pairs == x.shape[-1] else torch.cat((turned, x[..., 2 * pairs :]), dim=-1)


def heads_of(
    decoder: Decoder, layer: Layer, q: Tensor, k: Tensor, v: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed and rotated q [n, heads, head dim], k and v [n, kv heads, head dim] of rows at `positions` [n]."""
    q, k, v = (t.unflatten(-1, (-1, decoder.head_dim)) for t in (q, k, v))
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = normalise(q, layer.q_norm), normalise(k, layer.k_norm)
    cos, sin = decoder.cos[positions], decoder.sin[positions]
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def place_prompt(
    decoder: Decoder, index: int, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, slot: int, start: int
) -> Tensor:
    """Norm and rotate n prompt tokens at positions from `start` on and append them to a slot.

    q [n, heads * head dim], k and v [n, kv heads * head dim] belong to layer `index`. Returns q [n, heads, head dim].
    """
    end = start + q.shape[0]
    positions = torch.arange(start, end, device=q.device)
    queries, keys, values = heads_of(decoder, decoder.layers[index], q, k, v, positions)
    cache.write(index, slot, slice(start, end), keys, values)
    return queries


def attend(decoder: Decoder, q: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention in plain torch, soft-capped where the model is; scores and sums in fp32.

    q [batch, heads, n, head dim], keys and values [batch, kv heads, length, head dim], `visible` bool
    [batch or 1, n, length]. Returns [batch, n, heads * head dim].
    """
    batch, heads, n, width = q.shape
    kv_heads = keys.shape[1]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads * n, width)
    scores = (grouped @ keys.transpose(-1, -2)).float() * decoder.attention_scale
    scores = scores.view(batch, heads, n, -1)
    if decoder.attention_softcap is not None:
        scores = decoder.attention_softcap * torch.tanh(scores / decoder.attention_softcap)
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    weights = torch.softmax(scores, dim=-1).to(values.dtype).view(batch, kv_heads, heads // kv_heads * n, -1)
    return (weights @ values).view(batch, heads, n, width).transpose(1, 2).reshape(batch, n, heads * width)


def visible_keys(queries: Tensor, length: int, window: int | None) -> Tensor:
    """Which of `length` keys a query at each of the positions `queries` [...] sees: bool [..., length]."""
    keys = torch.arange(length, device=queries.device)
    seen = keys <= queries[..., None]
    return seen if window is None else seen & (keys > queries[..., None] - window)


def prompt_attention(decoder: Decoder, layer: Layer, q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """Attention of n prompt tokens at positions from `start` on, over keys [kv heads, start + n, head dim].

    q is [n, heads, head dim]; returns [n, heads * head dim].
    """
    n, length = q.shape[0], keys.shape[1]
    q = q.transpose(0, 1)[None]
    keys, values = keys[None], values[None]
    whole = layer.window is None or length <= layer.window
    if decoder.attention_softcap is None and whole and start == 0:
        y = torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, is_causal=True, scale=decoder.attention_scale, enable_gqa=decoder.heads != decoder.kv_heads
        )
        return y[0].transpose(0, 1).reshape(n, -1)
    visible = visible_keys(torch.arange(start, start + n, device=q.device), length, layer.window)
    if decoder.attention_softcap is not None:
        return attend(decoder, q, keys, values, visible[None])[0]
    # Keys once for every head that reads them: with a mask, only torch's unfused product takes grouped heads.
    repeats = decoder.heads // decoder.kv_heads
    keys, values = (t.repeat_interleave(repeats, dim=1) for t in (keys, values))
    y = torch.nn.functional.scaled_dot_product_attention(
        q, keys, values, attn_mask=visible[None, None], scale=decoder.attention_scale
    )
    return y[0].transpose(0, 1).reshape(n, -1)


def decode_attention(
    decoder: Decoder, index: int, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, lengths: Tensor
) -> Tensor:
    """Attention of one new token a slot: norm and rotate, append to the cache, attend. The reference of the kernel.

    q [batch, heads * head dim], k and v [batch, kv heads * head dim] belong to layer `index` and slots 0 .. batch - 1,
    which hold `lengths` [batch] tokens. Returns [batch, heads * head dim].
    """
    layer = decoder.layers[index]
    batch = q.shape[0]
    positions = lengths.clamp_max(cache.capacity - 1).long()
    queries, new_keys, new_values = heads_of(decoder, layer, q, k, v, positions)
    slots = torch.arange(batch, device=q.device)
    cache.write(index, slots, positions, new_keys, new_values)
    length = int(positions.max()) + 1
    keys, values = cache.read(index, slice(0, batch), length)
    visible = visible_keys(positions, length, layer.window)[:, None]
    if decoder.attention_softcap is not None:
        return attend(decoder, queries[:, :, None], keys, values, visible)[:, 0]
    # The query heads of a group as rows of their key head: 2 to 9 times as fast on a CPU as enable_gqa.
    y = torch.nn.functional.scaled_dot_product_attention(
        queries.unflatten(1, (decoder.kv_heads, -1)),
        keys,
        values,
        attn_mask=None if bool(visible.all()) else visible[:, None],
        scale=decoder.attention_scale,
    )
    return y.flatten(1)
