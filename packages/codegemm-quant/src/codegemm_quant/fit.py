"""One matrix: initialise, then alternate between codes and their codebooks and scales, and keep the best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from codegemm_kernels import CodebookScheme, NumericalError
from codegemm_quant.kmeans import initialise
from codegemm_quant.parallel import ALONE, Team
from codegemm_quant.search import feedback_codes, sweep
from codegemm_quant.weight import CodebookWeight, EntrySums, expand_codebooks

CODEBOOK_STEPS = 12
SCALE_STEPS = 6
MAX_DAMPING = 10.0
"""Of the mean diagonal; with so much of it every finite H can be inverted."""


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
    damping: float
    """The share of H's mean diagonal that was added: more than planned where H was singular."""


@dataclass(frozen=True)
class Curvature:
    """H with its damping, which makes it invertible, and its factors."""

    hessian: Tensor
    ridge: Tensor
    """What was added to the diagonal, a scalar."""
    lower: Tensor
    """H = L Lᵀ."""
    upper: Tensor
    """H⁻¹ = Uᵀ U."""
    damping: float

    @classmethod
    def of(cls, moment: Tensor, damping: float, name: str) -> Curvature:
        """Damp a second moment [K, K] until it can be inverted; one of zeros becomes the identity.

        Raises NumericalError, naming the layer, when the moment is not finite or ten times the mean diagonal is not
        enough.
        """
        mean = moment.diagonal().mean()
        if not torch.isfinite(mean):
            raise NumericalError(f"{name}: its calibration inputs are not finite; check the model's dtype and the text")
        identity = torch.eye(len(moment), device=moment.device)
        if not mean > 0:
            return cls(identity, torch.ones_like(mean), identity, identity, 1.0)
        share = max(damping, 1e-8)
        while share <= MAX_DAMPING:
            hessian = moment + share * mean * identity
            lower, failed = torch.linalg.cholesky_ex(hessian)
            if not int(failed):
                upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
                if not int(failed) and torch.isfinite(upper.diagonal().sum()):
                    return cls(hessian, share * mean, lower, upper, share)
            share *= 10
        raise NumericalError(f"{name}: the second moment of its inputs is singular; calibrate on more text")


def corrected_target(weight: Tensor, curvature: Curvature, cross: Tensor) -> Tensor:
    """The weight whose outputs on the quantised model's inputs are nearest to the dense outputs on dense inputs.

    argmin over V of E|W d - V x|² is W C H⁻¹ with C = E[d xᵀ] and H = E[x xᵀ] (GPTAQ, 2504.02692). What earlier
    layers got wrong is corrected here as far as a linear map can. The damping of H is added to C as well.
    """
    wanted = weight @ cross + weight * curvature.ridge
    solved: Tensor = torch.cholesky_solve(wanted.t(), curvature.lower)
    return solved.t().contiguous()


def relative_error(weight: Tensor, hessian: Tensor, approximation: Tensor, team: Team = ALONE) -> float:
    """tr(E H Eᵀ) / tr(W H Wᵀ) with E = weight - approximation; each process gives its rows."""
    error = weight - approximation
    sizes = [((one @ hessian) * one).sum(dtype=torch.float64) for one in (error, weight)]
    wrong, size = team.sum(torch.stack(sizes)).tolist()
    return float(wrong / max(size, 1e-30))


def fit_matrix(
    weight: Tensor,
    moment: Tensor,
    cross: Tensor | None,
    plan: FitPlan,
    generator: torch.Generator,
    name: str = "matrix",
    team: Team = ALONE,
) -> FitResult:
    """Find codes, codebooks and scales whose outputs on the quantised model's inputs are the dense model's outputs.

    weight [N, K]; moment H = E[x xᵀ] and cross C = E[d xᵀ], both [K, K], of the inputs x of the quantised and d of
    the dense model; None for C = H. k-means weighted by diag(H); one pass of codes with error feedback; then rounds
    of least squares for codebooks and scales (conjugate gradients) and a sweep over the codes. The result is the best
    state seen, judged on values rounded to the stored dtype. The processes of a team take a share of the rows each.
    Raises NumericalError when values stop being finite.
    """
    weight = weight.float()
    if not torch.isfinite(weight).all():
        raise NumericalError(f"{name}: the weight holds values that are not finite")
    curvature = Curvature.of(moment, plan.damping, name)
    if cross is not None:
        weight = corrected_target(weight, curvature, cross)
    hessian = curvature.hessian
    state = initialise(weight, hessian.diagonal(), plan.scheme, generator)
    rows, weight = len(weight), team.own(weight)
    state = CodebookWeight(team.own(state.codes).clone(), state.codebooks, team.own(state.scales).clone())
    best = state.clone()
    start = lowest = relative_error(weight, hessian, state.rounded(plan.dtype).dequantize(), team)
    pushed = state.clone()
    feedback_codes(weight, curvature.upper, pushed)
    if relative_error(weight, hessian, pushed.dequantize(), team) < start:  # errors can leave the codebooks' range
        state = pushed
    for turn in range(plan.rounds + 1):
        solve_codebooks(weight, hessian, state, team=team)
        solve_scales(weight, hessian, state)
        now = relative_error(weight, hessian, state.rounded(plan.dtype).dequantize(), team)
        if not now < float("inf"):
            raise NumericalError(f"{name}: the error of the fit is not finite in round {turn}")
        if now < lowest:
            lowest, best = now, state.clone()
        if turn < plan.rounds and not team.sum(sweep(weight, hessian, state)):
            break
    best = CodebookWeight(team.join(best.codes, rows), best.codebooks, team.join(best.scales, rows))
    return FitResult(best.rounded(plan.dtype), lowest, start, curvature.damping)


def solve_codebooks(
    weight: Tensor, hessian: Tensor, state: CodebookWeight, steps: int = CODEBOOK_STEPS, team: Team = ALONE
) -> None:
    """Least squares for all codebook entries at fixed codes and scales, by preconditioned conjugate gradients."""
    scales = state.scales.repeat_interleave(weight.shape[1] // state.scales.shape[1], dim=1)
    sums = EntrySums(state.codes)

    def collect(values: Tensor) -> Tensor:
        return team.sum(sums(values * scales))

    def apply(direction: Tensor) -> Tensor:
        return collect((expand_codebooks(state.codes, direction) * scales) @ hessian)

    start = collect((weight - state.dequantize()) @ hessian)
    curvature = collect(scales * hessian.diagonal())
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

    curvature = curvature.clamp_min(1e-30)  # zero where a matrix is
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
