import random

import pytest
import torch

from codegemm_kernels import _C, BadInput, ops, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# Bounds on |y - exact| / (sum |w||x| + |bias|), with `exact` in float64 from the very inputs of the call. The result is
# rounded once (half a unit in the last place of its dtype), on top of the rounding of sums and of partial-sum tables.
TABLE_ERROR = {torch.float32: 3e-5, torch.float16: 5e-4, torch.bfloat16: 5e-4}
BOUNDS = {dtype: torch.finfo(dtype).eps / 2 + TABLE_ERROR[dtype] for dtype in DTYPES}

# (scheme, N, K): every m and v, group sizes from one vector to the whole row, odd N, K that is one word.
SHAPES = [
    ("m1v4g128", 200, 256),
    ("m2v8g128", 129, 384),
    ("m1v4g-1", 65, 16),
    ("m1v4g4", 33, 48),
    ("m1v4g24", 17, 240),
    ("m1v8g32", 1, 64),
    ("m2v8g16", 77, 192),
    ("m2v8g-1", 300, 2080),
    ("m3v8g8", 3, 96),
    ("m4v8g64", 5, 128),
    ("m1v16g-1", 64, 320),
    ("m2v16g64", 131, 448),
    ("m4v16g48", 9, 192),
    ("m4v4g32", 31, 160),
    ("m3v4g64", 1000, 64),
]


def check(x, weight, bias=None):
    y = ops.gemm(x, *weight, bias)
    assert y.shape == (*x.shape[:-1], weight[0].shape[2])
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    assert bool(torch.isfinite(y).all())
    assert reference.gemm_error(y, x, *weight, bias) <= BOUNDS[x.dtype]
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scheme", "N", "K"), SHAPES)
def test_gemm_agrees_with_float64(device, dtype, scheme, N, K, make_weight):
    weight = make_weight(scheme, N, K, dtype, device)
    for rows in (1, 2, 5):
        x = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)).to(device, dtype)
        check(x, weight)
        check(x, weight, torch.randn(N).to(device, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["m1v4g32", "m2v8g-1"])
def test_every_number_of_rows(device, dtype, scheme, make_weight):
    weight = make_weight(scheme, 67, 96, dtype, device)
    x = torch.randn(70, 96).to(device, dtype)
    for rows in range(71):
        check(x[:rows], weight)


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512vbmi", "neon"])
def instruction_set(request):
    """Each instruction set with kernels; a processor without one runs its best again."""
    best = _C.cpu_features()
    _C.limit_cpu_features(name=request.param)
    yield
    assert _C.limit_cpu_features(name=best)


@pytest.mark.parametrize(("scheme", "N", "K"), SHAPES[::3])
def test_every_instruction_set(instruction_set, scheme, N, K, make_weight):
    for dtype in DTYPES:
        weight = make_weight(scheme, N, K, dtype)
        for rows in (1, 6, 66):
            x = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)).to(dtype)
            check(x, weight, torch.ones(N, dtype=dtype))
        torch.testing.assert_close(ops.dequantize(*weight), reference.dequantize(*weight))


def test_an_unknown_instruction_set_is_not_taken():
    best = _C.cpu_features()
    assert not _C.limit_cpu_features(name="abacus")
    assert _C.cpu_features() == best


