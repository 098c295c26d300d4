"""One matrix: initialise, then alternate between codes and their codebooks and scales, and keep the best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from codegemm_kernels import CodebookScheme, NumericalError
from codegemm_kernels.scheme import CODEBOOK_ENTRIES
from codegemm_quant.kmeans import initialise
from codegemm_quant.search import feedback_codes, sweep
from codegemm_quant.weight import CodebookWeight, collect_codebooks, expand_codebooks

CODEBOOK_STEPS = 12
SCALE_STEPS = 6


@dataclass(frozen=True)
class FitPlan:
    """What every matrix of a run is fitted with."""

    scheme: CodebookScheme
    rounds: int
    """Alternations of least squares and sweeps."""
    damping: float
    """Share of the mean diagonal of H added to its diagonal."""
    dtype: torch.dtype
    """What codebooks and scales will be stored in."""


@dataclass(frozen=True)
class FitResult:
    """A fitted matrix and how far its outputs are from the dense ones, relative to their size."""

    weight: CodebookWeight
    relative_error: float
    """tr(E H Eᵀ) / tr(W H Wᵀ) of the values as they are stored."""
    start_error: float
    """The same after k-means alone."""


def corrected_target(weight: Tensor, hessian: Tensor, cross: Tensor) -> Tensor:
    """The weight whose outputs on the quantised model's inputs are nearest to the dense outputs on dense inputs.

    argmin over V of E|W d - V x|² is W C H⁻¹ with C = E[d xᵀ] and H = E[x xᵀ] (GPTAQ, 2504.02692). What earlier
    layers got wrong is corrected here as far as a linear map can.
    """
    lower = torch.linalg.cholesky(hessian)
    solved: Tensor = torch.cholesky_solve((weight @ cross).t(), lower)
    return solved.t().contiguous()


def relative_error(weight: Tensor, hessian: Tensor, approximation: Tensor) -> float:
    """tr(E H Eᵀ) / tr(W H Wᵀ) with E = weight - approximation."""
    error = weight - approximation
    size = ((weight @ hessian) * weight).sum(dtype=torch.float64)
    return float(((error @ hessian) * error).sum(dtype=torch.float64) / size.clamp_min(1e-30))


def fit_matrix(
    weight: Tensor,
    hessian: Tensor,
    cross: Tensor,
    plan: FitPlan,
    generator: torch.Generator,
    name: str = "matrix",
) -> FitResult:
    """Find codes, codebooks and scales whose outputs on the quantised model's inputs are the dense model's outputs.

    weight [N, K]; H = E[x xᵀ] and C = E[d xᵀ], both [K, K], of the inputs x of the quantised and d of the dense model.
    k-means weighted by diag(H); one pass of codes with error feedback; then rounds of least squares for codebooks
    and scales (conjugate gradients) and a sweep over the codes. The result is the best state seen, judged on values
    rounded to the stored dtype. Raises NumericalError when the objective stops being finite.
    """
    weight = weight.float()
    if not torch.isfinite(weight).all():
        raise NumericalError(f"{name}: the weight holds values that are not finite")
    extra = plan.damping * hessian.diagonal().mean() + 1e-12
    if not (torch.isfinite(extra) and torch.isfinite(cross).all()):
        raise NumericalError(f"{name}: its calibration inputs are not finite; check the model's dtype and the text")
    ridge = extra * torch.eye(len(hessian), device=hessian.device)
    hessian = hessian + ridge
    factor = inverse_factor(hessian, name)
    weight = corrected_target(weight, hessian, cross + ridge)
    state = initialise(weight, hessian.diagonal(), plan.scheme, generator)
    best = state.clone()
    start = lowest = relative_error(weight, hessian, state.rounded(plan.dtype).dequantize())
    pushed = state.clone()
    feedback_codes(weight, factor, pushed)
    if relative_error(weight, hessian, pushed.dequantize()) < start:  # pushed errors can leave the codebooks' range
        state = pushed
    for turn in range(plan.rounds + 1):
        solve_codebooks(weight, hessian, state)
        solve_scales(weight, hessian, state)
        now = relative_error(weight, hessian, state.rounded(plan.dtype).dequantize())
        if not now < float("inf"):
            raise NumericalError(f"{name}: the error of the fit is not finite in round {turn}")
        if now < lowest:
            lowest, best = now, state.clone()
        if turn < plan.rounds and not sweep(weight, hessian, state):
            break
    return FitResult(best.rounded(plan.dtype), lowest, start)


def inverse_factor(hessian: Tensor, name: str) -> Tensor:
    """The upper Cholesky factor of H⁻¹. Raises NumericalError when H is singular in spite of its damping."""
    lower, info = torch.linalg.cholesky_ex(hessian)
    if not int(info):
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(info):
            return factor
    raise NumericalError(
        f"{name}: the second moment of its inputs is singular; calibrate on more text or raise --damping"
    )


def solve_codebooks(weight: Tensor, hessian: Tensor, state: CodebookWeight, steps: int = CODEBOOK_STEPS) -> None:
    """Least squares for all codebook entries at fixed codes and scales, by preconditioned conjugate gradients."""
    scales = state.scales.repeat_interleave(weight.shape[1] // state.scales.shape[1], dim=1)

    def apply(direction: Tensor) -> Tensor:
        change = expand_codebooks(state.codes, direction) * scales
        return collect_codebooks(state.codes, (change @ hessian) * scales, CODEBOOK_ENTRIES)

    start = collect_codebooks(state.codes, ((weight - state.dequantize()) @ hessian) * scales, CODEBOOK_ENTRIES)
    curvature = collect_codebooks(state.codes, scales.square() * hessian.diagonal(), CODEBOOK_ENTRIES)
    curvature = curvature + curvature.mean() * 1e-6
    state.codebooks = state.codebooks + conjugate_gradients(apply, start, curvature, steps, dims=(0, 1, 2))


def solve_scales(weight: Tensor, hessian: Tensor, state: CodebookWeight, steps: int = SCALE_STEPS) -> None:
    """Least squares for the scales at fixed codes and codebooks: a system of G unknowns for each row."""
    rows, groups = state.scales.shape
    unscaled = state.unscaled()

    def collect(values: Tensor) -> Tensor:
        return (values * unscaled).view(rows, groups, -1).sum(-1)

    def apply(direction: Tensor) -> Tensor:
        change = (unscaled.view(rows, groups, -1) * direction.unsqueeze(-1)).view(rows, -1)
        return collect(change @ hessian)

    start = collect((weight - state.dequantize()) @ hessian)
    curvature = collect(unscaled * hessian.diagonal())
    curvature = curvature + curvature.mean() * 1e-6
    state.scales = state.scales + conjugate_gradients(apply, start, curvature, steps, dims=(1,))


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], residual: Tensor, curvature: Tensor, steps: int, dims: tuple[int, ...]
) -> Tensor:
    """Solve apply(x) = residual from x = 0, preconditioned by `curvature`; one system for each index not in `dims`.

    Every step lowers the quadratic, so stopping early is safe.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dims, keepdim=True)

    solution = torch.zeros_like(residual)
    direction = preconditioned = residual / curvature
    energy = dot(residual, preconditioned)
    for _ in range(steps):
        image = apply(direction)
        bend = dot(direction, image)
        step = torch.where(bend > 0, energy / bend.clamp_min(1e-30), torch.zeros_like(bend))
        solution = solution + step * direction
        residual = residual - step * image
        preconditioned = residual / curvature
        fresh = dot(residual, preconditioned)
        direction = preconditioned + torch.where(energy > 0, fresh / energy.clamp_min(1e-30), 0.0) * direction
        energy = fresh
    return solution
