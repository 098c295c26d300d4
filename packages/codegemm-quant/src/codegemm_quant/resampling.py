"""Fresh versions of a text: some of its tokens replaced by what the dense model might have said in their place.

A small text is learnt by heart within a few passes: what is gained on it is then lost on others. In a version of it
that is new in every pass nothing can be remembered, while predictions of the dense model, the only thing that is learnt
from the text, are as good a lesson there.
"""

from __future__ import annotations

import torch
from torch import Tensor


def chances(seeds: list[int], length: int) -> Tensor:
    """Uniform numbers [windows, 2, length], those of a window decided by its seed alone."""
    return torch.stack([torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def predicted(logits: Tensor, chance: Tensor) -> Tensor:
    """One token for each row of logits [n, vocabulary], drawn by the uniform number of that row, [n]."""
    shares = logits.float().softmax(-1).cumsum(-1)
    return torch.searchsorted(shares, (chance * shares[:, -1])[:, None])[:, 0].clamp_max(logits.shape[1] - 1)


def resampled(tokens: Tensor, guesses: Tensor, chance: Tensor, share: float) -> Tensor:
    """Token ids [windows, length] with a share of them replaced, where chance [windows, length] is below it.

    guesses [windows, length] are tokens that may follow each token; a window's first token stays.
    """
    replaced = chance[:, 1:] < share
    return torch.cat([tokens[:, :1], torch.where(replaced, guesses[:, :-1], tokens[:, 1:])], dim=1)
