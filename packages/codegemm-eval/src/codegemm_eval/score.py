"""A checkpoint folder in numbers: scheme, bits a weight, bytes, perplexity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from codegemm_eval.perplexity import Perplexity, perplexity
from codegemm_eval.text import read_tokens

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
    perplexity: float


def evaluate_folder(
    folder: Path | str,
    data: str,
    *,
    window: int = 2048,
    windows: int | None = None,
    batch_size: int = 1,
    device: str | None = None,
    dtype: str = "auto",
) -> Perplexity:
    """Perplexity of the checkpoint in `folder`, dense or quantised, on the text `data` (see `text.read_text`).

    `device` None is the GPU when there is one, `dtype` "auto" the dtype of the checkpoint. Raises BadInput for a
    folder or text that cannot be used.
    """
    from codegemm_runtime.loading import load_model, load_tokenizer

    tokens = read_tokens(data, load_tokenizer(folder))
    model = load_model(folder, device=device, dtype=dtype)
    return perplexity(model, tokens, window=window, windows=windows, batch_size=batch_size)


def score_folder(folder: Path | str, measured: Perplexity) -> FolderScore:
    """The row of `folder`, whose perplexity was `measured`; no weight is read."""
    from codegemm_runtime.inspection import inspect_folder

    found = inspect_folder(folder)
    bits = found.bits_per_weight
    if bits is None:
        bits = float(torch.finfo(getattr(torch, found.dtype or "float32")).bits)
    return FolderScore(Path(folder).name, found.scheme or DENSE, bits, found.total_bytes, measured.perplexity)
