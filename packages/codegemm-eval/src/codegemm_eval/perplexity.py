"""Perplexity over windows, weighted by tokens, and the distance from a teacher's predictions."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from codegemm_eval.windows import Windows
from codegemm_kernels import BadInput, NumericalError

MAX_SOFTMAX_ELEMENTS = 1 << 24
"""Logits turned to fp32 at once: 64 MiB. A 128k vocabulary at 2048 tokens would otherwise take 1 GiB a window."""
BATCH_TOKENS = 1 << 14
"""Tokens in one forward pass on a GPU. Rebuilding a 4096 x 4096 weight takes 14 us on an H200 (docs/log.md), a product
with 300 tokens at 700 TFLOP/s as long: 2 % of this many."""


@dataclass(frozen=True)
class Perplexity:
    """What a model thinks of a text."""

    perplexity: float
    """exp(nll)."""
    nll: float
    """Mean negative log-likelihood of a predicted token, in nats."""
    tokens: int
    """Predicted tokens."""
    seconds: float
    """Wall-clock time of the forward passes, the teacher's included."""
    divergence: float | None = None
    """Mean over predicted tokens of KL(teacher || model), in nats; None without a teacher."""
    top1_agreement: float | None = None
    """Share of predicted tokens where model and teacher find the same token most likely."""
    teacher_perplexity: float | None = None
    """The teacher's perplexity on the same tokens."""


def perplexity(
    model: Any,
    windows: Windows,
    *,
    teacher: Any = None,
    batch_size: int | None = None,
) -> Perplexity:
    """Perplexity of the causal `model` on `windows`, and how far it is from the model `teacher`.

    Log-softmax is in fp32 whatever the dtype of the model, sums are in float64. Without `batch_size` a GPU takes as
    many windows at once as fit, a CPU one; a batch that does not fit in memory is halved, and so are those after it.

    Raises BadInput when the windows do not suit the model or one alone does not fit, NumericalError when the loss is
    not finite.
    """
    if batch_size is not None and batch_size < 1:
        raise BadInput(f"a batch of {batch_size} windows is none: use 1 or more")
    models = [model] if teacher is None else [model, teacher]
    for each in models:
        _check_model(each, windows)
    vocabularies = {each.get_input_embeddings().num_embeddings for each in models}
    if len(vocabularies) > 1:
        raise BadInput(f"model and teacher know {sorted(vocabularies)} tokens: take a teacher with the same vocabulary")
    modes = [each.training for each in models]
    for each in models:
        each.eval()
    sums, start = _Sums(), time.perf_counter()
    try:
        with torch.inference_mode():
            _run(models, windows, batch_size or _fitting_batch(models, windows), sums)
    finally:
        for each, mode in zip(models, modes, strict=True):
            each.train(mode)
    return sums.result(time.perf_counter() - start, with_teacher=teacher is not None)


@dataclass
class _Sums:
    """Totals over predicted tokens."""

    nll: float = 0.0
    teacher_nll: float = 0.0
    divergence: float = 0.0
    agreed: float = 0.0
    predicted: int = 0

    def add(self, totals: list[float], predicted: int) -> None:
        self.nll += totals[0]
        self.teacher_nll += totals[1]
        self.divergence += totals[2]
        self.agreed += totals[3]
        self.predicted += predicted

    def result(self, seconds: float, *, with_teacher: bool) -> Perplexity:
        count = self.predicted
        plain = Perplexity(_exp(self.nll / count), self.nll / count, count, seconds)
        if not with_teacher:
            return plain
        compared = (self.divergence / count, self.agreed / count, _exp(self.teacher_nll / count))
        return Perplexity(plain.perplexity, plain.nll, count, seconds, *compared)


