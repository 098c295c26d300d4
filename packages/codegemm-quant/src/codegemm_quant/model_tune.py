"""Tuning the whole quantised model against the dense one, after all blocks are done. Codes stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from codegemm_quant.blocks import BlockCall
from codegemm_quant.frame import ModelFrame
from codegemm_quant.hidden_states import HiddenStates
from codegemm_quant.tuning import TunePlan, TuneResult, tune


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher || student), logits [batch, tokens, vocabulary], computed in fp32."""
    expected = torch.log_softmax(teacher.float(), -1)
    actual = torch.log_softmax(student.float(), -1)
    return (expected.exp() * (expected - actual)).sum(-1).mean()


def tune_model(
    frame: ModelFrame,
    blocks: nn.ModuleList,
    calls: list[BlockCall],
    inputs: HiddenStates,
    targets: HiddenStates,
    plan: TunePlan,
) -> TuneResult:
    """Lower the divergence of the quantised blocks' predictions from the dense model's.

    inputs: what the frame gives the first block; targets: what the last dense block gave the frame; calls: for
    `plan.windows` windows at once.
    """

    def loss(hidden: Tensor, target: Tensor) -> Tensor:
        for block, call in zip(blocks, calls, strict=True):
            hidden = call.run(block, hidden)
        with torch.no_grad():
            expected = frame.logits(target)
        return divergence(frame.logits(hidden), expected)

    def fetch(order: Sequence[int]) -> Iterator[tuple[Tensor, ...]]:
        return zip(inputs.walk(order), targets.walk(order), strict=True)

    return tune(blocks, len(inputs), fetch, loss, plan)