@pytest.mark.parametrize("trial", range(20))
def test_random_shapes_and_views(device, trial, make_weight):
    draw = random.Random(trial)
    dtype, v, m = draw.choice(DTYPES), draw.choice([4, 8, 16]), draw.randint(1, 4)
    words = draw.randint(1, 24)
    group = draw.choice([g for g in range(1, 4 * words + 1) if 4 * words % g == 0] + [-1])
    scheme = f"m{m}v{v}g{group * v if group > 0 else -1}"
    N, K, rows = draw.randint(1, 300), 4 * v * words, draw.choice([1, 1, 2, 3, 9, 40])
    codes, codebooks, scales = make_weight(scheme, N, K, dtype, device, seed=trial)
    offset, stride = draw.randint(0, 3), K + draw.randint(0, 5)
    # Views that start at odd addresses inside larger tensors of NaNs: a read outside shows.
    x = torch.full((offset + rows * stride + 8,), torch.nan, dtype=dtype, device=device)
    x = x[offset:].as_strided((rows, K), (stride, 1))
    x.copy_(torch.randn(rows, K, generator=torch.Generator().manual_seed(trial)) * 10.0 ** draw.randint(-2, 2))
    views = []
    for tensor in (codes, codebooks, scales):
        flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=device)
        view = flat[1:].view(tensor.shape)
        views.append(view.copy_(tensor))
    check(x, tuple(views), torch.randn(N + 1).to(device, dtype)[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_with_outliers(device, dtype, make_weight):
    weight = make_weight("m1v4g128", 512, 1024, dtype, device)
    x = torch.randn(5, 1024, generator=torch.Generator().manual_seed(1))
    x[0, 7] *= 300
    x[1] = 0
    x[2, :512] = 0
    x[3] *= 1e-20  # zero in fp16
    x[4, ::9] *= 30
    y = check(x.to(device, dtype), weight)
    assert y[1].count_nonzero() == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_shows_in_its_row_alone(device, dtype, value, make_weight):
    weight = make_weight("m1v4g32", 100, 256, dtype, device)
    x = torch.randn(3, 256).to(device, dtype)
    x[1, 77] = value
    y = ops.gemm(x, *weight)
    assert not bool(torch.isfinite(y[1]).any())
    assert bool(torch.isfinite(y[::2]).all())


def test_leading_dimensions_and_transposed_activations(device, make_weight):
    weight = make_weight("m2v8g32", 41, 64, torch.float32, device)
    x = torch.randn(2, 3, 64, device=device)
    expected = check(x, weight)
    assert torch.equal(ops.gemm(x[1, 2], *weight), expected[1, 2])
    transposed = x.reshape(6, 64).t().contiguous().t()
    assert torch.equal(ops.gemm(transposed, *weight), expected.reshape(6, -1))
    permuted = x.transpose(0, 1)
    assert torch.equal(ops.gemm(permuted, *weight), expected.transpose(0, 1))
    assert ops.gemm(x[:, :0], *weight).shape == (2, 0, 41)


def test_strided_parameters(device, make_weight):
    codes, codebooks, scales = make_weight("m2v8g32", 10, 64, torch.float32, device)
    x = torch.randn(3, 64, device=device)
    expected = ops.gemm(x, codes, codebooks, scales)
    strided = scales.t().contiguous().t()
    assert torch.equal(ops.gemm(x, codes, codebooks, strided), expected)
    assert torch.equal(ops.dequantize(codes, codebooks, strided), ops.dequantize(codes, codebooks, scales))


def test_rows_are_copied_behind_weights_that_are():
    rows, weight = torch.ones(2, 8), torch.ones(8, 4)
    assert ops._contiguous(rows, weight) == (rows, weight)
    copied, made = ops._contiguous(rows, weight.t())
    assert made.is_contiguous()
    assert torch.equal(copied, rows)
    assert copied.data_ptr() != rows.data_ptr()


def test_a_matrix_without_rows(device, make_weight):
    codes, codebooks, scales = make_weight("m1v4g32", 4, 32, torch.float32, device)
    empty = codes[:, :, :0], codebooks, scales[:, :0]
    assert ops.gemm(torch.randn(2, 32, device=device), *empty).shape == (2, 0)
    assert ops.dequantize(*empty).shape == (0, 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scheme", "N", "K"), SHAPES)
def test_dequantize_is_the_rounded_reference(device, dtype, scheme, N, K, make_weight):
    weight = make_weight(scheme, N, K, dtype, device)
    wide = [weight[0], weight[1].double(), weight[2].double()]
    exact = reference.dequantize(*wide)
    parts = reference.dequantize(weight[0], wide[1].abs(), wide[2])  # what the sum over codebooks may lose
    error = (ops.dequantize(*weight).double() - exact).abs()
    assert bool((error <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 * parts + torch.finfo(dtype).tiny).all())


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_two_runs_agree_to_the_bit(device, rows, make_weight):
    weight = make_weight("m2v8g128", 1500, 1024, torch.float16, device)
    x = torch.randn(rows, 1024).to(device, torch.float16)
    first = ops.gemm(x, *weight)
    for _ in range(3):
        assert torch.equal(ops.gemm(x, *weight), first)


def test_the_number_of_threads_changes_nothing(make_weight):
    weight = make_weight("m1v4g64", 1500, 512, torch.float32)
    x = torch.randn(2, 512)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.gemm(x, *weight))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("rows", [1, 5])
def test_opcheck(device, rows, make_weight):
    weight = make_weight("m2v8g32", 33, 96, torch.float32, device)
    x = torch.randn(2, rows, 96, device=device)
    torch.library.opcheck(ops.gemm, (x, *weight))
    torch.library.opcheck(ops.gemm, (x, *weight, torch.randn(33, device=device)))
    torch.library.opcheck(ops.dequantize, weight)


def test_compiles_without_a_graph_break(device, make_weight):
    weight = make_weight("m2v8g32", 33, 96, torch.float32, device)

    def step(x):
        return torch.relu(ops.gemm(x + 1, *weight)) @ ops.dequantize(*weight)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 3, 7):
        x = torch.randn(rows, 96, device=device)
        torch.testing.assert_close(compiled(x), step(x))


def test_meta_tensors_give_shapes(make_weight):
    weight = make_weight("m2v8g32", 33, 96, torch.float16, "meta")
    y = ops.gemm(torch.empty(2, 5, 96, dtype=torch.float16, device="meta"), *weight)
    assert (y.shape, y.dtype, y.device.type) == ((2, 5, 33), torch.float16, "meta")
    assert ops.dequantize(*weight).shape == (33, 96)


def bad_calls(codes, codebooks, scales):
    x, bias = torch.randn(2, 64), torch.randn(10)
    good = [x, codes, codebooks, scales, bias]

    def swap(index, value):
        return [*good[:index], value, *good[index + 1 :]]

    yield "takes 64 input features", swap(0, torch.randn(2, 63))
    yield "takes 64 input features", swap(0, torch.tensor(1.0))
    yield "x is torch.float16", swap(0, x.half())
    yield "codes must be int32", swap(1, codes.long())
    yield "must be", swap(1, codes[0])
    yield "do not belong together", swap(1, codes[:, :, :9])
    yield "do not belong together", swap(1, codes[:1])
    yield "do not belong together", swap(2, codebooks[:, :128])
    yield "vector length", swap(2, torch.randn(2, 256, 5))
    yield "1 to 4 codebooks", [x, codes[:1].repeat(5, 1, 1), codebooks[:1].repeat(5, 1, 1), scales, bias]
    yield "one of float32, float16 and bfloat16", [x.double(), codes, codebooks.double(), scales.double(), None]
    yield "codebooks are torch.float16", swap(2, codebooks.half())
    yield "do not divide", swap(3, torch.randn(3, 10))
    yield "do not divide", swap(3, torch.randn(0, 10))
    yield "bias has shape", swap(4, torch.randn(9))
    yield "bias is torch.float16", swap(4, bias.half())


@pytest.mark.parametrize("number", range(16))
def test_bad_calls_are_refused(device, number, make_weight):
    message, arguments = list(bad_calls(*make_weight("m2v8g32", 10, 64, torch.float32)))[number]
    with pytest.raises(BadInput, match=message):
        ops.gemm(*[None if a is None else a.to(device) for a in arguments])


def test_a_build_without_cuda_says_what_to_do(monkeypatch, make_weight):
    monkeypatch.setattr(_C, "has_cuda", False)
    weight = make_weight("m2v8g32", 10, 64, torch.float32)
    with pytest.raises(BadInput, match="CODEGEMM_CUDA=ON"):
        ops._gemm_cuda(torch.randn(1, 64), *weight)
    with pytest.raises(BadInput, match="CODEGEMM_CUDA=ON"):
        ops._dequantize_cuda(*weight)


def tiled(weight):
    codes, codebooks, scales = weight
    return ops.tile(codes, codebooks.shape[2], scales.shape[0]), codebooks, scales


@pytest.mark.parametrize(("scheme", "N", "K"), SHAPES)
def test_tiled_codes_are_the_same_matrix(instruction_set, scheme, N, K, make_weight):
    for dtype in DTYPES:
        weight = make_weight(scheme, N, K, dtype)
        reordered = tiled(weight)
        assert reordered[0].dtype == torch.uint8 and reordered[0].nbytes == weight[0].nbytes
        assert torch.equal(ops.untile(reordered[0], weight[1].shape[2], weight[2].shape[0]), weight[0])
        assert torch.equal(ops.dequantize(*reordered), ops.dequantize(*weight))
        for rows in (1, 3, 9):
            x = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)).to(dtype)
            assert torch.equal(ops.gemm(x, *reordered), ops.gemm(x, *weight))


