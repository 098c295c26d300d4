"""Tuning the whole quantised model against the dense one, after all blocks are done. Codes stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from codegemm_quant.tuning import TunePlan, TuneResult, tune

MAX_LOGITS = 1 << 27
"""Logits computed at once; longer batches are taken window by window (512 MB in fp32)."""


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher || student), logits [batch, tokens, vocabulary], computed in fp32."""
    expected = torch.log_softmax(teacher.float(), -1)
    actual = torch.log_softmax(student.float(), -1)
    return (expected.exp() * (expected - actual)).sum(-1).mean()


def tune_model(student: Any, teacher: Any, batches: list[Tensor], plan: TunePlan) -> TuneResult:
    """Lower the divergence of the student's predictions from the teacher's on token ids [batch, tokens]."""
    window = batches[0].shape[1] * int(student.config.get_text_config().vocab_size)
    share = max(1, MAX_LOGITS // window)

    def piece(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            expected = teacher(input_ids=tokens, use_cache=False).logits
        return divergence(student(input_ids=tokens, use_cache=False).logits, expected)

    def loss(index: int) -> Tensor:
        parts = [piece(tokens).detach() * len(tokens) for tokens in batches[index].split(share)]
        return torch.stack(parts).sum() / len(batches[index])

    def gradients(index: int) -> Tensor:
        total = torch.zeros((), device=batches[index].device)
        for tokens in batches[index].split(share):
            part = piece(tokens) * (len(tokens) / len(batches[index]))
            part.backward()
            total += part.detach()
        return total

    return tune(student, len(batches), gradients, loss, plan)
