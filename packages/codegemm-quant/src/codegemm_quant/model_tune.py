"""Tuning the whole quantised model against the dense one, after all blocks are done. Codes stay.

A few hundred windows are soon known by heart, so every pass is over another version of them (`resampling`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from codegemm_quant.blocks import BlockCall
from codegemm_quant.frame import ModelFrame
from codegemm_quant.hidden_states import HiddenStates
from codegemm_quant.resampling import chances, predicted, resampled
from codegemm_quant.tuning import TunePlan, TuneResult, tune

VERSIONS = 4
"""Versions of the windows, the text itself included."""
RESAMPLED = 0.5
"""Share of the tokens that are replaced in the others."""


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher || student), logits [batch, tokens, vocabulary], computed in fp32."""
    expected = torch.log_softmax(teacher.float(), -1)
    actual = torch.log_softmax(student.float(), -1)
    return (expected.exp() * (expected - actual)).sum(-1).mean()


def tune_model(
    frame: ModelFrame,
    blocks: nn.ModuleList,
    calls: list[BlockCall],
    windows: Sequence[Tensor],
    targets: HiddenStates,
    plan: TunePlan,
) -> TuneResult:
    """Lower the divergence of the quantised model's predictions from the dense one's: blocks, embedding and head.

    windows: token ids of each batch, version after version; targets: what the last dense block gave the frame for
    them; calls: for `plan.windows` windows at once.
    """

    def loss(tokens: Tensor, target: Tensor) -> Tensor:
        hidden = frame.inputs(tokens).to(target.dtype)
        for block, call in zip(blocks, calls, strict=True):
            hidden = call.run(block, hidden)
        return divergence(frame.logits(hidden), frame.dense_logits(target))

    def fetch(order: Sequence[int]) -> Iterator[tuple[Tensor, ...]]:
        return zip((windows[i] for i in order), targets.walk(order), strict=True)

    module = nn.ModuleList([frame.train(), blocks])
    return tune(module, len(windows) // plan.versions, fetch, loss, plan)


@torch.no_grad()
def resample_windows(
    frame: ModelFrame, windows: Sequence[Tensor], targets: HiddenStates, at_once: int, seeds: Sequence[int]
) -> list[Tensor]:
    """Another version of every batch of windows, its numbers of chance from one seed for each window.

    targets: what the last dense block gave the frame for them.
    """
    fresh = []
    for tokens, target, start in zip(windows, targets, range(0, len(seeds), len(windows[0])), strict=True):
        which, where = chances(list(seeds[start : start + len(tokens)]), tokens.shape[1]).to(target.device).unbind(1)
        pieces = zip(target.split(at_once), which.split(at_once), strict=True)
        guesses = [predicted(frame.logits(some).flatten(0, 1), chance.flatten()) for some, chance in pieces]
        fresh.append(resampled(tokens, torch.cat(guesses).view_as(tokens), where, RESAMPLED))
    return fresh