def test_tiling_refuses_what_is_no_matrix_of_codes(make_weight):
    codes, codebooks, scales = make_weight("m2v8g128", 48, 256, torch.float32)
    for wrong in (codes[0], codes.long(), codes.byte()):
        with pytest.raises(BadInput, match="codes must be"):
            ops.tile(wrong, 8, 2)
    for vector_length, num_groups in ((5, 2), (8, 0), (8, 3)):
        with pytest.raises(BadInput, match=r"cannot be tiled|do not divide"):
            ops.tile(codes, vector_length, num_groups)
    with pytest.raises(BadInput, match="a multiple of 4"):
        ops.gemm(torch.randn(1, 240), ops.tile(codes, 8, 2)[:, :30], codebooks, scales)


def test_tiling_passes_opcheck(make_weight):
    codes, codebooks, scales = make_weight("m2v8g128", 130, 256, torch.float16)
    torch.library.opcheck(ops.tile, (codes, 8, 2))
    torch.library.opcheck(ops.untile, (ops.tile(codes, 8, 2), 8, 2))
    torch.library.opcheck(ops.gemm, (torch.randn(2, 256).half(), *tiled((codes, codebooks, scales))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_huge_input_does_not_drown_the_others(dtype, instruction_set, make_weight):
    """The error stays small against the part of y that comes from the other inputs of its scale group."""
    weight = make_weight("m1v4g128", 256, 128, dtype)
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(3)).to(dtype)
    wide = [each.double() if each.is_floating_point() else each for each in weight]
    small = reference.gemm(x.double(), *wide).abs().mean()
    x[0, 30] = 4096
    exact = reference.gemm(x.double(), *wide)
    error = (ops.gemm(x, *weight).double() - exact).abs() - torch.finfo(dtype).eps / 2 * exact.abs()
    assert float(error.max()) <= 3e-2 * float(small)
