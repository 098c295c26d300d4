"""The ops called with anything: an exception in words, or the right numbers; never a crash.

Arguments are those of a sound call with some replaced by what attackers and clumsy users have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from codegemm_kernels import BadInput, CodebookScheme, ops, pack_codes, reference, unpack_codes
from codegemm_kernels.autograd import gemm_with_grad

# torch's words about quantised and nested tensors, which nobody should pass here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# As in test_ops.py: rounding of the result, and of partial sums.
BOUNDS = {dtype: torch.finfo(dtype).eps / 2 + (3e-5 if dtype == torch.float32 else 5e-4) for dtype in DTYPES}
# BadInput is a ValueError, AttributeError what None in the place of a tensor gives; the rest is torch's.
REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError)
PARTS = ("x", "codes", "codebooks", "scales", "bias")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads are for tests/sanitize; waking them for products of this size takes longer than the products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Tensor]:
    """The tensors of a sound call."""
    m, v = draw(st.integers(1, 4)), draw(st.sampled_from([4, 8, 16]))
    words, N, rows = draw(st.integers(1, 6)), draw(st.integers(1, 70)), draw(st.sampled_from([0, 1, 2, 5, 70]))
    group = draw(st.sampled_from([g for g in range(1, 4 * words + 1) if 4 * words % g == 0]))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    K = 4 * v * words
    return {
        "x": torch.randn(rows, K, generator=generator).to(dtype),
        "codes": pack_codes(torch.randint(0, 256, (N, 4 * words, m), generator=generator)),
        "codebooks": torch.randn(m, 256, v, generator=generator).to(dtype),
        "scales": torch.rand(4 * words // group, N, generator=generator).to(dtype),
        "bias": torch.randn(N, generator=generator).to(dtype),
    }


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "transposed": lambda t: t.transpose(0, -1) if t.dim() else t,
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() else t,
    "backwards": lambda t: t.flip(0) if t.dim() else t,
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) if t.numel() else t,
    "overlapping": lambda t: t.as_strided(t.shape, (1,) * t.dim()),
    "one row more": lambda t: torch.cat([t, t[:1]]) if t.dim() else t,
    "one column less": lambda t: t[..., :-1],
    "one dimension more": lambda t: t[None],
    "one dimension less": lambda t: t[0] if t.dim() and len(t) else t,
    "flat": lambda t: t.flatten(),
    "no dimension": lambda t: t.new_ones(()),
    "empty": lambda t: t.new_empty((0,) * t.dim()),
    "no rows": lambda t: t[:0],
    "no columns": lambda t: t[..., :0],
    "declared huge": lambda t: t[(slice(0, 1),) * t.dim()].expand([2 ** (56 // max(t.dim(), 1))] * t.dim()),
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "complex": lambda t: t.to(torch.complex64),
    "conjugate": lambda t: t.to(torch.complex64).conj(),
    "int64": lambda t: t.long(),
    "uint8": lambda t: t.to(torch.uint8),
    "bool": lambda t: t.bool(),
    "float8": lambda t: t.float().to(torch.float8_e4m3fn),
    "on meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "requires grad": lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t,
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "none": lambda t: None,
    "number": lambda t: 7,
    "list": lambda t: [t],
    "nested": lambda t: torch.nested.nested_tensor([t.float(), t.float()]),
}
SAME_VALUES = {"strided", "offset", "requires grad", "parameter", "tiled"}
changes = st.lists(st.tuples(st.sampled_from(PARTS), st.sampled_from([*sorted(CHANGES), "tiled"])), max_size=2)


def changed(call: dict[str, Tensor], edits: list[tuple[str, str]]) -> dict[str, Any]:
    found: dict[str, Any] = dict(call)
    for part, change in edits:
        if isinstance(found[part], Tensor) and found[part].numel() < 1 << 20:  # torch would go through petabytes
            try:
                if change != "tiled":
                    found[part] = CHANGES[change](found[part])
                elif part == "codes":
                    found[part] = ops.tile(found[part], *tiling(found))
            except (*REFUSALS, IndexError):
                continue  # torch has no such tensor of this dtype or shape
    return found


def tiling(call: dict[str, Any]) -> tuple[int, int]:
    """Vector length and number of groups, by which codes are tiled."""
    return call["codebooks"].shape[2], call["scales"].shape[0]


def stored(call: dict[str, Any]) -> dict[str, Any]:
    """The call with its codes as they are stored."""
    tiled = call["codes"].dtype == torch.uint8
    return call | {"codes": ops.untile(call["codes"], *tiling(call))} if tiled else call


def right(y: Tensor, call: dict[str, Any]) -> bool:
    """Whether y [..., N] is x W^T + bias to the accuracy of its dtype."""
    call = stored(call)
    x, *rest = (None if call[part] is None else call[part].detach().resolve_conj() for part in PARTS)
    if any(t is not None and t.layout != torch.strided for t in (x, *rest)) or y.is_meta:
        return y.shape == (*x.shape[:-1], rest[0].shape[2])
    assert not any(t is not None and t.is_meta for t in (x, *rest)), "numbers were made of nothing"
    error = reference.gemm_error(y.detach(), x, *rest)
    return error <= BOUNDS[y.dtype] and y.dtype == x.dtype and y.shape == (*x.shape[:-1], rest[0].shape[2])


@given(call=calls(), edits=changes)
def test_gemm(call: dict[str, Tensor], edits: list[tuple[str, str]]) -> None:
    arguments = changed(call, edits)
    sound = all(change in SAME_VALUES for _, change in edits)
    for function in (ops.gemm, gemm_with_grad):
        try:
            y = function(*(arguments[part] for part in PARTS))
        except REFUSALS as error:
            assert not sound, error
            assert str(error)
            continue
        assert right(y, arguments)


@given(call=calls(), edits=changes)
def test_dequantize(call: dict[str, Tensor], edits: list[tuple[str, str]]) -> None:
    arguments, parts = changed(call, edits), ("codes", "codebooks", "scales")
    try:
        weight = ops.dequantize(*(arguments[part] for part in parts))
    except REFUSALS as error:
        assert not all(change in SAME_VALUES or part in ("x", "bias") for part, change in edits), error
        return
    if not any(arguments[part].is_meta or arguments[part].layout != torch.strided for part in parts):
        exact = reference.dequantize(*(stored(arguments)[part].detach() for part in parts))
        torch.testing.assert_close(weight.detach(), exact)


@given(
    matrices=st.lists(calls(), min_size=0, max_size=3),
    edits=changes,
    at=st.integers(0, 2),
    lengths=st.tuples(*[st.integers(0, 3)] * 4),
)
def test_gemm_grouped(
    matrices: list[dict[str, Tensor]], edits: list[tuple[str, str]], at: int, lengths: tuple[int, ...]
) -> None:
    """Matrices that have nothing to do with each other, lists of several lengths, and a change in one of them."""
    calls_of = [changed(call, edits) if i == at else dict(call) for i, call in enumerate(matrices)]
    x = calls_of[0]["x"] if calls_of else torch.ones(1, 16)
    lists = [[call[part] for call in calls_of][: max(n, 1)] for part, n in zip(PARTS[1:], lengths, strict=True)]
    try:
        ys = ops.gemm_grouped(x, *lists)
    except REFUSALS as error:
        assert str(error)
        return
    assert len(ys) == len(lists[0])
    for y, codes, codebooks, scales, bias in zip(ys, *lists, strict=True):
        one = {"x": x, "codes": codes, "codebooks": codebooks, "scales": scales, "bias": bias}
        assert right(y, one)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("change", ["declared huge", "no dimension", "one row more", "complex", "int64"])
def test_what_does_not_fit_is_named(part: str, change: str) -> None:
    """The sentence says what is wrong, before anything is allocated."""
    generator = torch.Generator().manual_seed(0)
    shapes = CodebookScheme(2, 8, 16).shapes(24, 64)
    call = {
        "x": torch.randn(3, 64, generator=generator),
        "codes": torch.zeros(shapes["codes"], dtype=torch.int32),
        "codebooks": torch.randn(shapes["codebooks"], generator=generator),
        "scales": torch.rand(shapes["scales"], generator=generator),
        "bias": torch.randn(24, generator=generator),
    }
    arguments = changed(call, [(part, change)])
    if (part, change) == ("x", "one row more"):
        assert right(ops.gemm(*arguments.values()), arguments)
        return
    with pytest.raises(BadInput, match=r"must be|has shape|is torch\.|are torch\.|do not|belong|not supported"):
        ops.gemm(*arguments.values())


def test_a_matrix_without_rows() -> None:
    codes, codebooks, scales = torch.zeros(1, 1, 0, dtype=torch.int32), torch.randn(1, 256, 4), torch.ones(4, 0)
    assert ops.dequantize(codes, codebooks, scales).shape == reference.dequantize(codes, codebooks, scales).shape
    assert ops.gemm(torch.ones(3, 16), codes, codebooks, scales).shape == (3, 0)


def test_codes_that_are_not_contiguous_are_moved() -> None:
    """Of 8 MB, memory that the system takes back at once when a copy is freed too early."""
    codes = torch.randint(-(2**31), 2**31, (1, 2048, 1024), dtype=torch.int32)
    twice = torch.stack([codes, codes], -1)[..., 0]
    tiled = ops.tile(twice, 4, 64)
    assert torch.equal(tiled, ops.tile(codes, 4, 64))
    assert torch.equal(ops.untile(torch.stack([tiled, tiled], -1)[..., 0], 4, 64), codes)


def test_where_there_is_no_kernel_the_same_is_refused() -> None:
    """A sparse x goes to the reference."""
    weight = torch.zeros(2, 1, 5, dtype=torch.int32), torch.randn(1, 256, 4), torch.ones(4, 5)
    with pytest.raises(BadInput, match="do not belong"):
        ops.gemm(torch.ones(3, 16).to_sparse(), *weight)


def test_an_x_without_dimension_is_refused_by_a_group() -> None:
    weight = [torch.zeros(1, 1, 5, dtype=torch.int32)], [torch.randn(1, 256, 4)], [torch.ones(4, 5)]
    with pytest.raises(BadInput, match="x has shape"):
        ops.gemm_grouped(torch.ones(()), *weight, [None])


@given(call=calls(), edits=changes, data=st.data())
def test_packed_codes(call: dict[str, Tensor], edits: list[tuple[str, str]], data: st.DataObject) -> None:
    """Any words are codes, since a byte names one of 256 entries; unpacking and packing are each other's inverse."""
    words = data.draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=4))
    codes = torch.tensor(words, dtype=torch.int32).repeat(call["codes"].numel())[: call["codes"].numel()]
    codes = codes.view(call["codes"].shape)
    assert torch.equal(pack_codes(unpack_codes(codes)), codes)
    assert right(ops.gemm(call["x"], codes, call["codebooks"], call["scales"]), call | {"codes": codes, "bias": None})
    arguments = changed(dict.fromkeys(PARTS, codes), edits)
    try:
        assert torch.equal(pack_codes(unpack_codes(arguments["codes"])), arguments["codes"])
    except REFUSALS:
        assert edits


@given(call=calls(), edits=changes, at=st.integers(0, 2))
def test_a_group_of_equals_with_an_odd_one(call: dict[str, Tensor], edits: list[tuple[str, str]], at: int) -> None:
    """Matrices that fit one launch, but for what was changed in one of them, such as tiled codes beside stored ones."""
    members = [changed(call, [each for each in edits if each[0] != "x"]) if i == at else call for i in range(3)]
    try:
        ys = ops.gemm_grouped(call["x"], *([one[part] for one in members] for part in PARTS[1:]))
    except REFUSALS as error:
        assert str(error)
        return
    for y, one in zip(ys, members, strict=True):
        assert right(y, one)
