"""Operations of a recorded step against float64, for every instruction set of this processor and odd sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from codegemm_kernels import _C, BadInput, ops
from codegemm_kernels.step import Cache, Step

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Of a result, relative to its size: a rounding or two of the dtype.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
INSTRUCTION_SETS = ["portable", "avx2", "avx512", "avx512vbmi", "neon"]
BEST = _C.cpu_features()
FOUND = [name for name in INSTRUCTION_SETS if _C.limit_cpu_features(name=name)]
_C.limit_cpu_features(name=BEST)


@pytest.fixture(params=FOUND, autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.limit_cpu_features(name=request.param)
    torch.manual_seed(0)
    yield request.param
    assert _C.limit_cpu_features(name=BEST)


@dataclass(frozen=True)
class Norm:
    weight: Tensor
    eps: float = 1e-5
    offset: float = 0.0


def close(y: Tensor, exact: Tensor) -> bool:
    error = (y.double() - exact).norm() / exact.norm()
    return bool(error <= TOLERANCE[y.dtype])


def poison(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def normed(x: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return x.double()
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * (norm.weight.double() + norm.offset)


def run(rows: int, dtype: torch.dtype, record: Callable[[Step], None]) -> None:
    step = Step(rows, dtype)
    record(step)
    step.prepare()
    step.run()


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(dtype: torch.dtype) -> None:
    for rows, width in ((1, 1), (2, 47), (3, 96), (1, 2048)):
        for has_branch, branch_norm, offset in ((False, False, 0.0), (True, False, 0.0), (True, True, 1.0)):
            residual, branch, y = (torch.randn(rows, width).to(dtype) for _ in range(3))
            norms = [Norm(torch.randn(width).to(dtype), eps, offset) for eps in (1e-5, 1e-2)]
            total = residual.double()
            if has_branch:
                total = total + normed(branch, norms[0] if branch_norm else None)
            arguments = (residual, branch if has_branch else None, norms[0] if branch_norm else None, norms[1], y)
            run(rows, dtype, lambda step, arguments=arguments: step.add_norm(*arguments))
            assert close(residual, total)
            assert close(y, normed(residual, norms[1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_and_soft_caps(dtype: torch.dtype) -> None:
    wide = 4 * torch.randn(3, 2 * 2077 + 5).to(dtype)
    gate, up, y = wide[:, :2077], wide[:, 2077:4154], poison(3, 2077, dtype=dtype)
    gelu = torch.nn.functional.gelu(gate.double(), approximate="tanh")
    for name, exact in (("silu", torch.nn.functional.silu(gate.double())), ("gelu_tanh", gelu)):
        run(3, dtype, lambda step, name=name: step.gate(gate, up, name, y))
        assert close(y, exact * up.double())
    extreme = torch.tensor([[-1e4, -90, -30, 0, 30, 90, 1e4]]).to(dtype)
    ones, y = torch.ones_like(extreme), poison(1, 7, dtype=dtype)
    run(1, dtype, lambda step: step.gate(extreme, ones, "silu", y))
    assert close(y, extreme.double().clamp_min(0))
    x = 40 * torch.randn(2, 2077).to(dtype)
    exact = 30 * torch.tanh(x.double() / 30)
    run(2, dtype, lambda step: step.soft_cap(x, 30.0))
    assert close(x, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_products(dtype: torch.dtype) -> None:
    for rows, N, K in ((1, 1, 1), (1, 37, 100), (2, 6, 47), (3, 130, 64), (7, 9, 1024)):
        x = torch.randn(rows, K + 3).to(dtype)[:, :K]
        weight, bias = torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)
        for added in (None, bias):
            y = poison(rows, N, dtype=dtype)
            run(rows, dtype, lambda step, x=x, weight=weight, added=added, y=y: step.dense(x, weight, added, y))
            assert close(y, x.double() @ weight.double().t() + (0 if added is None else added.double()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_the_op(dtype: torch.dtype, make_weight: Callable[..., tuple[Tensor, ...]]) -> None:
    x = torch.randn(3, 262).to(dtype)[:, :256]
    matrices = [make_weight(scheme, N, 256, dtype, seed=N) for scheme, N in (("m1v4g128", 300), ("m2v8g64", 77))]
    matrices[0] = (ops.tile(matrices[0][0], 4, 2), *matrices[0][1:])
    biases = [None, torch.randn(77).to(dtype)]
    ys = [poison(3, 300, dtype=dtype), poison(3, 77, dtype=dtype)]
    step = Step(3, dtype)
    step.products(x, *(list(each) for each in zip(*matrices, strict=True)), biases, ys)
    step.prepare()
    for _ in range(2):
        step.run()
        for matrix, bias, y in zip(matrices, biases, ys, strict=True):
            assert torch.equal(y, ops.gemm(x, *matrix, bias))
        x.copy_(torch.randn(3, 256))
        matrices[1][1].mul_(2)  # codebooks are read by prepare
        step.prepare()


@dataclass
class Case:
    """Attention of one new token in some slots."""

    lengths: list[int]
    heads: int
    kv_heads: int
    head_dim: int
    pairs: int
    capacity: int
    cache: Cache


def exact_attention(case: Case, q: Tensor, k: Tensor, v: Tensor, cache: Cache) -> Tensor:
    """In float64, from a cache that holds the new token already."""
    outputs = []
    for slot, length in enumerate(case.lengths):
        position = min(length, case.capacity - 1)
        first = 0 if cache.window is None else max(0, position - cache.window + 1)
        queries = turned(case, q[slot].view(case.heads, -1), position, cache.q_norm)
        keys, values = (t[slot, :, first : position + 1].double() for t in (cache.keys, cache.values))
        if cache.key_scales is not None and cache.value_scales is not None:
            keys = keys * cache.key_scales[slot, :, first : position + 1, None]
            values = values * cache.value_scales[slot, :, first : position + 1, None]
        keys, values = (t.repeat_interleave(case.heads // case.kv_heads, 0) for t in (keys, values))
        scores = (keys @ queries[:, :, None])[..., 0] * cache.scale
        if cache.softcap is not None:
            scores = cache.softcap * torch.tanh(scores / cache.softcap)
        outputs.append((scores.softmax(-1)[:, None] @ values).flatten())
    return torch.stack(outputs)


def turned(case: Case, heads: Tensor, position: int, norm: Norm | None) -> Tensor:
    """Normed and rotated heads [n, head dim] in float64."""
    heads = normed(heads, norm)
    cos, sin = case.cache.cos[position].double(), case.cache.sin[position].double()
    a, b, rest = heads.split([case.pairs, case.pairs, case.head_dim - 2 * case.pairs], -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def make_case(dtype: torch.dtype, heads: tuple[int, int], head_dim: int, lengths: list[int], int8: bool) -> Case:
    slots, capacity, pairs = len(lengths) + 1, 200, head_dim // 2 - 3 * (head_dim % 3 == 1)
    angles = torch.rand(capacity + 3, pairs) * 6
    shape = (slots, heads[1], capacity, head_dim)
    stored = [torch.randn(shape).to(dtype) for _ in range(2)]
    scales: list[Tensor | None] = [None, None]
    if int8:
        stored = [torch.randint(-127, 128, shape, dtype=torch.int8) for _ in range(2)]
        scales = [torch.rand(shape[:3]) / 50 for _ in range(2)]
    held = torch.tensor(lengths, dtype=torch.int32)
    cache = Cache(*stored, *scales, held, angles.cos(), angles.sin(), head_dim**-0.5)
    return Case(lengths, *heads, head_dim, pairs, capacity, cache)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype: torch.dtype, int8: bool) -> None:
    shapes = [((4, 2), 64, [0, 63, 64, 150]), ((7, 1), 24, [199]), ((5, 5), 34, [120, 250])]
    for i, (heads, head_dim, lengths) in enumerate(shapes):
        case = make_case(dtype, heads, head_dim, lengths, int8)
        cache = case.cache
        if i == 1:
            cache = replace(cache, window=70, softcap=2.0)
        if i == 2:
            norms = [Norm(torch.rand(head_dim).to(dtype) + 0.5, 1e-5, offset) for offset in (0.0, 1.0)]
            cache = replace(cache, q_norm=norms[0], k_norm=norms[1])
        q, k, v = (
            torch.randn(len(lengths), n * head_dim + 6).to(dtype)[:, : n * head_dim]
            for n in (case.heads, case.kv_heads, case.kv_heads)
        )
        before = [t.clone() for t in (cache.keys, cache.values)]
        y = poison(len(lengths), case.heads * head_dim, dtype=dtype)
        run(len(lengths), dtype, lambda step, q=q, k=k, v=v, y=y, cache=cache: step.attend(q, k, v, y, cache))
        exact = exact_attention(case, q, k, v, cache)
        error = (y.double() - exact).norm() / exact.norm()
        assert error < max(2 * TOLERANCE[dtype], 2e-5), (error, i)
        check_append(case, cache, k, v, before)


def check_append(case: Case, cache: Cache, k: Tensor, v: Tensor, before: list[Tensor]) -> None:
    """The new keys and values are in place and nothing else has changed."""
    stored = ((cache.keys, cache.key_scales, k, before[0]), (cache.values, cache.value_scales, v, before[1]))
    for entries, scales, new, old in stored:
        for slot, length in enumerate(case.lengths):
            position = min(length, case.capacity - 1)
            rows = new[slot].view(case.kv_heads, -1)
            exact = turned(case, rows, position, cache.k_norm) if new is k else rows.double()
            got = entries[slot, :, position].double()
            if scales is not None:
                got = got * scales[slot, :, position, None]
                assert (got - exact).abs().max() <= 0.51 * scales[slot, :, position].max() + 1e-2 * exact.abs().max()
            else:
                assert (got - exact).norm() <= TOLERANCE[k.dtype] * exact.norm()
            old[slot, :, position] = entries[slot, :, position]
        assert torch.equal(entries, old)


def test_shares_of_long_sequences_add_up() -> None:
    """With many threads and few heads the keys are shared out; the result is the same but for the order of sums."""
    ys = []
    threads = torch.get_num_threads()
    for count in (1, 7):
        torch.manual_seed(1)
        case = make_case(torch.float32, (4, 1), 32, [190, 3], False)
        q, k, v = (torch.randn(2, n * 32) for n in (4, 1, 1))
        ys.append(poison(2, 128, dtype=torch.float32))
        torch.set_num_threads(count)
        try:
            run(2, torch.float32, lambda step, q=q, k=k, v=v, case=case: step.attend(q, k, v, ys[-1], case.cache))
        finally:
            torch.set_num_threads(threads)
    assert (ys[0] - ys[1]).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_choice(dtype: torch.dtype) -> None:
    for width in (1, 5, 4096, 9001):
        scores = torch.randint(-9, 9, (3, width)).to(dtype)  # many are equal
        scores[1] = -torch.inf
        scores[2, width // 2 :] = torch.inf
        tokens = torch.full((3,), -1)
        run(3, dtype, lambda step, scores=scores, tokens=tokens: step.choose(scores, tokens))
        best = scores.max(-1, keepdim=True).values
        assert tokens.tolist() == [int((row == top).nonzero()[0]) for row, top in zip(scores, best, strict=True)]
        scores[0, width // 3] = scores[0, -1] = torch.nan
        run(3, dtype, lambda step, scores=scores, tokens=tokens: step.choose(scores, tokens))
        assert tokens[0] == width // 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(dtype: torch.dtype) -> None:
    table, y = torch.randn(11, 7).to(dtype), poison(3, 7, dtype=dtype)
    tokens = torch.tensor([10, 0, 4])
    step = Step(3, dtype)
    step.embed(table, tokens, y)
    step.run()
    assert torch.equal(y, table[tokens])
    for wrong in (11, -1):
        tokens[1] = wrong
        with pytest.raises(IndexError, match=f"token {wrong} is none of 11"):
            step.run()


def test_products_have_to_be_prepared(make_weight: Callable[..., tuple[Tensor, ...]]) -> None:
    x, y = torch.randn(2, 256), torch.zeros(2, 40)
    step, (codes, codebooks, scales) = Step(2, torch.float32), make_weight("m1v4g128", 40, 256, torch.float32, seed=1)
    for _ in range(2):  # the second time sizes have changed
        step.products(x, [codes], [codebooks], [scales], [None], [y])
        with pytest.raises(RuntimeError, match=r"since prepare\(\) was called"):
            step.run()
        step.prepare()
        step.run()
        assert torch.equal(y, ops.gemm(x, codes, codebooks, scales))
    with pytest.raises(BadInput, match="has no matrix"):
        step.products(x, [], [], [], [], [])


def test_what_is_refused() -> None:
    step, x = Step(2, torch.float32), torch.randn(2, 8)
    norm = Norm(torch.ones(8))
    with pytest.raises(BadInput, match=r"not in torch\.float64"):
        Step(1, torch.float64)
    with pytest.raises(BadInput, match=r"needs torch.float32 \[2, 8\] on the CPU here, not torch.float32 \[3, 8\]"):
        step.add_norm(x, torch.randn(3, 8), None, norm, x)
    with pytest.raises(BadInput, match=r"not torch\.float16"):
        step.add_norm(x, None, None, norm, x.half())
    with pytest.raises(BadInput, match="contiguous"):
        step.soft_cap(torch.randn(8, 2).t(), 1.0)
    with pytest.raises(BadInput, match=r"of 2 rows was given \[3, 8\]"):
        step.gate(torch.randn(3, 8), x, "silu", x)
    with pytest.raises(BadInput, match="unknown activation 'relu'"):
        step.gate(x, x, "relu", x)
    with pytest.raises(BadInput, match="on meta"):
        step.choose(x.to("meta"), torch.zeros(2, dtype=torch.long))
    case = make_case(torch.float32, (4, 2), 64, [3, 4, 5], False)
    q, k = torch.randn(3, 256), torch.randn(3, 128)
    with pytest.raises(BadInput, match="is none for 3 rows of 3 heads"):
        Step(3, torch.float32).attend(q, k, k, torch.empty(3, 192), case.cache)
    with pytest.raises(BadInput, match=r"is none for 5 rows"):
        Step(5, torch.float32).attend(q, k, k, torch.empty(5, 256), case.cache)


def test_callers_on_several_threads() -> None:
    """Each step counts its runs, the tokens of one being those of the next; the interpreter's lock is let go."""
    table = torch.eye(97).roll(1, 1)  # token t leads to t + 1
    steps, tokens = [], [torch.zeros(1, dtype=torch.long) for _ in range(2)]
    for own in tokens:
        step, x, y = Step(1, torch.float32), torch.empty(1, 97), torch.empty(1, 97)
        step.embed(table, own, x)
        step.dense(x, torch.eye(97), None, y)
        step.choose(y, own)
        step.prepare()
        steps.append(step)
    with ThreadPoolExecutor(6) as pool:
        runs = [pool.submit(steps[i % 2].run) for i in range(200)]
    for done in runs:
        done.result()
    assert [int(own) for own in tokens] == [100 % 97] * 2


def test_a_step_keeps_its_tensors() -> None:
    """Weights that a model gives up stay where the step reads them."""
    step, weight, y = Step(1, torch.float32), torch.ones(64, 64), torch.empty(1, 64)
    parameter = torch.nn.Parameter(weight)
    step.dense(torch.ones(1, 64), parameter, None, y)
    parameter.data = torch.zeros(64, 64)
    del weight
    filled = [torch.full((64, 64), 7.0) for _ in range(20)]
    step.run()
    assert len(filled) == 20
    assert y.unique().tolist() == [64.0]
