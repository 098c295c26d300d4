"""PEFT's LoRA on quantised layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft", reason="an optional companion")

from peft import LoraConfig, PeftModel, get_peft_model

from codegemm_kernels import BadInput
from codegemm_runtime import CodebookLinear, load_model
from codegemm_runtime.lora import CodebookLoraLinear, with_codebook_layers

PROJECTIONS = ["q_proj", "v_proj", "down_proj"]


def config(**options: Any) -> LoraConfig:
    return with_codebook_layers(LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM", **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("error:Unsupported layer type")
def test_an_adapter_learns_saves_and_loads(
    make_checkpoint: Callable[..., Any], ids: Tensor, device: str, tmp_path: Path, dtype: torch.dtype
) -> None:
    checkpoint, ids = make_checkpoint("qwen2"), ids.to(device)
    plain = load_model(checkpoint.folder, device, dtype)
    untouched = {name: value.clone() for name, value in plain.state_dict().items()}
    before = plain(ids).logits
    model = get_peft_model(plain, config(lora_dropout=0.1))
    layers = [module for module in model.modules() if isinstance(module, CodebookLoraLinear)]
    assert len(layers) == 2 * len(PROJECTIONS)
    assert torch.equal(model.eval()(ids).logits, before), "a new adapter changes nothing"

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(layers)
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    losses = []
    for _ in range(15):
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    frozen = {name: value for name, value in plain.state_dict().items() if "lora_" not in name}
    assert len(frozen) == len(untouched)
    for name, value in frozen.items():
        assert torch.equal(value, untouched[name.replace("base_layer.", "")]), name

    after = model.eval()(ids).logits
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, before)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 100_000
    again = PeftModel.from_pretrained(
        load_model(checkpoint.folder, device, dtype),
        tmp_path / "adapter",
        config=with_codebook_layers(LoraConfig.from_pretrained(tmp_path / "adapter")),
    )
    assert torch.equal(again.eval()(ids).logits, after)


def test_gradients_of_the_adapter_are_those_over_dense_weights(
    make_checkpoint: Callable[..., Any], ids: Tensor
) -> None:
    """The gradient of A below other quantised layers passes through them; compared with nn.Linear of equal weights."""
    checkpoint = make_checkpoint("llama")
    gradients = []
    for base in (load_model(checkpoint.folder, "cpu"), checkpoint.dense.requires_grad_(False)):
        torch.manual_seed(0)
        model = get_peft_model(base, config())
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 12
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5)


def test_what_needs_the_weight_is_refused(make_checkpoint: Callable[..., Any]) -> None:
    model = load_model(make_checkpoint("llama").folder, "cpu")
    for options in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(BadInput, match="plain LoRA only"):
            get_peft_model(model, config(**options))
    model = load_model(make_checkpoint("llama", name="other").folder, "cpu")
    adapted = get_peft_model(model, config())
    with pytest.raises(BadInput, match="cannot be merged"):
        adapted.merge_and_unload()
    assert any(isinstance(module, CodebookLinear) for module in model.modules())
