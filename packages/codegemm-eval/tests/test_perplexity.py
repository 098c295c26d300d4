from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from codegemm_eval import perplexity as module
from codegemm_eval.perplexity import perplexity
from codegemm_eval.text import load_text
from codegemm_eval.tokens import tokenize
from codegemm_eval.windows import Protocol, Windows, cut_windows
from codegemm_kernels import BadInput, NumericalError

BUNDLED = Path(__file__).parents[3] / "models" / "pylm-4m"


class BigramModel(nn.Module):
    """Logits [vocabulary, vocabulary] that the next token has, looked up by the token before; counts its calls."""

    def __init__(self, logits: list[list[float]], rows_that_fit: int = 99) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.tensor(logits))
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
        self.rows_that_fit, self.batches = rows_that_fit, []

    @property
    def device(self) -> torch.device:
        return self.table.weight.device

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        self.batches.append(len(input_ids))
        if len(input_ids) > self.rows_that_fit:
            raise torch.OutOfMemoryError("too many rows")
        return SimpleNamespace(logits=self.table(input_ids))


LOG_3 = math.log(3)
BIGRAM = [[0.0, LOG_3], [LOG_3, 0.0]]
"""The other token has probability 3/4, the same one 1/4."""


def exact_nll(model, windows: torch.Tensor) -> float:
    """Mean over all predicted tokens, in float64, one window at a time."""
    exact = copy.deepcopy(model).double()
    losses = []
    for window in windows:
        with torch.no_grad():
            scores = exact(input_ids=window[None]).logits[0, :-1]
        losses.append(-scores.log_softmax(-1).gather(1, window[1:, None]))
    return float(torch.cat(losses).mean())


def random_tokens(count: int) -> torch.Tensor:
    return torch.randint(258, (count,), generator=torch.Generator().manual_seed(1))


def cut(tokens: torch.Tensor, window: int, **protocol) -> Windows:
    return cut_windows(tokens, Protocol(window=window, **protocol))


def test_a_bigram_model_worked_out_by_hand():
    # 0 1 1 0 | 1 0 1 0: of the predictions 1 after 0, 1 after 1, 0 after 1 and 0 1 0 after 1 0 1, one has 1/4
    result = perplexity(BigramModel(BIGRAM), cut(torch.tensor([0, 1, 1, 0, 1, 0, 1, 0, 0]), 4))
    expected = (5 * math.log(4 / 3) + math.log(4)) / 6
    assert result.tokens == 6
    assert result.nll == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-6)


def test_windows_of_different_lengths_count_by_their_tokens():
    # stride 1: 0 1 1 predicts two tokens, 1 1 0 and 1 0 0 one each: 3/4, 1/4, 3/4, 1/4
    result = perplexity(BigramModel(BIGRAM), cut(torch.tensor([0, 1, 1, 0, 0]), 3, stride=1), batch_size=3)
    assert result.tokens == 4
    assert result.nll == pytest.approx((2 * math.log(4 / 3) + 2 * math.log(4)) / 4, rel=1e-6)


def test_the_distance_from_a_teacher_worked_out_by_hand():
    # The model is uniform, and a tie goes to token 0; the teacher finds the other token most likely.
    windows = cut(torch.tensor([0, 1, 1, 0]), 4)
    model = BigramModel([[0.0, 0.0], [0.0, 0.0]])
    result = perplexity(model, windows, teacher=BigramModel(BIGRAM))
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert result.perplexity == pytest.approx(2, rel=1e-6)
    assert result.divergence == pytest.approx(divergence, rel=1e-6)
    assert result.top1_agreement == pytest.approx(2 / 3)  # after 1, which comes twice among the three contexts
    assert result.teacher_perplexity == pytest.approx(math.exp((2 * math.log(4 / 3) + math.log(4)) / 3), rel=1e-6)
    same = perplexity(model, windows, teacher=model)
    assert (same.divergence, same.top1_agreement) == (0, 1)


def test_what_the_teacher_rules_out_adds_nothing():
    certain = BigramModel([[-math.inf, 0.0], [0.0, -math.inf]])
    result = perplexity(BigramModel(BIGRAM), cut(torch.tensor([0, 1, 0, 1]), 4), teacher=certain)
    assert result.divergence == pytest.approx(math.log(4 / 3), rel=1e-6)


def test_the_bundled_model_as_a_float64_loop_has_it():
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    from transformers import AutoTokenizer

    protocol = Protocol(window=256, windows=3, spread=True)
    text = tokenize(load_text(str(BUNDLED / "validation.txt")), AutoTokenizer.from_pretrained(BUNDLED), protocol)
    windows = text.cut(protocol)
    result = perplexity(model, windows, batch_size=2)
    assert result.nll == pytest.approx(exact_nll(model, windows.inputs), rel=1e-6)  # fp32 against float64
    assert 3 < result.perplexity < 12


