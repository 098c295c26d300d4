"""from_pretrained and save_pretrained on our checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import codegemm_runtime
from codegemm_runtime import CodebookLinear

codegemm_runtime.register()


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def relative_error(logits: Tensor, exact: Tensor) -> float:
    return ((logits.float() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen2", "qwen3", "gemma2", "mixtral", "opt"])
def test_logits_are_those_of_the_dequantised_weights(
    make_checkpoint: Callable[..., Any], ids: Tensor, architecture: str
) -> None:
    checkpoint = make_checkpoint(architecture)
    model = load(checkpoint.folder)
    replaced = [name for name, module in model.named_modules() if isinstance(module, CodebookLinear)]
    assert replaced == list(checkpoint.layers)
    assert relative_error(model(ids).logits, checkpoint.dense(ids).logits) < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen2", "gemma2", "mixtral", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_gives_the_same_bits(
    make_checkpoint: Callable[..., Any], tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    checkpoint = make_checkpoint(architecture, dtype=dtype, shards=3)
    load(checkpoint.folder).save_pretrained(tmp_path / "again")
    assert_same_bits(stored(checkpoint.folder), stored(tmp_path / "again"))
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (checkpoint.folder, tmp_path / "again")
    )
    assert after["quantization_config"] == before["quantization_config"]
    assert after["codegemm"] == before["codegemm"]
    assert after["dtype"] == str(dtype).removeprefix("torch.")


def test_sharded_save_loads_again(make_checkpoint: Callable[..., Any], ids: Tensor, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("qwen2")
    model = load(checkpoint.folder)
    model.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    assert_same_bits(stored(checkpoint.folder), stored(tmp_path / "again"))
    assert torch.equal(load(tmp_path / "again")(ids).logits, model(ids).logits)


def test_unknown_fields_and_overrides_survive(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj"
    checkpoint = make_checkpoint(layers={name: "m1v4g-1"})
    config = json.loads((checkpoint.folder / "config.json").read_text())
    assert config.get("codegemm") is None
    checkpoint.edit_config(quantization_config=config["quantization_config"] | {"from_the_future": {"a": [1]}})
    model = load(checkpoint.folder)
    assert str(model.get_submodule(name).scheme) == "m1v4g-1"
    model.save_pretrained(tmp_path / "again")
    after = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert after["from_the_future"] == {"a": [1]}
    assert after["layers"] == {name: "m1v4g-1"}


def test_layers_are_frozen_and_the_model_is_ready(make_checkpoint: Callable[..., Any]) -> None:
    model = load(make_checkpoint("qwen2").folder)
    layers = [module for module in model.modules() if isinstance(module, CodebookLinear)]
    assert layers
    assert not any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
    assert not model.training
    assert model.hf_quantizer.is_compileable
    assert model.hf_quantizer.is_serializable()
    assert model.hf_quantizer.is_trainable


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16, "float32"])
def test_dtype_casts_floats_and_leaves_codes(make_checkpoint: Callable[..., Any], dtype: Any, ids: Tensor) -> None:
    checkpoint = make_checkpoint("qwen2")
    model = load(checkpoint.folder, dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {p.dtype for name, p in model.named_parameters() if not name.endswith(".codes")} == {wanted}
    codes = {name: p for name, p in model.state_dict().items() if name.endswith(".codes")}
    assert all(torch.equal(p, checkpoint.tensors[name]) for name, p in codes.items())
    assert relative_error(model(ids).logits, checkpoint.dense(ids).logits) < 0.05


def test_dtype_without_kernels_is_refused(make_checkpoint: Callable[..., Any]) -> None:
    with pytest.raises(codegemm_runtime.hf.BadInput, match="float64"):
        load(make_checkpoint().folder, dtype=torch.float64)


@pytest.mark.parametrize(
    "device_map", ["cpu", "auto", {"": "cpu"}, {"model.embed_tokens": "cpu", "model": "cpu", "lm_head": "cpu"}]
)
def test_device_maps(make_checkpoint: Callable[..., Any], device_map: Any, ids: Tensor) -> None:
    checkpoint = make_checkpoint(shards=2)
    model = load(checkpoint.folder, device_map=device_map)
    assert relative_error(model(ids.to(model.device)).logits.cpu(), checkpoint.dense(ids).logits) < 1e-3


@pytest.mark.cuda
def test_model_split_between_gpu_and_cpu(make_checkpoint: Callable[..., Any], ids: Tensor) -> None:
    checkpoint = make_checkpoint("llama", dtype=torch.float32)
    parts = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": 0, "lm_head": 0}
    model = load(checkpoint.folder, device_map=parts | {"model.rotary_emb": 0})
    assert relative_error(model(ids.cuda()).logits.cpu(), checkpoint.dense(ids).logits) < 1e-3


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_disk_offload(make_checkpoint: Callable[..., Any], ids: Tensor, tmp_path: Path, dtype: Any) -> None:
    checkpoint = make_checkpoint("qwen2", shards=2)
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(
        checkpoint.folder,
        device_map=parts | {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"},
        offload_folder=tmp_path / "offload",
        **({} if dtype is None else {"dtype": dtype}),
    )
    assert model.model.layers[1].mlp.up_proj.codes.device.type == "meta"
    bound = 1e-5 if dtype is None else 0.05
    assert relative_error(model(ids).logits, checkpoint.dense(ids).logits) < bound
    if dtype is None:
        model.save_pretrained(tmp_path / "again")
        assert_same_bits(stored(checkpoint.folder), stored(tmp_path / "again"))


def test_meta_device_builds_the_skeleton(make_checkpoint: Callable[..., Any]) -> None:
    model = load(make_checkpoint().folder, device_map="meta")
    assert isinstance(model.model.layers[0].mlp.up_proj, CodebookLinear)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_tied_head_stays_dense_and_tied(make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint("llama-tied")
    assert "lm_head.weight" not in checkpoint.tensors
    model = load(checkpoint.folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_base_model_and_other_heads(make_checkpoint: Callable[..., Any], ids: Tensor, dtype: torch.dtype) -> None:
    """A base model drops the head; another head starts untrained, as transformers warns; the trunk is checked."""
    checkpoint = make_checkpoint("qwen2")
    base = AutoModel.from_pretrained(checkpoint.folder, dtype=dtype)
    hidden = checkpoint.dense.model(ids).last_hidden_state
    assert relative_error(base(ids).last_hidden_state, hidden) < (1e-5 if dtype == torch.float32 else 0.05)
    classifier = AutoModelForSequenceClassification.from_pretrained(checkpoint.folder, num_labels=3)
    assert classifier(ids).logits.shape == (1, 3)
    del checkpoint.tensors["model.layers.1.input_layernorm.weight"]
    checkpoint.write()
    for kind in (AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(codegemm_runtime.hf.CheckpointError, match="input_layernorm"):
            kind.from_pretrained(checkpoint.folder)


def test_dequantize_gives_a_dense_model(make_checkpoint: Callable[..., Any], ids: Tensor) -> None:
    model = load(make_checkpoint("qwen2").folder)
    logits = model(ids).logits
    model.dequantize()
    assert not any(isinstance(module, CodebookLinear) for module in model.modules())
    assert relative_error(model(ids).logits, logits) < 1e-5


def test_one_token_prompt_generates_what_dense_weights_do(make_checkpoint: Callable[..., Any]) -> None:
    """The published system returned one shared buffer, which corrupted the first cached value."""
    checkpoint = make_checkpoint("qwen2")
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    prompt = torch.tensor([[42]])
    model = load(checkpoint.folder)
    expected = checkpoint.dense.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, **options), expected)
    assert len(set(expected[0].tolist())) > 3


def test_quantizing_on_the_fly_is_refused(make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint(published=True)
    with pytest.raises(codegemm_runtime.hf.BadInput, match="load_model"):
        load(checkpoint.folder, quantization_config=codegemm_runtime.CodeGemmConfig("m2v8g32"))
