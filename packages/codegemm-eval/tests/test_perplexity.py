from __future__ import annotations

import math

import pytest
import torch

from codegemm_eval import perplexity as module
from codegemm_eval.perplexity import cut_windows, perplexity
from codegemm_kernels import BadInput, NumericalError


def exact_nll(model, windows: torch.Tensor) -> float:
    """Mean over all predicted tokens, in float64, one window at a time."""
    losses = []
    for window in windows:
        with torch.no_grad():
            scores = model.double()(input_ids=window[None]).logits[0, :-1]
        losses.append(-scores.log_softmax(-1).gather(1, window[1:, None]))
    return float(torch.cat(losses).mean())


def random_tokens(count: int) -> torch.Tensor:
    return torch.randint(258, (count,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_is_the_mean_over_predicted_tokens(model, batch_size):
    tokens = random_tokens(3 * 32 + 31)  # the last 31 tokens do not fill a window
    result = perplexity(model, tokens, window=32, batch_size=batch_size)
    expected = exact_nll(model, tokens[:96].view(3, 32))
    assert result.tokens == 3 * 31
    assert result.nll == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-6)
    assert result.seconds > 0


def test_is_independent_of_the_softmax_chunk(model, monkeypatch):
    tokens = random_tokens(64)
    whole = perplexity(model, tokens, window=32)
    monkeypatch.setattr(module, "MAX_SOFTMAX_ELEMENTS", 258 * 5)
    assert perplexity(model, tokens, window=32).nll == pytest.approx(whole.nll, rel=1e-6)


def test_an_exact_last_window_counts_and_windows_limits():
    assert cut_windows(torch.arange(30), 10, None).tolist()[-1] == list(range(20, 30))
    assert cut_windows(torch.arange(29), 10, None).shape == (2, 10)
    assert cut_windows(torch.arange(29, dtype=torch.int32), 10, 1).tolist() == [list(range(10))]
    assert cut_windows(torch.arange(29), 10, 99).shape == (2, 10)


def test_uniform_model_has_the_perplexity_of_its_vocabulary(model):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, random_tokens(64), window=16).perplexity == pytest.approx(258, rel=1e-5)


def test_bfloat16_sums_in_float32(model):
    tokens = random_tokens(4 * 64)
    expected = perplexity(model, tokens, window=64).nll
    # bf16 log-softmax alone would be off by about 2^-8; the mean over 252 tokens in fp32 stays within 1e-3
    assert perplexity(model.bfloat16(), tokens, window=64).nll == pytest.approx(expected, rel=1e-3)


def test_restores_training_mode(model):
    model.train()
    perplexity(model, random_tokens(32), window=16)
    assert model.training


def test_nan_is_an_error_that_names_the_window(model):
    tokens = torch.full((48,), 3)
    tokens[20] = 7
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = math.nan
    with pytest.raises(NumericalError, match="windows 2 to 2"):
        perplexity(model, tokens, window=16)
    assert math.isfinite(perplexity(model, tokens, window=16, windows=1).nll)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (15, {"window": 16}, "15 tokens and one window needs 16"),
        (0, {"window": 16}, "0 tokens and one window needs 16"),
        (64, {"window": 1}, "window of 1"),
        (64, {"window": 16, "windows": 0}, "0 windows"),
        (64, {"window": 16, "batch_size": 0}, "batch of 0"),
        (600, {"window": 512}, "longer than the 256 positions"),
    ],
)
def test_bad_input_says_what_to_do(model, tokens, options, message):
    with pytest.raises(BadInput, match=message):
        perplexity(model, random_tokens(tokens), **options)


def test_a_foreign_tokenizer_is_refused(model):
    with pytest.raises(BadInput, match="token 258 and the model knows 258"):
        perplexity(model, torch.full((16,), 258), window=16)
