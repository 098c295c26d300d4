import pytest
import torch

from codegemm_kernels import reference
from codegemm_kernels.autograd import gemm_with_grad


def dense(x, codes, codebooks, scales, bias):
    """The same product through torch's own autograd."""
    return torch.nn.functional.linear(x, reference.dequantize(codes, codebooks, scales), bias)


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize(("scheme", "N", "K"), [("m2v8g32", 33, 64), ("m1v4g-1", 20, 48), ("m3v16g64", 7, 128)])
def test_gradients_are_those_of_the_dense_product(device, scheme, N, K, make_weight):
    codes, codebooks, scales = make_weight(scheme, N, K, torch.float32, device)
    x, bias = torch.randn(2, 5, K, device=device), torch.randn(N, device=device)
    ours = leaves(x, codebooks, scales, bias)
    exact = leaves(*[t.double() for t in (x, codebooks, scales, bias)])
    seed = torch.randn(2, 5, N, device=device)
    (gemm_with_grad(ours[0], codes, ours[1], ours[2], ours[3]) * seed).sum().backward()
    (dense(exact[0], codes, exact[1], exact[2], exact[3]) * seed).sum().backward()
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.grad is not None
        assert mine.grad.shape == mine.shape
        torch.testing.assert_close(
            mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5 * float(theirs.grad.abs().max())
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_summed_in_fp32(device, dtype, make_weight):
    weight = make_weight("m1v4g32", 64, 128, dtype, device)
    x = torch.randn(400, 128, device=device).to(dtype)
    ours = leaves(x, *weight[1:])
    exact = leaves(x.double(), *[t.double() for t in weight[1:]])
    gemm_with_grad(ours[0], weight[0], ours[1], ours[2]).sum().backward()
    dense(exact[0], weight[0], exact[1], exact[2], None).sum().backward()
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.grad.dtype == dtype
        error = (mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 2 * torch.finfo(dtype).eps


def test_only_what_is_wanted_gets_a_gradient(device, make_weight):
    codes, codebooks, scales = make_weight("m2v8g32", 16, 64, torch.float32, device)
    (x,) = leaves(torch.randn(3, 64, device=device))
    gemm_with_grad(x, codes, codebooks, scales).sum().backward()
    assert x.grad is not None
    (scales,) = leaves(scales)
    gemm_with_grad(torch.randn(3, 64, device=device), codes, codebooks, scales).sum().backward()
    assert scales.grad is not None
    assert codebooks.grad is None


def test_compiled_gradients_are_the_eager_ones(device, make_weight):
    codes, codebooks, scales = make_weight("m2v8g32", 16, 64, torch.float32, device)
    x = torch.randn(3, 64, device=device)

    def loss(x, codebooks, scales):
        return gemm_with_grad(x * 2, codes, codebooks, scales).square().sum()

    eager, compiled = leaves(x, codebooks, scales), leaves(x, codebooks, scales)
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
