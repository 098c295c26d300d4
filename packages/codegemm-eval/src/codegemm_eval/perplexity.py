"""Perplexity over non-overlapping windows, weighted by tokens."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from codegemm_kernels import BadInput, NumericalError

MAX_SOFTMAX_ELEMENTS = 1 << 24
"""Logits turned to fp32 at once: 64 MiB. A 128k vocabulary at 2048 tokens would otherwise take 1 GiB a window."""


@dataclass(frozen=True)
class Perplexity:
    """What a model thinks of a text."""

    perplexity: float
    """exp(nll)."""
    nll: float
    """Mean negative log-likelihood of a predicted token, in nats."""
    tokens: int
    """Predicted tokens: window - 1 in each window."""
    seconds: float
    """Wall-clock time of the forward passes."""


def perplexity(
    model: Any,
    tokens: torch.Tensor,
    *,
    window: int = 2048,
    windows: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of the causal `model` on `tokens` [T] (integers, any device).

    The text is cut into floor(T / window) windows that do not overlap (at most `windows` of them); what does not
    fill a window is dropped. Each window stands alone and its first token is context only. Log-softmax is in fp32
    whatever the dtype of the model, the sum in float64.

    Raises BadInput when the text has no full window or the window does not suit the model, NumericalError when
    the loss is not finite.
    """
    if batch_size < 1:
        raise BadInput(f"a batch of {batch_size} windows is none: use 1 or more")
    batches = torch.split(cut_windows(tokens, window, windows), batch_size)
    _check_model(model, batches, window)
    was_training = model.training
    model.eval()
    total, predicted, start = 0.0, 0, time.perf_counter()
    bar = tqdm(total=sum(map(len, batches)), desc="perplexity", unit="window", disable=not progress, delay=1)
    try:
        with bar, torch.inference_mode():
            for batch in batches:
                inputs = batch.to(model.device)
                total += _sum_nll(model(input_ids=inputs, use_cache=False).logits, inputs)
                predicted += batch.numel() - len(batch)
                if not math.isfinite(total):
                    last = bar.n + len(batch)
                    raise NumericalError(
                        f"the loss in windows {bar.n + 1} to {last} is {total}: the weights hold NaN or inf, "
                        "or the dtype overflows; check the checkpoint or use float32"
                    )
                bar.set_postfix(ppl=f"{_exp(total / predicted):.3f}", refresh=False)  # a refresh would ignore the delay
                bar.update(len(batch))
    finally:
        model.train(was_training)
    nll = total / predicted
    return Perplexity(_exp(nll), nll, predicted, time.perf_counter() - start)


def cut_windows(tokens: torch.Tensor, window: int, windows: int | None) -> torch.Tensor:
    """Cut `tokens` [T] into int64 [n, window], n = floor(T / window) or `windows` if that is less.

    Raises BadInput, saying how many tokens there are and are needed, when there is no full window.
    """
    if window < 2:
        raise BadInput(f"a window of {window} tokens predicts nothing: use 2 or more")
    if windows is not None and windows < 1:
        raise BadInput(f"{windows} windows leave nothing to evaluate: use 1 or more")
    count = tokens.numel() // window
    if count == 0:
        raise BadInput(
            f"the text has {tokens.numel()} tokens and one window needs {window}: give more text or a smaller window"
        )
    count = count if windows is None else min(count, windows)
    return tokens[: count * window].to(torch.int64).reshape(count, window)


def _check_model(model: Any, batches: tuple[torch.Tensor, ...], window: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and window > context:
        raise BadInput(f"a window of {window} tokens is longer than the {context} positions of the model: use less")
    vocabulary = model.get_input_embeddings().num_embeddings
    largest = max(int(batch.max()) for batch in batches)
    if largest >= vocabulary:
        raise BadInput(
            f"the text holds token {largest} and the model knows {vocabulary} tokens: "
            "the tokenizer belongs to another model"
        )


def _sum_nll(logits: torch.Tensor, inputs: torch.Tensor) -> float:
    """Summed negative log-likelihood of `inputs` [B, T] after the first token, given `logits` [B, T, V]."""
    rows = max(1, MAX_SOFTMAX_ELEMENTS // logits.shape[-1])
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for scores, targets in zip(logits, inputs.to(logits.device), strict=True):
        for some, wanted in zip(scores[:-1].split(rows), targets[1:].split(rows), strict=True):
            total += torch.nn.functional.cross_entropy(some.float(), wanted, reduction="sum").double()
    return float(total)


def _exp(nll: float) -> float:
    """exp, with inf where float64 ends (a loss of more than 709 nats)."""
    return math.exp(nll) if nll < 709 else math.inf
