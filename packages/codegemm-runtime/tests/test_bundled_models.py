"""The engine on the trained model of the repository: same greedy tokens as transformers, dense and with codes."""

from __future__ import annotations

from pathlib import Path

import torch

from codegemm_kernels import CodebookScheme
from codegemm_runtime import load_model, load_tokenizer, replace_linears
from codegemm_runtime.engine import Engine, Request, TextStream
from codegemm_runtime.replace import restore_linears

FOLDER = Path(__file__).resolve().parents[3] / "models" / "pylm-4m"
TEXTS = ["import torch\n\n\ndef main(", "class Tree:\n    def __init__(self", "x", "for name, value in sorted(d"]
COUNT = 48


def code_like(dense: torch.Tensor, codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor) -> None:
    """Codes of the weights themselves: entries are vectors of the matrix, and a code is a nearest one's number."""
    scales.fill_(1)
    vectors = dense.view(-1, 4)
    entries = vectors[torch.linspace(0, len(vectors) - 1, 256).long()]
    codebooks.copy_(entries[None])
    nearest = torch.cdist(vectors, entries).argmin(-1).to(torch.uint8).view(dense.shape[0], -1, 4)
    codes.copy_(nearest.transpose(0, 1).contiguous().view(torch.int32)[None, ..., 0])


def test_greedy_tokens_are_those_of_transformers(device: str) -> None:
    model = load_model(FOLDER, device, torch.float32)
    tokenizer = load_tokenizer(FOLDER)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    weights = {
        name: module.weight for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    for coded in (False, True):
        if coded:
            names = {f"model.{name}": CodebookScheme.parse("m1v4g-1") for name in weights}
            replace_linears(model, names)
            for name, weight in weights.items():
                layer = model.model.get_submodule(name)
                code_like(weight.data, layer.codes, layer.codebooks, layer.scales)
        made: list[list[int]] = [[] for _ in prompts]
        for step in Engine(model, 256, batch=4).generate(prompts, Request(COUNT)):
            for sequence, token in step:
                made[sequence].append(token)
        restore_linears(model)
        for prompt, tokens in zip(prompts, made, strict=True):
            ids = torch.tensor([prompt], device=device)
            expected = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False, eos_token_id=None
            )
            assert tokens == expected[0, len(prompt) :].tolist()


def test_streamed_text_is_the_text_of_the_tokens() -> None:
    tokenizer = load_tokenizer(FOLDER)
    text = (FOLDER / "validation.txt").read_text()[:1500] + " — naïve ☃ 🎉 end"
    stream = TextStream(tokenizer)
    tokens = tokenizer(text).input_ids
    pieces = [stream.push(token) for token in tokens] + [stream.finish()]
    assert "".join(pieces) == stream.text == tokenizer.decode(tokens, skip_special_tokens=True)
    assert not any("�" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > len(tokens) / 2


def test_a_stop_string_is_never_seen() -> None:
    tokenizer = load_tokenizer(FOLDER)
    text = "alpha beta. gamma delta. epsilon"
    for stops, rest in ((["gamma del"], "alpha beta. "), (["nowhere", "."], "alpha beta"), (["delta. epsilox"], text)):
        stream = TextStream(tokenizer, stops)
        seen = ""
        for token in tokenizer(text).input_ids:
            seen += stream.push(token)
            assert not any(stop in seen for stop in stops)
            if stream.stopped:
                break
        assert seen + stream.finish() == stream.text == rest
        assert stream.stopped == (rest != text)
