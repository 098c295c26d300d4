"""A checkpoint folder in numbers: scheme, bits a weight, bytes, and what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from codegemm_eval.perplexity import Perplexity, perplexity
from codegemm_eval.text import load_text
from codegemm_eval.tokens import tokenize
from codegemm_eval.windows import Protocol

DENSE = "dense"


@dataclass(frozen=True)
class FolderScore:
    """One row of a comparison."""

    name: str
    scheme: str
    """`m2v8g128`, with `+` when some layers have another, or `dense`."""
    bits_per_weight: float
    """Stored bits a weight, codebooks and scales included: of the quantised layers, or the dtype's when dense."""
    bytes: int
    """Bytes of all stored tensors: the dense embedding and head are in it."""
    measured: dict[str, float]
    """Column of the table to value."""


def evaluate_folder(
    folder: Path | str,
    data: str,
    *,
    window: int = 2048,
    windows: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
) -> Perplexity:
    """Perplexity of the checkpoint in `folder`, dense or quantised, on the text `data` (see `text.load_text`).

    `device` None is the GPU when there is one, `dtype` "auto" the dtype of the checkpoint. Raises BadInput for a
    folder or text that cannot be used.
    """
    from codegemm_runtime.loading import load_model, load_tokenizer

    protocol = Protocol(window=window, windows=windows)
    tokens = tokenize(load_text(data), load_tokenizer(folder), protocol)
    return perplexity(load_model(folder, device=device, dtype=dtype), tokens.cut(protocol))


def score_folder(folder: Path | str, measured: dict[str, float], name: str | None = None) -> FolderScore:
    """The row of `folder`, of which `measured` is known, called `name` or like the folder; no weight is read."""
    from codegemm_runtime.inspection import inspect_folder

    found = inspect_folder(folder)
    bits = found.bits_per_weight
    if bits is None:
        bits = float(torch.finfo(getattr(torch, found.dtype or "float32")).bits)
    return FolderScore(name or Path(folder).resolve().name, found.scheme or DENSE, bits, found.total_bytes, measured)