def _run(models: list[Any], windows: Windows, batch: int, sums: _Sums) -> None:
    """Add all windows to `sums`, in batches that get smaller when memory ends."""
    done, count = 0, len(windows.inputs)
    with tqdm(total=count, desc="perplexity", unit="window", delay=1) as bar:
        while done < count:
            inputs, predicted = windows.inputs[done : done + batch], windows.predicted[done : done + batch]
            totals = _try_batch(models, inputs, predicted)
            if totals is None:
                if len(inputs) == 1:
                    raise BadInput(
                        f"a window of {inputs.shape[1]} tokens does not fit in the memory of {models[0].device}: "
                        "use a smaller --window or --device auto"
                    )
                batch = len(inputs) // 2
                print(f"out of memory: going on with {batch} windows at a time", file=sys.stderr)
                torch.cuda.empty_cache()
                continue
            if not all(map(math.isfinite, totals)):
                raise NumericalError(
                    f"the loss in windows {done + 1} to {done + len(inputs)} is {totals[0]}: the weights hold NaN or "
                    "inf, or the dtype overflows; check the checkpoint or use float32"
                )
            done += len(inputs)
            sums.add(totals, int(predicted.sum()))
            bar.set_postfix(ppl=f"{_exp(sums.nll / sums.predicted):.3f}", refresh=False)  # it would ignore the delay
            bar.update(len(inputs))


def _try_batch(models: list[Any], inputs: Tensor, predicted: Tensor) -> list[float] | None:
    """The four totals of a batch, None when memory did not do."""
    try:
        tokens = inputs.to(models[0].device)
        logits = [model(input_ids=tokens.to(model.device), use_cache=False).logits for model in models]
        total = torch.zeros(4, dtype=torch.float64, device=logits[0].device)
        for row, last in enumerate(predicted.tolist()):
            total += _totals([each[row, -last - 1 : -1] for each in logits], tokens[row, -last:].to(total.device))
        return total.tolist()
    except torch.OutOfMemoryError:
        return None


def _totals(logits: list[Tensor], targets: Tensor) -> Tensor:
    """float64 [4]: nll, teacher's nll, divergence, agreements. `logits` are one or two [T, V], `targets` [T]."""
    total = torch.zeros(4, dtype=torch.float64, device=targets.device)
    rows = max(1, MAX_SOFTMAX_ELEMENTS // logits[0].shape[-1])
    for at in range(0, len(targets), rows):
        wanted = targets[at : at + rows, None]
        ours = logits[0][at : at + rows].float().log_softmax(-1)
        total[0] -= ours.gather(1, wanted).double().sum()
        if len(logits) == 1:
            continue
        theirs = logits[1][at : at + rows].to(ours.device).float().log_softmax(-1)
        total[1] -= theirs.gather(1, wanted).double().sum()
        # A token that the teacher rules out adds nothing, whatever the model says: 0 * log 0.
        terms = torch.where(theirs.isneginf(), 0.0, theirs.exp() * (theirs - ours))
        total[2] += terms.sum(-1).double().sum()
        total[3] += (ours.argmax(-1) == theirs.argmax(-1)).sum()
    return total


def _fitting_batch(models: list[Any], windows: Windows) -> int:
    """Windows for one pass: the logits and the widest activations of BATCH_TOKENS, in half of the free memory."""
    if models[0].device.type != "cuda":
        return 1
    window = windows.inputs.shape[1]
    config = models[0].config.get_text_config()
    widest: int = max(getattr(config, name, None) or 0 for name in ("intermediate_size", "hidden_size"))
    bytes_a_token: int = models[0].dtype.itemsize * (len(models) * config.vocab_size + 8 * widest)
    free: int = torch.cuda.mem_get_info(models[0].device)[0]
    return max(1, min(BATCH_TOKENS // window, free // (2 * window * bytes_a_token)))


def _check_model(model: Any, windows: Windows) -> None:
    window, largest = windows.inputs.shape[1], int(windows.inputs.max())
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and window > context:
        raise BadInput(f"a window of {window} tokens is longer than the {context} positions of the model: use less")
    vocabulary = model.get_input_embeddings().num_embeddings
    if largest >= vocabulary:
        raise BadInput(
            f"the text holds token {largest} and the model knows {vocabulary} tokens: "
            "the tokenizer belongs to another model"
        )


def _exp(nll: float) -> float:
    """exp, with inf where float64 ends (a loss of more than 709 nats)."""
    return math.exp(nll) if nll < 709 else math.inf
