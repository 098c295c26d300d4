from __future__ import annotations

import pytest
import torch
from torch import nn

from codegemm_kernels import BadInput, CodebookScheme, reference
from codegemm_runtime.linear import CodebookLinear, tile_linears
from codegemm_runtime.replace import replace_linears, restore_linears

SCHEME = CodebookScheme.parse("m2v8g32")


def filled(
    scheme: CodebookScheme = SCHEME,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    size: tuple[int, int] = (64, 33),
) -> CodebookLinear:
    torch.manual_seed(0)
    layer = CodebookLinear(*size, scheme, bias, dtype, device)
    layer.codes.data.copy_(torch.randint(-(2**31), 2**31, layer.codes.shape, dtype=torch.int64).to(torch.int32))
    layer.codebooks.data.copy_(torch.randn(layer.codebooks.shape))
    layer.scales.data.copy_(torch.rand(layer.scales.shape))
    if layer.bias is not None:
        layer.bias.data.copy_(torch.randn(layer.bias.shape))
    return layer


def dense(layer: CodebookLinear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    linear.weight.data = reference.dequantize(layer.codes, layer.codebooks.float(), layer.scales.float())
    if layer.bias is not None:
        linear.bias.data = layer.bias.detach().float()
    return linear


def assert_product(layer: CodebookLinear, x: torch.Tensor, y: torch.Tensor, bound: float) -> None:
    error = reference.gemm_error(y, x, layer.codes, layer.codebooks, layer.scales, layer.bias)
    assert error < bound, error


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (0, 64)])
def test_forward_is_the_product(device: str, dtype: torch.dtype, bound: float, shape: tuple[int, ...]) -> None:
    layer = filled(dtype=dtype, device=device)
    x = torch.randn(shape).to(device, dtype)
    y = layer(x)
    assert y.shape == (*shape[:-1], 33)
    assert y.dtype == dtype
    assert_product(layer, x, y, bound)


def test_outputs_are_never_shared() -> None:
    layer = filled()
    first = layer(torch.ones(1, 64))
    kept = first.clone()
    layer(torch.zeros(1, 64))
    assert torch.equal(first, kept)


def test_everything_is_frozen_and_named_as_stored() -> None:
    layer = filled()
    assert list(layer.state_dict()) == ["codes", "codebooks", "scales", "bias"]
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert filled(bias=False).bias is None


@pytest.mark.parametrize("text", ["m1v4g64", "m2v8g32", "m4v16g16", "m1v4g-1"])
def test_scheme_is_read_from_the_tensors(text: str) -> None:
    layer = CodebookLinear(128, 8, CodebookScheme.parse(text), device="meta")
    assert str(layer.scheme) == text
    assert (layer.in_features, layer.out_features) == (128, 8)
    assert text in repr(layer)


def test_a_shape_the_scheme_cannot_store_is_refused() -> None:
    with pytest.raises(BadInput, match="multiple of 32"):
        CodebookLinear(72, 8, SCHEME)


def test_meta_forward_gives_shapes() -> None:
    layer = CodebookLinear(64, 33, SCHEME, True, torch.float16, "meta")
    y = layer(torch.empty(5, 64, dtype=torch.float16, device="meta"))
    assert (y.shape, y.dtype, y.device.type) == ((5, 33), torch.float16, "meta")


def test_mixed_dtypes_are_refused_like_f_linear_does() -> None:
    with pytest.raises((BadInput, RuntimeError), match=r"float32.*float16|float16.*float32"):
        filled()(torch.ones(1, 64, dtype=torch.float16))


