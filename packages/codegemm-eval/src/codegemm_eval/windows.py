"""How a text is cut into windows, which of them count, and which of their tokens are predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from codegemm_kernels import BadInput

Bos = Literal["auto", "text", "window", "none"]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a text is measured; published numbers use windows of 2048 tokens that do not overlap."""

    window: int = 2048
    """Tokens of a window."""
    stride: int | None = None
    """Tokens between the starts of windows. Less than the window: they overlap, and each but the first predicts only
    its last `stride` tokens. Default: the window."""
    windows: int | None = None
    """At most this many windows, the first ones of the text; all of them if not given."""
    spread: bool = False
    """Take the windows evenly spaced over the text instead of its first ones."""
    bos: Bos = "auto"
    """Where the token of a beginning stands: at the start of the text, of every window (instead of the token there), or
    nowhere. auto: every window for Gemma, which cannot do without, and otherwise the text if the tokenizer says so."""

    def __post_init__(self) -> None:
        if self.window < 2:
            raise BadInput(f"a window of {self.window} tokens predicts nothing: use 2 or more")
        if self.stride is not None and not 1 <= self.stride <= self.window:
            raise BadInput(f"a stride of {self.stride} must lie between 1 and the window, {self.window}")
        if self.windows is not None and self.windows < 1:
            raise BadInput(f"{self.windows} windows leave nothing to evaluate: use 1 or more")
        if self.spread and self.windows is None:
            raise BadInput("spread says which windows are taken, so it needs their number: give --windows too")


@dataclass(frozen=True)
class Windows:
    """Windows of a text, each of which stands alone."""

    inputs: Tensor
    """int64 [n, window]."""
    predicted: Tensor
    """int64 [n]: how many tokens at the end of each window are predicted; those before are context."""
    available: int
    """Full windows in the text."""


def cut_windows(tokens: Tensor, protocol: Protocol, bos: int | None = None) -> Windows:
    """Cut `tokens` [T] into windows. The last full one counts; what does not fill a window is dropped.

    `bos` is the token that stands in the first place of every window, if any. Raises BadInput, saying how many tokens
    there are and are needed, when there is no full window.
    """
    window, stride = protocol.window, protocol.stride or protocol.window
    if tokens.numel() < window:
        raise BadInput(
            f"the text has {tokens.numel()} tokens and one window needs {window}: give more text or a smaller window"
        )
    every = tokens.unfold(0, window, stride)
    available = len(every)
    wanted = available if protocol.windows is None else min(available, protocol.windows)
    chosen = torch.arange(wanted)
    if protocol.spread and wanted > 1:
        chosen = torch.linspace(0, available - 1, wanted, dtype=torch.float64).round().long()
    inputs = every[chosen].to(torch.int64)
    if bos is not None:
        inputs[:, 0] = bos
    predicted = torch.where(chosen == 0, window - 1, min(stride, window - 1))
    return Windows(inputs, predicted, available)
