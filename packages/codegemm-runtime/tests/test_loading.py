"""load_model and load_tokenizer: dense, our and published folders, and arguments that are none of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from codegemm_kernels import BadInput, CheckpointError
from codegemm_runtime import CodebookLinear, load_model, load_tokenizer


def relative_error(logits: Tensor, exact: Tensor) -> float:
    return ((logits.cpu().float() - exact).norm() / exact.norm()).item()


MIXTURES = [(torch.float16, torch.bfloat16, torch.float32), (torch.float32,) * 3, (torch.bfloat16,) * 3]


@pytest.mark.parametrize("floats", MIXTURES)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_published_folder(
    make_checkpoint: Callable[..., Any], ids: Tensor, device: str, architecture: str, floats: Any, tmp_path: Path
) -> None:
    """Declared fp16, stored in a mixture; the logits are those of dense weights rebuilt from the stored tensors."""
    from codegemm_kernels import reference

    checkpoint = make_checkpoint(architecture, published=True)
    checkpoint.edit_config(dtype=None, torch_dtype="float16")
    kinds = {"codebooks": floats[0], "scales": floats[1], "bias": floats[2]}
    for name, tensor in checkpoint.tensors.items():
        if tensor.is_floating_point():
            checkpoint.tensors[name] = tensor.to(kinds.get(name.rpartition(".")[2], floats[0]))
    checkpoint.write(shards=2)
    state = {name: tensor for name, tensor in checkpoint.tensors.items() if name in checkpoint.dense.state_dict()}
    for name in checkpoint.layers:
        codes, codebooks, scales = (checkpoint.tensors[f"{name}.{part}"] for part in ("codes", "codebooks", "scales"))
        state[f"{name}.weight"] = reference.dequantize(codes, codebooks.float(), scales.float())
    checkpoint.dense.load_state_dict(state, strict="lm_head.weight" in state)
    exact = checkpoint.dense(ids).logits

    declared = load_model(checkpoint.folder, device)
    assert {p.dtype for p in declared.parameters() if p.is_floating_point()} == {torch.float16}
    assert relative_error(declared(ids.to(device)).logits, exact) < 5e-3  # dense fp16 itself is at 1.7e-3
    wide = load_model(checkpoint.folder, device, torch.float32)
    assert relative_error(wide(ids.to(device)).logits, exact) < 1e-3

    wide.save_pretrained(tmp_path / "ours")
    codes = {name: tensor for name, tensor in checkpoint.tensors.items() if name.endswith(".codes")}
    again = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in codes.items())
    assert torch.equal(load_model(tmp_path / "ours", device)(ids.to(device)).logits, wide(ids.to(device)).logits)


def test_published_folder_with_a_bias_dropped_is_refused(make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint("qwen2", published=True)
    checkpoint.tensors = {name: t for name, t in checkpoint.tensors.items() if not name.endswith(".bias")}
    checkpoint.write()
    with pytest.raises(CheckpointError, match=r"q_proj\.bias is missing"):
        load_model(checkpoint.folder, "cpu")


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_our_folder(make_checkpoint: Callable[..., Any], ids: Tensor, device: str, dtype: Any) -> None:
    checkpoint = make_checkpoint("gemma2", dtype=torch.float32, shards=2)
    model = load_model(checkpoint.folder, device, dtype)
    assert model.device.type == device
    assert any(isinstance(module, CodebookLinear) for module in model.modules())
    bound = 1e-3 if dtype == "auto" else 0.05
    assert relative_error(model(ids.to(device)).logits, checkpoint.dense(ids).logits) < bound


def test_dense_folder(make_checkpoint: Callable[..., Any], ids: Tensor, tmp_path: Path) -> None:
    dense = make_checkpoint("mixtral").dense
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(load_model(tmp_path / "dense", "cpu")(ids).logits, dense(ids).logits)


def test_dense_folder_with_a_tensor_missing_is_refused(make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint()
    checkpoint.tensors = {name: tensor.clone() for name, tensor in checkpoint.dense.state_dict().items()}
    del checkpoint.tensors["model.layers.0.mlp.up_proj.weight"]
    checkpoint.write()
    checkpoint.edit_config(quantization_config=None, codegemm=None)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is missing"):
        load_model(checkpoint.folder, "cpu")


@pytest.mark.parametrize(
    "argument", ["./nowhere", "/no/such/folder", "a/b/c", "~/nothing-here", "..", "C:\\models", "gpt2"]
)
def test_paths_that_do_not_exist(argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    expected = CheckpointError if argument == ".." else BadInput
    with pytest.raises(expected, match=r"there is no folder|config\.json"):
        load_model(argument)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(BadInput, match="is a file"):
        load_model(file)


def test_hub_names_are_downloaded_without_anything_that_unpickles(
    make_checkpoint: Callable[..., Any], ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fnmatch import fnmatch

    checkpoint = make_checkpoint()

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert name == "somebody/some-model"
        wanted = ["model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.model", "merges.txt"]
        refused = [
            "pytorch_model.bin",
            "model.pt",
            "consolidated.00.pth",
            "modeling_x.py",
            "original/model.safetensors",
        ]
        for file in wanted + refused:
            allowed = any(fnmatch(file, pattern) for pattern in allow_patterns)
            ignored = any(fnmatch(file, pattern) for pattern in ignore_patterns)
            assert (allowed and not ignored) == (file in wanted), file
        return str(checkpoint.folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = load_model("somebody/some-model", "cpu")
    assert relative_error(model(ids).logits, checkpoint.dense(ids).logits) < 1e-3


def test_hub_failures_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*arguments: Any, **options: Any) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(BadInput, match=r"somebody/some-model is neither a folder here .*no network"):
        load_model("somebody/some-model")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "mps", "cpu:x"])
def test_devices_that_are_not_there(make_checkpoint: Callable[..., Any], name: str) -> None:
    with pytest.raises(BadInput, match="device"):
        load_model(make_checkpoint().folder, name)


def test_config_that_makes_no_sense(make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint(published=True)
    checkpoint.edit_config(model_type="from-the-future")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(checkpoint.folder, "cpu")


def test_tokenizer(tmp_path: Path, write_tokenizer: Callable[..., None], make_checkpoint: Callable[..., Any]) -> None:
    folder = make_checkpoint().folder
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(folder)
    write_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer("héllo").input_ids) == "héllo"
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(folder)
