"""What a call of an op must satisfy. Integers carry no types, so a mistake past these checks would be a wild read."""

from __future__ import annotations

import torch
from torch import Tensor

from codegemm_kernels.errors import BadInput
from codegemm_kernels.scheme import CODEBOOK_ENTRIES, CODES_PER_WORD, MAX_CODEBOOKS, VECTOR_LENGTHS

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Numbers of the float types in the compiled module: csrc/codegemm.h, enum DType."""


def check_weight(codes: Tensor, codebooks: Tensor, scales: Tensor) -> tuple[int, int, int]:
    """Return (N, K, G) of a stored matrix, or raise BadInput naming the fault."""
    code_shape, book_shape, scale_shape = codes.shape, codebooks.shape, scales.shape
    if len(code_shape) != 3 or len(book_shape) != 3 or len(scale_shape) != 2:
        raise BadInput(
            "codes, codebooks and scales must be [m, K/(4v), N], [m, 256, v] and [G, N], "
            f"not {list(code_shape)}, {list(book_shape)} and {list(scale_shape)}"
        )
    num_codebooks, words, out_features = code_shape
    tiled = codes.dtype == torch.uint8
    if tiled:
        if words % CODES_PER_WORD:
            raise BadInput(f"tiled codes must be [m, K/v, N] with K/v a multiple of {CODES_PER_WORD}, not {words}")
        words //= CODES_PER_WORD
    vector_length, num_groups = book_shape[2], scale_shape[0]
    if book_shape[0] != num_codebooks or book_shape[1] != CODEBOOK_ENTRIES or scale_shape[1] != out_features:
        raise BadInput(
            f"codes {list(code_shape)}, codebooks {list(book_shape)} and scales {list(scale_shape)} do not belong "
            "together: they must be [m, K/(4v), N], [m, 256, v] and [G, N]"
        )
    if vector_length not in VECTOR_LENGTHS or not 1 <= num_codebooks <= MAX_CODEBOOKS:
        raise BadInput(
            f"{num_codebooks} codebooks of vectors of {vector_length} are not supported: "
            f"use 1 to {MAX_CODEBOOKS} codebooks and a vector length of {VECTOR_LENGTHS}"
        )
    vectors = words * CODES_PER_WORD
    if words < 1 or num_groups < 1 or vectors % num_groups:
        raise BadInput(
            f"{num_groups} scale groups do not divide a row of {vectors} vectors of {vector_length} weights: "
            "the group size must be a multiple of the vector length"
        )
    if codes.dtype != torch.int32 and not tiled:
        raise BadInput(f"codes must be int32 words, or uint8 as `tile` makes them, not {codes.dtype}")
    if tiled and codes.device.type not in ("cpu", "meta"):
        raise BadInput(f"tiled codes are for the CPU, not for {codes.device}: untile them")
    dtype = codebooks.dtype
    if scales.dtype != dtype or dtype not in DTYPES:
        raise BadInput(
            f"codebooks are {dtype} and scales {scales.dtype}: both must be the same one of "
            "float32, float16 and bfloat16; cast them first"
        )
    device = codes.get_device()
    if codebooks.get_device() != device or scales.get_device() != device:
        raise BadInput(
            f"codes are on {codes.device}, codebooks on {codebooks.device} and scales on {scales.device}: "
            "move them to one device"
        )
    return out_features, vectors * vector_length, num_groups


def check_devices(*tensors: Tensor | None) -> None:
    """Raise BadInput for tensors on several devices. For fakes: `get_device` is -1 for cpu and meta alike."""
    devices = sorted({str(tensor.device) for tensor in tensors if tensor is not None})
    if len(devices) > 1:
        raise BadInput(f"the tensors of a product are on {' and '.join(devices)}: move them to one device")


def check_input(x: Tensor, bias: Tensor | None, codes: Tensor, codebooks: Tensor, N: int, K: int) -> None:
    """Raise BadInput unless x [..., K] and bias [N] fit a matrix of N x K."""
    dtype, device = codebooks.dtype, codes.get_device()
    if x.dim() < 1 or x.shape[-1] != K:
        raise BadInput(f"x has shape {list(x.shape)}, but the matrix takes {K} input features in the last dimension")
    if x.dtype != dtype:
        raise BadInput(f"x is {x.dtype}, but codebooks and scales are {dtype}: cast one of them")
    if x.get_device() != device:
        raise BadInput(f"x is on {x.device}, but codes are on {codes.device}: move one of them")
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != N:
            raise BadInput(f"bias has shape {list(bias.shape)}, but the matrix has {N} output features")
        if bias.dtype != dtype:
            raise BadInput(f"bias is {bias.dtype}, but x is {dtype}: cast one of them")
        if bias.get_device() != device:
            raise BadInput(f"bias is on {bias.device}, but x is on {x.device}: move one of them")


def check_group(*lists: list[Tensor] | list[Tensor | None]) -> None:
    """Raise BadInput unless the lists of a grouped product are of one length."""
    if len({len(one) for one in lists}) != 1:
        raise BadInput(f"a grouped product needs lists of one length, not {[len(one) for one in lists]}")


def check_tiling(codes: Tensor, vector_length: int, num_groups: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Return (m, N, K) of codes alone, or raise BadInput naming the fault."""
    if codes.dim() != 3 or codes.dtype != dtype or not 1 <= codes.shape[0] <= MAX_CODEBOOKS:
        raise BadInput(f"codes must be {dtype} of three dimensions, not {codes.dtype} {list(codes.shape)}")
    vectors = codes.shape[1] * (CODES_PER_WORD if dtype == torch.int32 else 1)
    if vector_length not in VECTOR_LENGTHS or num_groups < 1 or vectors < 1 or vectors % CODES_PER_WORD:
        raise BadInput(f"rows of {vectors} vectors of {vector_length} in {num_groups} groups cannot be tiled")
    if vectors % num_groups:
        raise BadInput(f"{num_groups} scale groups do not divide a row of {vectors} vectors")
    return codes.shape[0], codes.shape[2], vectors * vector_length
