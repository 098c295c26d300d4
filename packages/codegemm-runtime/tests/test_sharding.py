"""The shares of ranks against the whole matrix, with the reference arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from codegemm_kernels import BadInput, CheckpointError, CodebookScheme, pack_codes, reference
from codegemm_kernels.checkpoint import PARTS
from codegemm_runtime.sharding import MatrixShard


def stored(scheme: CodebookScheme, out_features: int, in_features: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    m, v = scheme.num_codebooks, scheme.vector_length
    return {
        "codes": pack_codes(torch.randint(0, 256, (out_features, in_features // v, m))),
        "codebooks": torch.randn(m, 256, v),
        "scales": torch.rand(scheme.num_groups(in_features), out_features),
    }


def weight_of(shard: MatrixShard, tensors: dict[str, Tensor]) -> Tensor:
    weight = reference.dequantize(*(shard.cut(part, tensors[part]).contiguous() for part in PARTS))
    assert weight.shape == shard.shape
    return weight


@pytest.mark.parametrize("text", ["m2v8g32", "m1v4g-1", "m1v4g256", "m3v4g16", "m1v16g64"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shares_are_slices_of_the_matrix(text: str, ranks: int) -> None:
    scheme, size = CodebookScheme.parse(text), (24, 256)
    tensors = stored(scheme, *size)
    whole = reference.dequantize(*(tensors[part] for part in PARTS))
    by_rows = [MatrixShard.by_rows("q_proj", scheme, size, rank, ranks, size[:1]) for rank in range(ranks)]
    assert torch.equal(torch.cat([weight_of(shard, tensors) for shard in by_rows]), whole)
    by_columns = [MatrixShard.by_columns("o_proj", scheme, size, rank, ranks) for rank in range(ranks)]
    assert torch.equal(torch.cat([weight_of(shard, tensors) for shard in by_columns], dim=1), whole)


def test_the_parts_of_a_matrix_stored_as_one_are_cut_apart() -> None:
    """q, k and v of 16, 8 and 8 outputs for two ranks: each has half of every part."""
    scheme, size = CodebookScheme.parse("m1v4g32"), (32, 64)
    tensors = stored(scheme, *size)
    whole = reference.dequantize(*(tensors[part] for part in PARTS))
    shard = MatrixShard.by_rows("qkv_proj", scheme, size, 1, 2, (16, 8, 8))
    rows = [*range(8, 16), *range(20, 24), *range(28, 32)]
    assert torch.equal(weight_of(shard, tensors), whole[rows])


@pytest.mark.parametrize(
    ("text", "in_features", "ranks", "reason"),
    [
        ("m1v4g128", 768, 4, r"down\.scales cannot be shared: 768 inputs would be cut at 192, inside a scale group"),
        (
            "m2v16g-1",
            192,
            2,
            r"down\.codes cannot be shared: 192 inputs would be cut at 96, inside a packed word of 64",
        ),
        ("m2v8g32", 96, 2, r"down\.codes cannot be shared"),
        ("m2v8g32", 64, 3, r"down has 64 inputs, which 3 ranks cannot share"),
    ],
)
def test_cuts_inside_a_word_or_group_are_refused(text: str, in_features: int, ranks: int, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        for rank in range(ranks):
            MatrixShard.by_columns("down", CodebookScheme.parse(text), (8, in_features), rank, ranks)


def test_outputs_that_do_not_divide_are_refused() -> None:
    scheme = CodebookScheme.parse("m1v4g32")
    with pytest.raises(BadInput, match="up has 9 outputs, which 2 ranks cannot share"):
        MatrixShard.by_rows("up", scheme, (9, 32), 0, 2, (9,))
    with pytest.raises(BadInput, match=r"qkv has 10 outputs, but the model splits it into \[4, 4\]"):
        MatrixShard.by_rows("qkv", scheme, (10, 32), 0, 2, (4, 4))


@pytest.mark.parametrize("part", PARTS)
def test_a_tensor_of_another_matrix_is_refused(part: str) -> None:
    scheme = CodebookScheme.parse("m1v4g32")
    shard = MatrixShard.by_rows("up", scheme, (8, 64), 0, 2, (8,))
    tensors = stored(scheme, 8, 64)
    with pytest.raises(CheckpointError, match=rf"up\.{part} is .*, but m1v4g32 of a 8 x 64 layer needs"):
        shard.cut(part, tensors[part][..., :-1])
    wrong = tensors[part].float() if part == "codes" else tensors[part].int()
    with pytest.raises(CheckpointError, match=rf"up\.{part} is"):
        shard.cut(part, wrong)
