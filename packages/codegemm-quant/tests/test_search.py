from itertools import pairwise

import torch

from codegemm_kernels import CodebookScheme
from codegemm_quant.fit import Curvature, relative_error
from codegemm_quant.kmeans import initialise
from codegemm_quant.search import feedback_codes, sweep


def start(problem, scheme):
    """A state with random codebooks, and for every vector the codes of k-means' scale and no more thought."""
    weight, hessian = problem
    generator = torch.Generator().manual_seed(0)
    state = initialise(weight, hessian.diagonal(), CodebookScheme.parse(scheme), generator)
    state.codebooks = torch.randn(state.codebooks.shape, generator=generator, dtype=weight.dtype)
    state.codes = torch.randint(0, 256, state.codes.shape, generator=generator)
    return state


def nearest_codes(problem, scheme):
    weight, hessian = problem
    return initialise(weight, hessian.diagonal(), CodebookScheme.parse(scheme), torch.Generator().manual_seed(0))


def plain_sweep(weight, hessian, state):
    """The definition: every code in turn takes the value with the lowest objective, all else recomputed."""
    state = state.clone()
    _, vectors, num_codebooks = state.codes.shape
    for j in range(vectors):
        for i in range(num_codebooks):
            losses = []
            for entry in range(256):
                trial = state.clone()
                trial.codes[:, j, i] = entry
                error = weight - trial.dequantize()
                losses.append(((error @ hessian) * error).sum(1))
            state.codes[:, j, i] = torch.stack(losses).argmin(0)
    return state


def test_blocked_sweep_finds_the_codes_of_the_plain_one(problem):
    weight, hessian = (tensor.double() for tensor in problem)
    weight, hessian = weight[:6, :32].contiguous(), hessian[:32, :32].contiguous()
    for scheme in ("m1v4g16", "m2v8g-1"):
        state = start((weight, hessian), scheme)
        expected = plain_sweep(weight, hessian, state)
        sweep(weight, hessian, state)
        assert torch.equal(state.codes, expected.codes)


def test_sweeps_lower_the_objective_until_codes_settle(problem):
    weight, hessian = problem
    for scheme in ("m1v4g32", "m2v8g64", "m3v16g-1"):
        state = start(problem, scheme)
        errors = [relative_error(weight, hessian, state.dequantize())]
        for _ in range(40):
            changed = sweep(weight, hessian, state)
            errors.append(relative_error(weight, hessian, state.dequantize()))
            if changed < 10:
                break
        assert changed < 10
        assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
        assert errors[-1] < 0.8 * errors[0]


def test_a_sweep_crosses_block_borders(problem, monkeypatch):
    weight, hessian = problem
    whole, parts = start(problem, "m2v4g32"), start(problem, "m2v4g32")
    sweep(weight, hessian, whole)
    monkeypatch.setattr("codegemm_quant.search.BLOCK_COLUMNS", 16)
    sweep(weight, hessian, parts)
    assert torch.equal(whole.codes, parts.codes)


def test_error_feedback_beats_nearest_codes(problem, monkeypatch):
    weight, hessian = problem
    for scheme in ("m1v4g32", "m2v8g64"):
        state = nearest_codes(problem, scheme)
        nearest = relative_error(weight, hessian, state.dequantize())
        feedback_codes(weight, Curvature.of(hessian, 1e-4, "test").upper, state)
        assert relative_error(weight, hessian, state.dequantize()) < 0.75 * nearest
        parts = nearest_codes(problem, scheme)
        monkeypatch.setattr("codegemm_quant.search.BLOCK_COLUMNS", 16)
        feedback_codes(weight, Curvature.of(hessian, 1e-4, "test").upper, parts)
        monkeypatch.undo()
        assert torch.equal(parts.codes, state.codes)
