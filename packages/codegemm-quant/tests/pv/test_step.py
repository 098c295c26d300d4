from dataclasses import replace
from pathlib import Path

import pytest
import torch

from codegemm_quant.pv.codes import CodeSearch, encode
from codegemm_quant.pv.lamb import EPSILON, Lamb, Rates, Slot
from codegemm_quant.pv.optimiser import PVOptimiser
from codegemm_quant.pv.processes import Processes
from codegemm_quant.pv.student import load_student
from codegemm_quant.weight import CodebookWeight

ALONE = Processes()


def random_gradients(student):
    chance = torch.Generator().manual_seed(3)
    for parameter in student.model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=chance) * 1e-5


def lamb_step(value, gradient, rate):
    """The first step: with moments corrected for their start the update is the gradient's sign."""
    update = gradient / (gradient.abs() + EPSILON)
    return value - rate * value.norm() / update.norm() * update


@pytest.mark.parametrize("delta_decay", [0.0, 0.25, 1.0])
def test_order_of_a_step(config, delta_decay):
    """Gradients at the old weight; then P on everything; then V with the new codebooks; then U pulled back."""
    config = replace(config, delta_decay=delta_decay, max_code_change=0.3, code_learning_rate=0.5, learning_rate=0.05)
    student = load_student(Path(config.student), ALONE)
    optimiser = PVOptimiser(student, config, ALONE)
    random_gradients(student)
    matrix = student.matrices[5]
    old, gradient = matrix.weight().clone(), matrix.dense.grad.clone()
    norm = student.others["model.norm.weight"]
    expected_norm = lamb_step(norm.detach().clone(), norm.grad.clone(), 0.05)
    books, scales = old.codebooks.clone().requires_grad_(), old.scales.clone().requires_grad_()
    CodebookWeight(old.codes, books, scales).dequantize().backward(gradient)
    changed = optimiser.step(1)

    latent = lamb_step(old.dequantize(), gradient, 0.5)
    torch.testing.assert_close(matrix.codebooks, lamb_step(old.codebooks, books.grad, 0.05))
    torch.testing.assert_close(matrix.scales, lamb_step(old.scales, scales.grad, 0.05))
    torch.testing.assert_close(norm.detach(), expected_norm)
    moved = CodebookWeight(old.codes, matrix.codebooks, matrix.scales)
    v = matrix.codebooks.shape[2]
    far = (latent - moved.dequantize()).view(-1, v).square().sum(1).topk(-(-3 * matrix.vectors // 10)).indices
    flat = old.codes.view(matrix.vectors, -1).clone()
    both = [
        encode(
            latent.view(-1, v)[far],
            moved.vector_scales().flatten()[far],
            flat[far],
            matrix.codebooks,
            CodeSearch(order, config.beam_size, None),
        )
        for order in ((0, 1), (1, 0))
    ]
    found = matrix.codes.view(matrix.vectors, -1)[far].long()
    agreement = max(float((found == codes).all(1).float().mean()) for codes in both)
    assert agreement > 0.99  # ties within rounding may fall either way
    assert 0 < float(changed) <= 0.3 + 1 / matrix.vectors
    now = matrix.weight().dequantize()
    torch.testing.assert_close(matrix.latent, latent + delta_decay * (now - latent), rtol=1e-4, atol=1e-4)
    assert torch.equal(matrix.dense.detach(), now)
    assert all(parameter.grad is None for parameter in student.model.parameters())


@pytest.mark.parametrize(
    "frozen", [("codes",), ("codebooks",), ("others",), ("codes", "others"), ("codebooks", "others")]
)
def test_what_is_frozen_stays(config, frozen):
    student = load_student(Path(config.student), ALONE)
    optimiser = PVOptimiser(student, replace(config, freeze=frozen, code_learning_rate=0.5), ALONE)
    before = student.snapshot()
    trained = {name for name, parameter in student.model.named_parameters() if parameter.requires_grad}
    random_gradients(student)
    optimiser.step(1)
    same = {name for name, (value, _) in student.tensors().items() if torch.equal(value, before[name])}
    parts = {"codes": (".codes",), "codebooks": (".codebooks", ".scales"), "others": (".weight",)}
    for part, suffixes in parts.items():
        of_part = {name for name in before if name.endswith(suffixes)}
        assert of_part
        assert (of_part <= same) if part in frozen else not (of_part & same), part
    assert ("model.norm.weight" in trained) == ("others" not in frozen)


def test_without_lamb_it_is_adam():
    chance = torch.Generator().manual_seed(0)
    start = [torch.randn(5, 7, generator=chance), torch.randn(11, generator=chance)]
    ours = [value.clone() for value in start]
    theirs = [value.clone().requires_grad_() for value in start]
    adam = torch.optim.Adam(theirs, lr=3e-3, betas=(0.9, 0.95), eps=EPSILON)
    lamb = Lamb([Slot(str(i), value, None) for i, value in enumerate(ours)], Rates(3e-3, 0.9, 0.95, False), ALONE)
    for number in range(1, 6):
        gradients = [torch.randn(value.shape, generator=chance) for value in start]
        for value, gradient in zip(theirs, gradients, strict=True):
            value.grad = gradient
        adam.step()
        lamb.step(gradients, number, 1.0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.detach())


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_every_lamb_step_is_as_long_as_asked_for(beta1, monkeypatch):
    monkeypatch.setattr("codegemm_quant.pv.lamb.BUCKET", 40)  # several buckets
    chance = torch.Generator().manual_seed(0)
    values = [torch.randn(6, 6, generator=chance), torch.randn(30, generator=chance), torch.zeros(4)]
    lamb = Lamb([Slot(str(i), value, None) for i, value in enumerate(values)], Rates(0.01, beta1, 0.95, True), ALONE)
    for number in range(1, 4):
        before = [value.clone() for value in values]
        lamb.step([1e-6 * torch.randn(value.shape, generator=chance) for value in values], number, 0.5)
        for old, new in zip(before[:2], values[:2], strict=True):
            assert float((new - old).norm()) == pytest.approx(0.005 * float(old.norm()), rel=1e-4)
    assert values[2].abs().sum() > 0  # a tensor of zeros is stepped as by Adam


def test_schedule(config):
    def rates(**changes):
        optimiser = PVOptimiser(student, replace(config, steps=10, **changes), ALONE)
        return [round(optimiser.rate(number), 3) for number in range(1, 11)]

    student = load_student(Path(config.student), ALONE)
    assert rates(schedule="constant", warmup=4) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]
    cosine = rates(warmup=2)
    assert cosine[:3] == [0.5, 1, 1]
    assert cosine[2:] == sorted(cosine[2:], reverse=True)
    assert 0 < cosine[-1] < 0.1
