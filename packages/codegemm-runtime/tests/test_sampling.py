"""The choice of tokens against transformers' own logits processors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from codegemm_kernels import BadInput
from codegemm_runtime.engine.sampling import Sampler, Sampling

VOCABULARY, SLOTS = 50, 3


def sampler(device: str) -> Sampler:
    decoder: Any = SimpleNamespace(device=torch.device(device), vocabulary=VOCABULARY)
    return Sampler(decoder, SLOTS)


@pytest.mark.parametrize("options", [{"top_k": 7}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.5}, {"top_p": 1e-6}, {}])
def test_probabilities_are_those_of_transformers(options: dict[str, Any], device: str) -> None:
    torch.manual_seed(0)
    scores = 3 * torch.randn(SLOTS, VOCABULARY, device=device)
    sampling = Sampling(temperature=0.8, **options)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.8)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    expected = torch.softmax(warpers(None, scores), -1)
    chosen = sampler(device)
    chosen.begin(sampling)
    order = scores.argsort(dim=-1, descending=True) if sampling.kind.filtered else None
    made = chosen.probabilities(scores if order is None else scores.gather(-1, order), sampling.kind)
    made = made / made.sum(-1, keepdim=True)
    torch.testing.assert_close(made, expected if order is None else expected.gather(-1, order))


def test_tokens_come_in_proportion(device: str) -> None:
    chosen = sampler(device)
    chosen.begin(Sampling(temperature=1.0, top_k=3, seed=5))
    kind = Sampling(temperature=1.0, top_k=3).kind
    logits = torch.full((SLOTS, VOCABULARY), -9.0, device=device)
    logits[:, [4, 9, 30, 31]] = torch.tensor([0.6, 0.3, 0.1, 0.001], device=device).log()
    counts = torch.zeros(VOCABULARY)
    for _ in range(1000):
        counts += torch.bincount(chosen.choose(logits, kind).cpu(), minlength=VOCABULARY)
    # Four standard deviations of 3000 draws.
    torch.testing.assert_close(counts[[4, 9, 30]] / 3000, torch.tensor([0.6, 0.3, 0.1]), atol=0.036, rtol=0)
    assert counts.sum() == counts[[4, 9, 30]].sum()


def test_penalty_is_that_of_transformers_and_grows_with_the_text(device: str) -> None:
    chosen = sampler(device)
    sampling = Sampling(repetition_penalty=3.0)
    chosen.begin(sampling)
    logits = torch.linspace(-2, 2, VOCABULARY, device=device).repeat(2, 1)
    prompt = torch.tensor([49, 48], device=device)
    chosen.see(0, prompt)
    expected = RepetitionPenaltyLogitsProcessor(3.0)(prompt[None], logits[:1]).argmax(-1).item()
    assert chosen.choose(logits, sampling.kind).tolist() == [expected, 49]
    assert chosen.choose(logits, sampling.kind).tolist() == [46, 48]  # what was made counts too
    chosen.forget()
    assert chosen.choose(logits, sampling.kind).tolist() == [49, 49]


@pytest.mark.parametrize("options", [{"top_k": -1}, {"repetition_penalty": 0.0}])
def test_settings_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"must be"):
        Sampling(**options)
