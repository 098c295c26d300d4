"""The stored layout of codes, which is also the layout the kernels read: four codes a 32-bit word, rows fastest.

`packed[i, w, n]` holds the codes of row n, codebook i, vectors 4w .. 4w+3; vector 4w + r is byte r, least
significant first. Neighbouring rows are neighbouring words, so lanes that handle neighbouring rows read
neighbouring addresses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codegemm_kernels.errors import BadInput
from codegemm_kernels.scheme import CODEBOOK_ENTRIES, CODES_PER_WORD


def pack_codes(codes: Tensor) -> Tensor:
    """Pack codes [N, J, m] (any integer dtype, values 0..255) into int32 words [m, J/4, N].

    Raises BadInput when a code does not fit a byte or J is no multiple of 4.
    """
    if codes.dim() != 3:
        raise BadInput(f"codes must be [rows, vectors, codebooks], not {list(codes.shape)}")
    rows, vectors, num_codebooks = codes.shape
    if vectors % CODES_PER_WORD:
        raise BadInput(f"{vectors} vectors a row cannot be packed: the number must be a multiple of {CODES_PER_WORD}")
    if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < CODEBOOK_ENTRIES):
        raise BadInput(f"codes must lie in 0..{CODEBOOK_ENTRIES - 1}: these need more than 8 bits")
    quads = codes.to(torch.uint8).reshape(rows, vectors // CODES_PER_WORD, CODES_PER_WORD, num_codebooks)
    # Flat before the view: the strides of a one-element axis are arbitrary, and `view` wants multiples of four.
    words = quads.permute(3, 1, 0, 2).contiguous().reshape(-1).view(torch.int32)
    return words.reshape(num_codebooks, vectors // CODES_PER_WORD, rows)


def unpack_codes(packed: Tensor) -> Tensor:
    """Undo `pack_codes`: int32 words [m, J/4, N] to uint8 codes [N, J, m]."""
    if packed.dtype != torch.int32 or packed.dim() != 3:
        raise BadInput(f"packed codes must be int32 [codebooks, words, rows], not {packed.dtype} {list(packed.shape)}")
    num_codebooks, words, rows = packed.shape
    quads = packed.contiguous().unsqueeze(-1).view(torch.uint8)
    return quads.permute(2, 1, 3, 0).reshape(rows, words * CODES_PER_WORD, num_codebooks)
