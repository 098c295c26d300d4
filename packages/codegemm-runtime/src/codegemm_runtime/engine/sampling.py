"""How the next token is chosen, on the device of the logits and without a sync."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from codegemm_kernels.errors import BadInput
from codegemm_runtime.engine.decoder import Decoder
from codegemm_runtime.engine.fused import first_largest


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the most likely token; higher is more varied."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability."""
    seed: int = 0
    """Seed of the sampling."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0 for all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that occurred already, in the prompt too, become less likely."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise BadInput(f"the temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top-p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise BadInput(f"top-k must be 0 (all tokens) or more, not {self.top_k}")
        if not 0 < self.repetition_penalty < math.inf:
            raise BadInput(f"the repetition penalty must be above 0, not {self.repetition_penalty}")
        if not -(2**63) <= self.seed < 2**63:
            raise BadInput(f"the seed must have at most 63 bits, not {self.seed}")

    @property
    def kind(self) -> Kind:
        """The steps that this sampling needs."""
        sampled = self.temperature > 0
        return Kind(sampled, sampled and (self.top_p < 1 or self.top_k > 0), self.repetition_penalty != 1)


@dataclass(frozen=True)
class Kind:
    """What a captured step does after the logits; its numbers are read from the device, so requests share it."""

    sampled: bool = False
    filtered: bool = False
    """Sorts the vocabulary, for top-k and top-p."""
    penalised: bool = False


class Sampler:
    """Chooses tokens of up to `slots` sequences; its settings and noise live on the device."""

    def __init__(self, decoder: Decoder, slots: int) -> None:
        device = decoder.device
        self.generator = torch.Generator(device)
        self.seen = torch.zeros(slots, decoder.vocabulary, dtype=torch.bool, device=device)
        self._settings = {
            name: torch.ones((), device=device) for name in ("temperature", "top_p", "top_k", "repetition_penalty")
        }

    def begin(self, sampling: Sampling) -> None:
        """Take over the settings of a request."""
        self.generator.manual_seed(sampling.seed)
        for name, value in self._settings.items():
            value.fill_(getattr(sampling, name))

    def forget(self) -> None:
        """Forget what was seen: the slots get other sequences."""
        self.seen.zero_()

    def see(self, slot: int, tokens: Tensor) -> None:
        """Note the tokens of a prompt."""
        self.seen[slot, tokens] = True

    def choose(self, logits: Tensor, kind: Kind) -> Tensor:
        """Tokens [batch] for logits [batch, vocabulary] of slots 0 .. batch - 1."""
        if not kind.sampled and not kind.penalised:
            return first_largest(logits)
        scores = logits.float()
        seen = self.seen[: logits.shape[0]]
        if kind.penalised:
            penalty = self._settings["repetition_penalty"]
            scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        if not kind.sampled:
            tokens = first_largest(scores)
        else:
            order = None
            if kind.filtered:
                scores, order = scores.sort(dim=-1, descending=True)
            drawn = self._draw(self.probabilities(scores, kind))
            tokens = drawn if order is None else order.gather(-1, drawn[:, None])[:, 0]
        if kind.penalised:
            seen.scatter_(-1, tokens[:, None], True)
        return tokens

    def probabilities(self, scores: Tensor, kind: Kind) -> Tensor:
        """Probabilities [batch, vocabulary] of scores; a filtered kind has them sorted, highest first."""
        scores = scores / self._settings["temperature"]
        if not kind.filtered:
            return torch.softmax(scores, dim=-1)
        rank = torch.arange(scores.shape[-1], device=scores.device)
        top_k = self._settings["top_k"]
        scores = scores.masked_fill((rank >= top_k) & (top_k > 0), -torch.inf)
        probabilities = torch.softmax(scores, dim=-1)
        before = probabilities.cumsum(-1) - probabilities
        # The first stays whatever rounding did to the sums.
        kept = (before < self._settings["top_p"]) | (rank == 0)
        return torch.where(kept, probabilities, 0.0)

    def _draw(self, probabilities: Tensor) -> Tensor:
        """One index [batch] a row in proportion: the largest p / e with e exponential, which needs no total."""
        noise = torch.empty_like(probabilities).exponential_(generator=self.generator)
        return first_largest(probabilities / noise)
