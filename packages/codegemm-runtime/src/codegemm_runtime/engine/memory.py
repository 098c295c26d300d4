"""How much memory an engine takes, and whether it is there: known before anything is allocated."""

from __future__ import annotations

import os

import torch

from codegemm_kernels.errors import BadInput
from codegemm_runtime.engine.cache import KVCache
from codegemm_runtime.engine.decoder import Decoder

_PANELS = 2 * (32 << 20)  # decoded weights of a prompt's products, see codegemm_kernels.ops
_GIB = 2**30


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a GPU, or half of a machine's memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def working_memory(decoder: Decoder, batch: int, chunk: int) -> int:
    """Bytes beside weights and cache: activations of `chunk` prompt tokens, or of a step with its logits."""
    width = 3 * decoder.intermediate + 6 * decoder.hidden + 4 * decoder.heads * decoder.head_dim
    prompt = chunk * (width * decoder.dtype.itemsize + 3 * decoder.heads * decoder.head_dim * 4) + _PANELS
    logits = batch * decoder.vocabulary * (decoder.dtype.itemsize + 1 + 6 * 4)
    return prompt + logits


def check_memory(decoder: Decoder, batch: int, context: int, int8: bool, chunk: int) -> None:
    """Raise BadInput unless an engine of this size fits."""
    cache = KVCache.nbytes(decoder, batch, context, int8)
    working = working_memory(decoder, batch, chunk)
    free = free_memory(decoder.device)
    if cache + working > free:
        raise BadInput(
            f"{batch} sequences of {context} tokens need {cache / _GIB:.1f} GiB of keys and values and "
            f"{working / _GIB:.1f} GiB of working memory on {decoder.device}, and {free / _GIB:.1f} GiB are free: "
            "take a smaller context or batch, or the int8 cache"
        )
