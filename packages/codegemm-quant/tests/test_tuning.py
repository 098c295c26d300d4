import math

import pytest
import torch
from torch import nn

from codegemm_kernels import CodebookScheme, NumericalError
from codegemm_quant.adam import RelativeAdam
from codegemm_quant.blocks import BlockCall
from codegemm_quant.fitted_linear import FittedLinear
from codegemm_quant.hidden_states import HiddenStates
from codegemm_quant.kmeans import initialise
from codegemm_quant.tuning import TunePlan, tune, tune_block

CALL = BlockCall((), {})


def fitted(scheme="m2v4g16", rows=96, width=64):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(rows, width, generator=generator)
    weight = initialise(dense, torch.ones(width), CodebookScheme.parse(scheme), generator)
    return dense, FittedLinear(weight, torch.zeros(rows), torch.float32)


def states(tensors):
    held = HiddenStates(torch.device("cpu"))
    for tensor in tensors:
        held.append(tensor)
    return held


def plan(rate=1e-2, epochs=3, **options):
    return TunePlan(epochs, rate, torch.Generator().manual_seed(0), "block 5", **options)


@pytest.mark.parametrize("scheme", ["m1v4g16", "m2v8g-1", "m3v4g32"])
def test_gradients_are_those_of_the_dequantised_weight(scheme):
    _, linear = fitted(scheme)
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(1))
    linear.refresh(training=True)
    linear(x).square().sum().backward()
    linear.collect_gradients()

    books = linear.codebooks.detach().clone().requires_grad_(True)
    scales = linear.scales.detach().clone().requires_grad_(True)
    sums = sum(books[i][linear.codes[:, :, i].long()] for i in range(len(books)))
    weight = (sums.reshape(96, scales.shape[1], -1) * scales.unsqueeze(-1)).reshape(96, 64)
    (x @ weight.t()).square().sum().backward()
    assert torch.allclose(linear.codebooks.grad, books.grad, rtol=1e-4, atol=1e-4 * books.grad.abs().max())
    assert torch.allclose(linear.scales.grad, scales.grad, rtol=1e-4, atol=1e-4 * scales.grad.abs().max())


def test_tuning_moves_the_output_towards_the_target_and_leaves_codes_alone():
    dense, linear = fitted()
    generator = torch.Generator().manual_seed(2)
    mix = torch.eye(64) + torch.randn(64, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    inputs = [torch.randn(4, 32, 64, generator=generator) @ mix for _ in range(20)]
    codes, losses = linear.codes.clone(), []
    block = nn.Sequential(linear)
    result = tune_block(block, CALL, states(inputs), states(x @ dense.t() for x in inputs), plan(on_step=losses.append))
    assert result.after < 0.7 * result.before
    assert len(losses) == 3 * 18
    assert torch.equal(linear.codes, codes)


def test_every_pass_is_over_the_next_version_and_what_is_held_out_is_of_the_first():
    _, linear = fitted()
    fetched = []

    def fetch(order):
        fetched.append(list(order))
        return ((torch.full((1, 64), float(i)),) for i in order)

    tune(nn.Sequential(linear), 17, fetch, lambda x: linear(x).square().mean(), plan(epochs=3, versions=2))
    held_out, training = [0, 16], list(range(1, 16))
    passes = [sorted(order) for order in fetched]
    assert passes == [held_out, training, held_out, [17 + i for i in training], held_out, training, held_out]


def test_a_block_never_gets_worse_on_what_is_held_out():
    dense, linear = fitted()
    inputs = [torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    before = [parameter.detach().clone() for parameter in linear.parameters()]
    result = tune_block(
        nn.Sequential(linear), CALL, states(inputs), states(x @ dense.t() for x in inputs), plan(rate=0.9)
    )
    assert result.after <= result.before
    if result.after == result.before:
        assert all(torch.equal(a, b) for a, b in zip(before, linear.parameters(), strict=True))


def test_a_loss_that_is_not_finite_names_the_block():
    dense, linear = fitted()
    inputs = [torch.full((1, 4, 64), math.inf) for _ in range(3)]
    with pytest.raises(NumericalError, match="block 5"):
        tune_block(nn.Sequential(linear), CALL, states(inputs), states(x @ dense.t() for x in inputs), plan())


def test_steps_are_those_of_adam_with_a_rate_for_each_parameter():
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(5, generator=generator), 100 * torch.randn(3, 4, generator=generator)]
    theirs = [parameter.clone().requires_grad_(True) for parameter in ours]
    groups = [{"params": [p], "lr": 0.01 * float(p.detach().square().mean().sqrt())} for p in theirs]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 0.5 * (1 + math.cos(math.pi * step / 10)))
    optimiser = RelativeAdam(ours, 0.01, 10)
    for _ in range(10):
        gradients = [torch.randn(p.shape, generator=generator) for p in ours]
        optimiser.step(gradients)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        adam.step()
        schedule.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-4)


def test_gradients_of_parts_of_a_batch_add_up_in_fp32():
    dense, linear = fitted("m1v4g16")
    linear.dtype = torch.bfloat16
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    grads = []
    for parts in (1, 16):
        linear.codebooks.grad = linear.scales.grad = None
        linear.refresh(training=True)
        for part in x.split(len(x) // parts):
            (linear(part).float() - part @ dense.t()).square().sum().backward()
            linear.collect_gradients()
        assert linear.scales.grad.dtype == torch.float32
        grads.append(linear.scales.grad.clone())
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[0].norm()
