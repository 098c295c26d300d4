from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from codegemm_kernels import BadInput
from codegemm_runtime import load_model, load_tokenizer
from codegemm_runtime.engine import Engine, Request
from codegemm_runtime.linear import CodebookLinear
from codegemm_runtime.rounding import SCHEMES, round_head, round_linear

FOLDER = Path(__file__).resolve().parents[3] / "models" / "pylm-4m"


@pytest.mark.parametrize("bits", SCHEMES)
@pytest.mark.parametrize("bias", [False, True])
def test_every_weight_is_rounded_to_its_nearest_level(bits: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 70, bias)
    linear.weight.data[3, :128] = 0
    packed = round_linear(linear, bits)
    weight, rounded = linear.weight.detach(), packed.dequantize()
    size = weight.unflatten(1, (2, 128)).abs().amax(2, keepdim=True).expand(-1, -1, 128).flatten(1)
    assert bool(((weight - rounded).abs() <= size / (2**bits - 1) * 1.001).all())
    levels = (rounded / size.clamp_min(1e-9) + 1) * (2**bits - 1) / 2
    assert float((levels - levels.round())[size > 0].abs().max()) < 1e-3
    assert len(torch.unique(levels[size > 0].round())) > 2 ** (bits - 1)
    x = torch.randn(3, 256)
    torch.testing.assert_close(packed(x), nn.functional.linear(x, rounded, linear.bias), atol=1e-4, rtol=1e-4)


def test_a_row_that_128_does_not_divide_has_one_scale() -> None:
    linear = nn.Linear(80, 5)
    packed = round_linear(linear, 8)
    assert packed.scales.shape == (1, 5)
    torch.testing.assert_close(packed.dequantize(), linear.weight.detach(), atol=1e-3, rtol=0)


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(BadInput, match="8 or 4 bits, not to 3"):
        round_linear(nn.Linear(128, 8), 3)
    with pytest.raises(BadInput, match="the layer"):
        round_linear(nn.Linear(100, 8), 8)


@pytest.mark.parametrize("bits", SCHEMES)
def test_the_head_of_the_trained_model_predicts_nearly_the_same(bits: int) -> None:
    model = load_model(FOLDER, "cpu", torch.float32)
    tokens = load_tokenizer(FOLDER)("import torch\n\n\ndef main(", return_tensors="pt").input_ids
    model.requires_grad_(False)
    before = model(tokens).logits.log_softmax(-1)
    round_head(model, bits)
    assert isinstance(model.get_output_embeddings(), CodebookLinear)
    after = model(tokens).logits.log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    assert 0 < float(divergence) < {8: 1e-4, 4: 2e-2}[bits]
    (text,) = Engine(model, 64, 1).generate([tokens[0].tolist()], Request(1))
    assert text is not None


def test_a_model_with_a_rounded_head_is_saved_and_loaded(tmp_path: Path, make_checkpoint: Any, ids: Tensor) -> None:
    model = load_model(make_checkpoint().folder, "cpu", torch.float32)
    round_head(model, 8)
    logits = model(ids).logits
    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved", "cpu", torch.float32)
    assert isinstance(again.get_output_embeddings(), CodebookLinear)
    assert torch.equal(again(ids).logits, logits)
    with pytest.raises(BadInput, match="no dense linear layer"):
        round_head(model, 8)
