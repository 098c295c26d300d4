import pytest
import torch

from codegemm_kernels import CodebookScheme, NumericalError
from codegemm_kernels.scheme import CODEBOOK_ENTRIES
from codegemm_quant.fit import (
    Curvature,
    FitPlan,
    corrected_target,
    fit_matrix,
    relative_error,
    solve_codebooks,
    solve_scales,
)
from codegemm_quant.kmeans import assign, initialise
from codegemm_quant.weight import CodebookWeight, EntrySums, expand_codebooks


def fit(weight, hessian, scheme="m1v4g32", rounds=3, damping=0.01, dtype=torch.float16):
    plan = FitPlan(CodebookScheme.parse(scheme), rounds, damping, dtype)
    return fit_matrix(weight, hessian, hessian, plan, torch.Generator().manual_seed(0), "layer.7")


def large_problem():
    generator = torch.Generator().manual_seed(5)
    mix = torch.eye(128) + torch.randn(128, 8, generator=generator) @ torch.randn(8, 128, generator=generator) / 4
    inputs = torch.randn(4000, 128, generator=generator) @ mix
    return torch.randn(512, 128, generator=generator), inputs.t() @ inputs / 4000


@pytest.mark.parametrize("scheme", ["m1v4g128", "m2v8g128"])
def test_the_fit_beats_round_to_nearest_and_plain_kmeans(scheme):
    weight, hessian = large_problem()
    parsed = CodebookScheme.parse(scheme)
    generator = torch.Generator().manual_seed(0)
    plain = initialise(weight, torch.ones(128), parsed, generator)
    gaussian = torch.randn(parsed.num_codebooks, CODEBOOK_ENTRIES, parsed.vector_length, generator=generator)
    vectors = (weight / plain.scales.repeat_interleave(128 // plain.scales.shape[1], 1)).reshape(-1, gaussian.shape[2])
    codes, residual = [], vectors
    for book in gaussian / torch.arange(1, parsed.num_codebooks + 1).view(-1, 1, 1):
        codes.append(assign(residual, torch.ones_like(residual), book))
        residual = residual - book[codes[-1]]
    nearest = CodebookWeight(torch.stack(codes, -1).view(512, -1, len(codes)), gaussian, plain.scales)

    result = fit(weight, hessian, scheme)
    ours = relative_error(weight, hessian, result.weight.dequantize())
    by_kmeans = relative_error(weight, hessian, plain.dequantize())
    assert ours < 0.5 * by_kmeans
    assert ours < 0.4 * relative_error(weight, hessian, nearest.dequantize())
    assert result.relative_error < result.start_error


def test_error_feedback_that_makes_matters_worse_is_dropped(problem, monkeypatch):
    weight, hessian = problem

    def scramble(weight, upper, state):
        state.codes.zero_()

    monkeypatch.setattr("codegemm_quant.fit.feedback_codes", scramble)
    result = fit(weight, hessian, rounds=0)
    assert result.relative_error <= result.start_error
    assert len(result.weight.codes.unique()) > 200


def test_the_result_is_what_will_be_stored(problem):
    weight, hessian = problem
    result = fit(weight, hessian, dtype=torch.bfloat16)
    assert torch.equal(result.weight.codebooks, result.weight.codebooks.bfloat16().float())
    assert torch.equal(result.weight.scales, result.weight.scales.bfloat16().float())
    packed = result.weight.packed(torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in packed.items()}
    assert shapes == CodebookScheme.parse("m1v4g32").shapes(*weight.shape)


def test_least_squares_reach_the_exact_solution(problem):
    weight, hessian = (t.double() for t in problem)
    generator = torch.Generator().manual_seed(0)
    state = initialise(weight, hessian.diagonal(), CodebookScheme(1, 4, 16), generator)
    root = torch.linalg.cholesky(hessian)
    rows, groups = state.scales.shape

    exact = state.clone()
    unscaled = exact.unscaled().view(rows, groups, -1)
    for n in range(rows):
        design = torch.block_diag(*[part.unsqueeze(0) for part in unscaled[n]]) @ root
        exact.scales[n] = torch.linalg.lstsq(design.t(), weight[n] @ root).solution
    solve_scales(weight, hessian, state, steps=200)
    assert torch.allclose(state.scales, exact.scales, rtol=1e-6, atol=1e-9)

    before = relative_error(weight, hessian, state.dequantize())
    solve_codebooks(weight, hessian, state, steps=800)
    scales = state.scales.repeat_interleave(64 // groups, dim=1)
    gradient = EntrySums(state.codes)(((weight - state.dequantize()) @ hessian) * scales)
    assert relative_error(weight, hessian, state.dequantize()) < before
    assert gradient.abs().max() < 1e-6 * (weight @ hessian).abs().max()


def test_collect_is_the_adjoint_of_expand():
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 256, (5, 6, 3), generator=generator)
    codebooks = torch.randn(3, 256, 4, generator=generator, dtype=torch.float64)
    values = torch.randn(5, 24, generator=generator, dtype=torch.float64)
    left = (expand_codebooks(codes, codebooks) * values).sum()
    right = (codebooks * EntrySums(codes)(values)).sum()
    assert torch.allclose(left, right)


def test_targets_make_up_for_what_earlier_layers_changed(problem):
    weight, _ = problem
    generator = torch.Generator().manual_seed(4)
    dense = torch.randn(3000, 64, generator=generator)
    quantised = dense + 0.3 * dense.roll(1, 1)
    hessian, cross = quantised.t() @ quantised / 3000, dense.t() @ quantised / 3000
    target = corrected_target(weight, Curvature.of(hessian, 1e-7, "test"), cross)
    assert torch.allclose(quantised @ target.t(), dense @ weight.t(), atol=1e-2)


def test_what_is_not_finite_is_named(problem):
    weight, hessian = problem
    broken = weight.clone()
    broken[3, 5] = float("nan")
    with pytest.raises(NumericalError, match=r"layer\.7: the weight"):
        fit(broken, hessian)
    with pytest.raises(NumericalError, match=r"layer\.7: its calibration inputs"):
        fit(weight, hessian * float("inf"))


def test_a_singular_second_moment_is_damped_or_named(problem):
    weight, _ = problem
    thin = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    hessian = thin.t() @ thin / 3
    result = fit(weight, hessian)
    assert result.relative_error < 0.1
    assert result.damping == 0.01
    doubtful = hessian - 0.1 * hessian.diagonal().mean() * torch.eye(64)  # as rounding of large sums can leave it
    assert fit(weight, doubtful).damping == pytest.approx(1.0)
    indefinite = torch.diag(torch.where(torch.arange(64) < 2, -100.0, 4.0))
    with pytest.raises(NumericalError, match=r"layer\.7: .*singular"):
        fit(weight, indefinite)


def test_an_expert_that_no_token_reached_is_fitted_as_it_is(problem):
    weight, hessian = problem
    result = fit(weight, torch.zeros_like(hessian))
    assert result.damping == 1.0
    assert relative_error(weight, torch.eye(64), result.weight.dequantize()) < 0.3


@pytest.mark.parametrize("length", [1, 2, 3, 4, 6, 8, 16])
def test_expanded_codebooks_are_sums_of_entries(length):
    generator = torch.Generator().manual_seed(0)
    books = torch.randn(2, 256, length, generator=generator)
    codes = torch.randint(256, (5, 7, 2), generator=generator, dtype=torch.int32)
    expected = books[0][codes[:, :, 0].long()] + books[1][codes[:, :, 1].long()]
    assert torch.equal(expand_codebooks(codes, books), expected.view(5, -1))