@pytest.mark.parametrize("batch_size", [None, 1, 2, 5])
def test_is_the_mean_over_predicted_tokens(model, batch_size):
    tokens = random_tokens(3 * 32 + 31)  # the last 31 tokens do not fill a window
    result = perplexity(model, cut(tokens, 32), batch_size=batch_size)
    expected = exact_nll(model, tokens[:96].view(3, 32))
    assert result.tokens == 3 * 31
    assert result.nll == pytest.approx(expected, rel=1e-6)
    assert (result.divergence, result.top1_agreement, result.teacher_perplexity) == (None, None, None)
    assert result.seconds > 0


def test_is_independent_of_the_softmax_chunk(model, monkeypatch):
    windows, teacher = cut(random_tokens(64), 32), copy.deepcopy(model).bfloat16()
    whole = perplexity(model, windows, teacher=teacher)
    monkeypatch.setattr(module, "MAX_SOFTMAX_ELEMENTS", 258 * 5)
    chunked = perplexity(model, windows, teacher=teacher)
    assert chunked.nll == pytest.approx(whole.nll, rel=1e-6)
    assert chunked.divergence == pytest.approx(whole.divergence, rel=1e-4)
    assert chunked.top1_agreement == whole.top1_agreement


def test_uniform_model_has_the_perplexity_of_its_vocabulary(model):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, cut(random_tokens(64), 16)).perplexity == pytest.approx(258, rel=1e-5)


def test_bfloat16_sums_in_float32(model):
    windows = cut(random_tokens(4 * 64), 64)
    expected = perplexity(model, windows).nll
    # bf16 log-softmax alone would be off by about 2^-8; the mean over 252 tokens in fp32 stays within 1e-3
    assert perplexity(model.bfloat16(), windows).nll == pytest.approx(expected, rel=1e-3)


def test_a_batch_that_does_not_fit_is_halved_for_good(capsys):
    tokens = torch.randint(2, (70,), generator=torch.Generator().manual_seed(1))
    expected = perplexity(BigramModel(BIGRAM), cut(tokens, 10))
    model = BigramModel(BIGRAM, rows_that_fit=2)
    assert perplexity(model, cut(tokens, 10), batch_size=6).nll == pytest.approx(expected.nll, rel=1e-6)
    assert model.batches == [6, 3, 1, 1, 1, 1, 1, 1, 1]
    assert "going on with 1 windows" in capsys.readouterr().err
    with pytest.raises(BadInput, match="a window of 10 tokens does not fit"):
        perplexity(BigramModel(BIGRAM, rows_that_fit=0), cut(tokens, 10))


@pytest.mark.parametrize(("gigabytes", "models", "batch"), [(120, 1, 8), (5, 1, 2), (5, 2, 1), (0, 1, 1)])
def test_a_gpu_takes_as_many_windows_as_half_of_its_memory_holds(monkeypatch, gigabytes, models, batch):
    # 8B: 128256 logits and 8 activations of 14336 a token are 0.995 GB for 2048 tokens in fp16
    sizes = SimpleNamespace(vocab_size=128256, intermediate_size=14336, hidden_size=4096)
    config = SimpleNamespace(get_text_config=lambda: sizes)
    model = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16, config=config)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (gigabytes * 10**9, 141 * 10**9))
    assert module._fitting_batch([model] * models, cut(torch.zeros(2048 * 20), 2048)) == batch


def test_restores_training_mode(model):
    model.train()
    perplexity(model, cut(random_tokens(32), 16))
    assert model.training


def test_nan_is_an_error_that_names_the_window(model):
    tokens = torch.full((48,), 3)
    tokens[20] = 7
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = math.nan
    with pytest.raises(NumericalError, match="windows 2 to 2"):
        perplexity(model, cut(tokens, 16))
    assert math.isfinite(perplexity(model, cut(tokens, 16, windows=1)).nll)


def test_windows_that_do_not_suit_the_model(model):
    with pytest.raises(BadInput, match="longer than the 256 positions"):
        perplexity(model, cut(random_tokens(600), 512))
    with pytest.raises(BadInput, match="token 258 and the model knows 258"):
        perplexity(model, cut(torch.full((16,), 258), 16))
    with pytest.raises(BadInput, match=r"\[1, 2\] tokens: take a teacher"):
        perplexity(BigramModel(BIGRAM), cut(torch.tensor([0, 0]), 2), teacher=BigramModel([[0.0]]))
    with pytest.raises(BadInput, match="batch of 0"):
        perplexity(model, cut(random_tokens(64), 16), batch_size=0)
