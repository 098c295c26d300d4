"""What people do with any transformers model, done with a quantised one: generate, pipeline, compile, move, offload."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from codegemm_runtime import CodebookLinear, load_model
from codegemm_runtime.engine import Engine, Request


@pytest.fixture
def folder(make_checkpoint: Callable[..., Any], write_tokenizer: Callable[..., None]) -> Path:
    checkpoint = make_checkpoint("qwen2", shards=2)
    write_tokenizer(checkpoint.folder)
    path: Path = checkpoint.folder
    return path


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def greedy(model: Any, ids: Tensor, tokens: int = 8, **options: Any) -> list[list[int]]:
    """New tokens, none of which is the end."""
    mask = torch.ones_like(ids) if (ids != 1).all() else (ids != 1).long()
    out = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        **options,
    )
    tokens_out: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return tokens_out


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 3}])
def test_generate_gives_what_dense_weights_give(
    make_checkpoint: Callable[..., Any], ids: Tensor, options: dict[str, Any]
) -> None:
    checkpoint = make_checkpoint("qwen3")
    assert greedy(load(checkpoint.folder), ids, **options) == greedy(checkpoint.dense, ids, **options)


def test_generate_pads_a_batch_on_the_left(folder: Path, ids: Tensor) -> None:
    model = load(folder)
    short = ids[:, 3:]
    batch = torch.cat([ids, torch.nn.functional.pad(short, (3, 0), value=1)])
    assert greedy(model, batch) == greedy(model, ids) + greedy(model, short)


def test_pipeline(folder: Path) -> None:
    pipe = pipeline("text-generation", model=str(folder), device_map="auto")
    texts = [
        out[0]["generated_text"] for out in pipe(["some text", "more"], max_new_tokens=6, do_sample=False, batch_size=2)
    ]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder)
    ids = tokenizer("some text", return_tensors="pt").input_ids
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=6, do_sample=False)[0], skip_special_tokens=True)
    assert texts[0] == expected
    assert texts[1].startswith("more")


def test_compile_without_a_graph_break(make_checkpoint: Callable[..., Any], ids: Tensor, device: str) -> None:
    """aot_eager traces as inductor does and leaves out its code generation, which takes 20 s."""
    checkpoint = make_checkpoint("llama")
    model = load(checkpoint.folder, device_map=device)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        ids = ids.to(device)
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_compiled_layer_with_gradients(make_checkpoint: Callable[..., Any]) -> None:
    layer = load(make_checkpoint("llama").folder).model.layers[0].mlp.up_proj
    compiled = torch.compile(layer, backend="aot_eager")
    x, y = (torch.randn(3, 64, generator=torch.manual_seed(0)).requires_grad_() for _ in range(2))
    compiled(x).square().sum().backward()
    with torch.no_grad():
        y.copy_(x)
    layer(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_save_after_moving_and_casting(folder: Path, ids: Tensor, device: str, tmp_path: Path, dtype: Any) -> None:
    model = load(folder).to(device).to(dtype)
    codes = [value for name, value in model.state_dict().items() if name.endswith(".codes")]
    assert codes and all(value.dtype == torch.int32 for value in codes)
    model.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    again = load(tmp_path / "again", device_map=device)
    assert again.dtype == dtype
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # .to(dtype) also rounds the rotary frequencies, which no checkpoint holds: so it is for any transformers model
    logits = [each(ids.to(device)).logits.float() for each in (again, model)]
    assert (logits[0] - logits[1]).norm() < 0.02 * logits[1].norm()


def test_auto_device_map_spills_to_disk(
    make_checkpoint: Callable[..., Any], ids: Tensor, device: str, tmp_path: Path
) -> None:
    """Memory for one of two blocks: the other's tensors are read from disk at each use."""
    checkpoint = make_checkpoint("llama", shards=2)
    options = {"device_map": "auto", "offload_folder": tmp_path / "offload"}
    memory = {"cpu": "340KB"} if device == "cpu" else {0: "340KB", "cpu": "10GB"}
    model = load(checkpoint.folder, max_memory=memory, **options)
    places = {str(place) for place in model.hf_device_map.values()}
    assert places == ({"cpu", "disk"} if device == "cpu" else {"0", "cpu"})
    layers = [module for module in model.modules() if isinstance(module, CodebookLinear)]
    assert {layer.codes.device.type for layer in layers} == {device, "meta"}
    plain = load(checkpoint.folder)
    assert greedy(model, ids) == greedy(plain, ids)
    torch.testing.assert_close(model(ids.to(device)).logits.cpu(), plain(ids).logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in plain.state_dict().items())


@pytest.mark.cuda
def test_two_gpus(make_checkpoint: Callable[..., Any], ids: Tensor) -> None:
    """One block a GPU where there are two; with one, both on it, which is what auto then says."""
    checkpoint = make_checkpoint("llama")
    last = torch.cuda.device_count() - 1
    parts = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": last}
    model = load(checkpoint.folder, device_map=parts | {"model.norm": last, "lm_head": last})
    assert model.model.layers[1].mlp.up_proj.codes.get_device() == last
    assert greedy(model, ids) == greedy(load(checkpoint.folder), ids)


@pytest.mark.cuda
def test_the_engine_on_the_last_gpu(make_checkpoint: Callable[..., Any], ids: Tensor) -> None:
    """Captured and replayed on a GPU that is not the current one; with one GPU, on that."""
    folder, request = make_checkpoint("llama").folder, Request(12)
    places = ["cuda:0", f"cuda:{torch.cuda.device_count() - 1}"]
    answers = [list(Engine(load_model(folder, place), 64, 1).generate(ids.tolist(), request)) for place in places]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 12
