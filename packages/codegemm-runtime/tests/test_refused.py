"""Checkpoints that must not load, each refused with the tensor or file named by every way in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import codegemm_runtime
from codegemm_kernels import CheckpointError
from codegemm_runtime import inspect_folder, load_model

codegemm_runtime.register()

Q = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


def drop(name: str) -> Callable[[Any], None]:
    return lambda checkpoint: checkpoint.tensors.pop(name)


def change(name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    return lambda checkpoint: checkpoint.tensors.update({name: edit(checkpoint.tensors[name]).contiguous()})


def add(name: str, tensor: torch.Tensor) -> Callable[[Any], None]:
    return lambda checkpoint: checkpoint.tensors.update({name: tensor})


def unquantise(checkpoint: Any) -> None:
    for part in ("codes", "codebooks", "scales"):
        del checkpoint.tensors[f"{Q}.{part}"]


FAULTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "codes missing": (drop(f"{Q}.codes"), rf"{Q}.weight is missing, and there are no {Q}.codes"),
    "codebooks missing": (drop(f"{Q}.codebooks"), rf"{Q}.codebooks is missing"),
    "scales missing": (drop(f"{Q}.scales"), rf"{Q}.scales is missing"),
    "bias missing": (drop(f"{Q}.bias"), rf"{Q}.bias is missing"),
    "layer missing": (unquantise, rf"{Q}.weight is missing"),
    "norm missing": (drop("model.norm.weight"), r"model.norm.weight is missing"),
    "embedding missing": (drop("model.embed_tokens.weight"), r"model.embed_tokens.weight is missing"),
    "head missing": (drop("lm_head.weight"), r"lm_head.weight is missing"),
    "codes cut": (change(f"{DOWN}.codes", lambda t: t[:, :-1]), rf"{DOWN}.codes in model.* shape \[2, 3, 64\]"),
    "codes of int16": (change(f"{Q}.codes", lambda t: t.short()), rf"{Q}.codes in model.safetensors is I16"),
    "codes of uint8": (change(f"{Q}.codes", lambda t: t.to(torch.uint8)), rf"{Q}.codes in model.safetensors is U8"),
    "12-bit codebooks": (
        change(f"{Q}.codebooks", lambda t: t.repeat(1, 16, 1)),
        rf"{Q}.codebooks in model.safetensors has shape \[2, 4096, 8\].* needs \[2, 256, 8\]",
    ),
    "integer codebooks": (change(f"{Q}.codebooks", lambda t: t.int()), rf"{Q}.codebooks in .* is I32"),
    "scales transposed": (change(f"{DOWN}.scales", lambda t: t.t()), rf"{DOWN}.scales in .* shape \[64, 4\]"),
    "bias too long": (change(f"{Q}.bias", lambda t: t.repeat(2)), rf"{Q}.bias in .* shape \[128\]"),
    "norm too long": (change("model.norm.weight", lambda t: t.repeat(2)), r"model.norm.weight in .* shape \[128\]"),
    "norm of integers": (change("model.norm.weight", lambda t: t.int()), r"model.norm.weight in .* is I32"),
    "bias without a place": (add(f"{DOWN}.bias", torch.zeros(64)), rf"{DOWN}.bias would be ignored"),
    "weight beside codes": (add(f"{DOWN}.weight", torch.zeros(64, 128)), rf"{DOWN}.weight would be ignored"),
    "a stranger": (
        add("model.layers.0.mlp.router.weight", torch.zeros(4)),
        r"router.weight has no place in a Qwen2For",
    ),
    "a stranger outside": (add("extra", torch.zeros(4)), r"extra has no place in a Qwen2ForCausalLM"),
    "layer too many": (
        lambda checkpoint: checkpoint.tensors.update(
            {k.replace("layers.1", "layers.2"): v.clone() for k, v in checkpoint.tensors.items() if f"{Q}." in k}
        ),
        r"model.layers.2.self_attn.q_proj is stored as codes, but",
    ),
    "embedding as codes": (
        add("model.embed_tokens.codes", torch.zeros(2, 2, 258, dtype=torch.int32)),
        r"model.embed_tokens is stored as codes, but .* Embedding",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_tensors(make_checkpoint: Callable[..., Any], fault: str) -> None:
    break_it, message = FAULTS[fault]
    checkpoint = make_checkpoint("qwen2")
    break_it(checkpoint)
    checkpoint.write()
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    with pytest.raises(CheckpointError, match=message):
        load_model(checkpoint.folder, "cpu")
    assert any(re.search(message, problem) for problem in inspect_folder(checkpoint.folder).problems)


def test_buffers_that_transformers_used_to_store_are_no_strangers(make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint("qwen2")
    checkpoint.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    checkpoint.tensors["model.rotary_emb.inv_freq"] = torch.ones(8)
    checkpoint.write()
    assert inspect_folder(checkpoint.folder).problems == []


@pytest.mark.parametrize("part", ["codebooks", "scales"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(make_checkpoint: Callable[..., Any], part: str, value: float) -> None:
    checkpoint = make_checkpoint("qwen2", shards=2)
    checkpoint.tensors[f"{DOWN}.{part}"].view(-1)[-1] = value
    checkpoint.write(shards=2)
    for load in (AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises(CheckpointError, match=rf"{DOWN}\.{part} in model-0000[12]-of-.* holds NaN or inf"):
            load(checkpoint.folder)


def truncate(checkpoint: Any) -> None:
    path = checkpoint.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def garble(checkpoint: Any) -> None:
    (checkpoint.folder / "model.safetensors").write_bytes(b"\x80\x04\x95pickle" * 100)


def pickle_instead(checkpoint: Any) -> None:
    torch.save(checkpoint.tensors, checkpoint.folder / "pytorch_model.bin")
    (checkpoint.folder / "model.safetensors").unlink()


def lose_a_shard(checkpoint: Any) -> None:
    checkpoint.write(shards=3)
    (checkpoint.folder / "model-00002-of-00003.safetensors").unlink()


def set_block(**changes: Any) -> Callable[[Any], None]:
    def edit(checkpoint: Any) -> None:
        config = json.loads((checkpoint.folder / "config.json").read_text())
        checkpoint.edit_config(quantization_config=config["quantization_config"] | changes)

    return edit


BROKEN_FOLDERS: dict[str, tuple[Callable[[Any], None], str]] = {
    "truncated file": (truncate, r"model.safetensors.* cut short"),
    "no safetensors file": (garble, r"model.safetensors is.*(cut short|not a safetensors)"),
    "pickle only": (pickle_instead, r"model.safetensors is missing|safetensors files only"),
    "shard missing": (lose_a_shard, r"model-00002-of-00003.safetensors is missing"),
    "other scheme": (set_block(scheme="m1v4g32"), r"codes in .* m1v4g32 of a"),
    "other group size": (set_block(scheme="m2v8g-1"), r"scales in .* m2v8g-1 of a"),
    "unknown scheme": (set_block(scheme="gptq"), r"unknown scheme 'gptq'"),
    "16-bit codes": (set_block(scheme="m1v8b16g32"), r"only 8-bit codes"),
    "from the future": (set_block(format_version=99), r"format_version 99"),
}


@pytest.mark.parametrize("fault", BROKEN_FOLDERS)
def test_broken_folders(make_checkpoint: Callable[..., Any], fault: str) -> None:
    break_it, message = BROKEN_FOLDERS[fault]
    checkpoint = make_checkpoint()
    break_it(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        load_model(checkpoint.folder, "cpu")
    if fault != "shard missing":  # transformers itself stops at that one
        with pytest.raises(CheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    assert inspect_folder(checkpoint.folder).problems


def test_codes_of_a_tied_head_are_refused(make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint("llama-tied")
    for part in ("codes", "codebooks", "scales"):
        checkpoint.tensors[f"lm_head.{part}"] = checkpoint.tensors[f"{Q}.{part}"].clone()
    checkpoint.write()
    with pytest.raises(CheckpointError, match=r"lm_head is stored as codes, but .* tie_word_embeddings"):
        AutoModelForCausalLM.from_pretrained(checkpoint.folder)


def test_config_that_promises_codes_where_there_are_none(make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint()
    checkpoint.tensors = {name: tensor.clone() for name, tensor in checkpoint.dense.state_dict().items()}
    checkpoint.write()
    with pytest.raises(CheckpointError, match="holds no codes"):
        AutoModelForCausalLM.from_pretrained(checkpoint.folder)


def test_codes_without_metadata(make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint()
    checkpoint.edit_config(quantization_config=None, codegemm=None)
    with pytest.raises(CheckpointError, match=r"neither a quantization_config .* nor a codegemm block"):
        load_model(checkpoint.folder, "cpu")


def test_published_block_of_other_bits(make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint(published=True)
    block = json.loads((checkpoint.folder / "config.json").read_text())["codegemm"]
    checkpoint.edit_config(codegemm=block | {"nbits_per_codebook": 16})
    with pytest.raises(CheckpointError, match="16-bit codes"):
        load_model(checkpoint.folder, "cpu")


def test_all_problems_are_counted(make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint()
    del checkpoint.tensors["model.norm.weight"], checkpoint.tensors["lm_head.weight"]
    checkpoint.write()
    with pytest.raises(CheckpointError, match="1 more"):
        AutoModelForCausalLM.from_pretrained(checkpoint.folder)
