from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from codegemm_kernels import BadInput, NumericalError
from codegemm_runtime import load_model, load_tokenizer
from codegemm_runtime.engine.choice import find_engine
from codegemm_runtime.generation import Sampling, generate_text

TEMPLATE = "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}|{% endfor %}"


@pytest.fixture
def loaded(make_checkpoint: Callable[..., Any], write_tokenizer: Callable[..., None]) -> Any:
    checkpoint = make_checkpoint("qwen2")
    write_tokenizer(checkpoint.folder, TEMPLATE)
    model = load_model(checkpoint.folder, "cpu")
    model.generation_config.eos_token_id = None  # random weights may end a text at any time
    return model, load_tokenizer(checkpoint.folder), checkpoint


def test_streams_what_it_returns(loaded: Any) -> None:
    model, tokenizer, checkpoint = loaded
    pieces: list[str] = []
    result = generate_text(model, tokenizer, "some text", 20, write=pieces.append)
    assert result.tokens == 20
    assert "".join(pieces) == result.text
    assert 0 < result.time_to_first_token < result.seconds
    prompt = tokenizer("some text", return_tensors="pt").input_ids
    expected = checkpoint.dense.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert result.text == tokenizer.decode(expected[0, prompt.shape[1] :], skip_special_tokens=True)
    assert set(result.summary()) == {"text", "tokens", "seconds", "tokens_per_second", "time_to_first_token"}


def test_no_text_is_made_of_nan(loaded: Any) -> None:
    model, tokenizer, _ = loaded
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(NumericalError, match="logits are NaN"):
        generate_text(model, tokenizer, "some text", 4)


def test_sampling_follows_the_seed(loaded: Any) -> None:
    model, tokenizer, _ = loaded

    def text(seed: int, temperature: float = 1.5) -> str:
        return generate_text(model, tokenizer, "abc", 20, Sampling(temperature, 0.95, seed)).text

    assert text(1) == text(1) != text(2)
    assert text(1, 0.0) == text(2, 0.0)


@pytest.mark.parametrize(
    ("prompt", "tokens", "message"),
    [
        ("", 5, "prompt is empty"),
        ("x" * 64, 1, "64 tokens and 1 new .* holds 64"),
        ("x", 64, "holds 64"),
        ("x", 0, "at least 1"),
        (torch.zeros(1, 0, dtype=torch.long), 5, "no tokens"),
    ],
)
def test_what_cannot_be_generated(loaded: Any, prompt: Any, tokens: int, message: str) -> None:
    model, tokenizer, _ = loaded
    with pytest.raises(BadInput, match=message):
        generate_text(model, tokenizer, prompt, tokens)


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}])
def test_sampling_is_checked(options: dict[str, float]) -> None:
    with pytest.raises(BadInput):
        Sampling(**options)


def test_the_engine_is_used_where_it_can_and_transformers_elsewhere(
    loaded: Any, make_checkpoint: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer, _ = loaded
    first = find_engine(model, 40)
    assert first is not None and find_engine(model, 30) is first
    assert generate_text(model, tokenizer, "abc", 8).tokens == 8
    model.model.norm.weight.data = model.model.norm.weight.data.clone()
    assert find_engine(model, 30) not in (None, first)  # captured steps would read the old weights
    assert not capsys.readouterr().err
    model.generation_config.no_repeat_ngram_size = 2
    for _ in range(2):
        text = generate_text(model, tokenizer, "abc", 8, Sampling(repetition_penalty=1.2)).text
    model.generation_config.no_repeat_ngram_size = None
    with_penalty = generate_text(model, tokenizer, "abc", 8, Sampling(repetition_penalty=1.2)).text
    model.generation_config.repetition_penalty = 1.2
    assert generate_text(model, tokenizer, "abc", 8).text == with_penalty
    assert text
    assert capsys.readouterr().err.count("sets no_repeat_ngram_size in its generation_config") == 1
    opt = load_model(make_checkpoint("opt", name="opt").folder, "cpu")
    opt.generation_config.eos_token_id = None
    assert generate_text(opt, tokenizer, "abc", 8).tokens == 8
    assert "transformers: the model is of type opt" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["qwen2", "opt"])
def test_text_ends_before_a_stop_string(
    architecture: str, make_checkpoint: Callable[..., Any], write_tokenizer: Callable[..., None]
) -> None:
    checkpoint = make_checkpoint(architecture, name=f"stop-{architecture}")
    write_tokenizer(checkpoint.folder)
    model, tokenizer = load_model(checkpoint.folder, "cpu"), load_tokenizer(checkpoint.folder)
    model.generation_config.eos_token_id = None
    whole = generate_text(model, tokenizer, "some text", 20)
    stop = whole.text[6:9]
    pieces: list[str] = []
    result = generate_text(model, tokenizer, "some text", 20, write=pieces.append, stops=["never", stop])
    assert result.text == "".join(pieces) == whole.text[: whole.text.index(stop)]
    assert 0 < result.tokens < 20