@pytest.mark.parametrize("inside", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("outside", [torch.float32, torch.float16])
def test_autocast_computes_in_its_dtype(device: str, inside: torch.dtype, outside: torch.dtype) -> None:
    layer = filled(device=device)
    with torch.autocast(device, dtype=inside):
        y = layer(torch.ones(2, 64, device=device, dtype=outside))
        expected = dense(layer.cpu()).to(device)(torch.ones(2, 64, device=device, dtype=outside))
    assert y.dtype == expected.dtype == inside
    torch.testing.assert_close(y.float(), expected.float(), rtol=0.05, atol=0.2)


def test_gradients_reach_the_input_and_whatever_is_unfrozen(device: str) -> None:
    layer = filled(device=device)
    linear = dense(filled()).to(device)
    x = torch.randn(3, 64, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    (expected,) = torch.autograd.grad(linear(x).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
    layer.codebooks.requires_grad_(True)
    layer(x.detach()).sum().backward()
    assert layer.codebooks.grad is not None
    assert layer.scales.grad is None
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_compiles_without_a_graph_break(device: str) -> None:
    layer = filled(device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (1, 5):
        x = torch.randn(rows, 64, device=device)
        assert torch.equal(compiled(x), layer(x))
    with torch.autocast(device, dtype=torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16


class Routed(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).softmax(-1)


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16), nn.ReLU(), Routed(64, 64), nn.Linear(65, 8))


def test_replace_keeps_place_dtype_bias_and_mode() -> None:
    model = small_model().eval()
    assert replace_linears(model, {"0": SCHEME}) == ["0"]
    layer = model[0]
    assert isinstance(layer, CodebookLinear)
    assert layer.codebooks.dtype == torch.bfloat16
    assert layer.bias is not None
    assert not layer.training


@pytest.mark.parametrize(
    ("name", "message"), [("9", "no module"), ("1", "ReLU"), ("2", "Routed"), ("3", "65 input features")]
)
def test_replace_refuses_and_changes_nothing(name: str, message: str) -> None:
    model = small_model()
    with pytest.raises(BadInput, match=message):
        replace_linears(model, {"0": SCHEME, name: SCHEME})
    assert isinstance(model[0], nn.Linear)


def test_restore_gives_the_dense_model_back() -> None:
    model = nn.Sequential(filled(), nn.ReLU())
    x = torch.randn(4, 64)
    y = model(x)
    assert restore_linears(model) == ["0"]
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


def test_tiled_codes_compute_the_same_and_are_stored_as_before() -> None:
    layer, tiled = filled(), filled()
    tiled.tile()
    assert tiled.is_tiled and not layer.is_tiled
    assert (tiled.in_features, tiled.out_features, tiled.scheme) == (64, 33, SCHEME)
    x = torch.randn(3, 64)
    assert torch.equal(tiled(x), layer(x))
    assert torch.equal(tiled.dequantize(), layer.dequantize())
    for keep_vars in (False, True):
        stored = tiled.state_dict(keep_vars=keep_vars)
        assert all(torch.equal(stored[name], each) for name, each in layer.state_dict().items())
    tiled.untile()
    assert torch.equal(tiled.codes, layer.codes)


def test_a_tiled_layer_loads_and_changes_dtype() -> None:
    layer, tiled = filled(), CodebookLinear(64, 33, SCHEME, True)
    tiled.tile()
    tiled.load_state_dict(layer.state_dict())
    assert tiled.is_tiled
    half = tiled.half()
    assert half.is_tiled and half.scales.dtype == torch.float16
    assert torch.equal(half.state_dict()["codes"], layer.codes)
    assert tiled.to("meta").codes.dtype == torch.int32


def test_gradients_pass_through_tiled_codes() -> None:
    layer, tiled = filled(), filled()
    tiled.tile()
    inputs = [torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    for one, x in zip((layer, tiled), inputs, strict=True):
        one(x).square().sum().backward()
    assert inputs[0].grad is not None and torch.equal(inputs[0].grad, inputs[1].grad)


def test_only_a_model_that_is_on_the_cpu_is_tiled() -> None:
    model = nn.Sequential(filled(), CodebookLinear(64, 8, SCHEME, device="meta"))
    tile_linears(model)
    assert not any(one.is_tiled for one in model)
    tile_linears(model[:1])
    assert model[0].is_tiled
