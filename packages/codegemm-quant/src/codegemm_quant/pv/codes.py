"""The V step: which vectors of a matrix get new codes, and which codes (PV-tuning, 2405.14852)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codegemm_quant.pv.processes import Processes
from codegemm_quant.weight import CodebookWeight

MAX_SCORES = 1 << 26
"""Scores of candidate entries held at once: 256 MB."""


@dataclass(frozen=True)
class CodeSearch:
    """How the codes of a matrix are searched in one step."""

    order: tuple[int, ...]
    """The codebooks in the order of the search, each once."""
    beam_size: int
    """Hypotheses kept between codebooks."""
    trust_ratio: float | None
    """Largest norm of the change relative to the norm of the matrix; one vector may always change."""


def update_codes(
    weight: CodebookWeight, codes: Tensor, latent: Tensor, budget: int, search: CodeSearch, processes: Processes
) -> Tensor:
    """Re-encode the vectors that are furthest from `latent` [n, K]; codes uint8 [n, J, m] change in place.

    weight holds the rows that are here, as they are now, `codes` in it being a copy. The `budget` vectors with the
    largest distance |latent - weight|, over the rows of all processes, are encoded anew; the distance of none grows.
    With a trust ratio only the longest run of the changes in that order is kept whose joint norm stays below
    trust_ratio * |weight|, and one more. Returns how many vectors changed here, as a tensor: nothing waits for the GPU
    when there is one process.
    """
    vectors, v, m = weight.codes.shape[1], weight.codebooks.shape[2], weight.codebooks.shape[0]
    current = weight.dequantize().view(-1, v)
    wanted = latent.reshape(-1, v)
    places, score = _furthest((wanted - current).square().sum(1), budget, processes)
    flat = codes.view(-1, m)
    before = flat[places]
    scales = weight.scales.flatten()[places // (vectors // weight.scales.shape[1])]
    after = encode(wanted[places], scales, before.long(), weight.codebooks, search).to(torch.uint8)
    if search.trust_ratio is not None:
        size = processes.sum(current.square().sum()).sqrt()
        entries = torch.stack([book[after[:, i].long()] for i, book in enumerate(weight.codebooks)]).sum(0)
        moved = entries * scales[:, None] - current[places]
        kept = _trusted(score, moved.square().sum(1), search.trust_ratio * size, budget, processes)
        after = torch.where(kept[:, None], after, before)
    flat[places] = after
    return (after != before).any(1).sum()


def encode(targets: Tensor, scales: Tensor, codes: Tensor, codebooks: Tensor, search: CodeSearch) -> Tensor:
    """Codes int64 [q, m] whose scaled sums of entries are near targets [q, v], never further than `codes` [q, m].

    scales [q], codebooks [m, C, v]. One visit to each codebook in the order of the search: every hypothesis tries all
    entries there and the `beam_size` best over hypotheses and entries stay, at the last visit the best one.
    """
    m, entries, _ = codebooks.shape
    share = max(1, MAX_SCORES // (entries * (1 if m == 1 else search.beam_size)))
    if len(targets) > share:
        pieces = zip(targets.split(share), scales.split(share), codes.split(share), strict=True)
        return torch.cat([encode(*piece, codebooks, search) for piece in pieces])
    beams, scale = codes.unsqueeze(1), scales[:, None, None]
    for i in search.order:
        others = [codebooks[j][beams[..., j]] for j in range(m) if j != i]
        rest = targets[:, None] - scale * sum(others, torch.zeros_like(targets[:, None]))
        features = torch.cat([rest * (-2 * scale), scale.square().expand(*rest.shape[:2], 1)], dim=-1)
        lookup = torch.cat([codebooks[i], codebooks[i].square().sum(1, keepdim=True)], dim=1)
        costs = (features @ lookup.t() + rest.square().sum(-1, keepdim=True)).flatten(1)
        if i == search.order[-1]:
            best = costs.argmin(1, keepdim=True)
        else:
            best = costs.topk(min(search.beam_size, costs.shape[1]), largest=False).indices
        beams = beams.gather(1, (best // entries)[..., None].expand(-1, -1, m))
        beams[..., i] = best % entries
    return beams[:, 0]


def _furthest(distance: Tensor, budget: int, processes: Processes) -> tuple[Tensor, Tensor]:
    """Places and distances of those of the `budget` largest distances over all processes that are here."""
    values, places = distance.topk(min(budget, len(distance)))
    if processes.size == 1:
        return places, values
    padded = nn.functional.pad(values, (0, budget - len(values)), value=-1.0)
    chosen = processes.gather(padded).flatten().topk(budget).indices
    mine = (chosen[chosen // budget == processes.rank] % budget).sort().values
    return places[mine], values[mine]


def _trusted(score: Tensor, moved: Tensor, limit: Tensor, budget: int, processes: Processes) -> Tensor:
    """Which changes to keep: the longest run by descending score with a joint norm below `limit`, and one more.

    moved: squared norm of each change.
    """
    spare = (0, budget - len(score))
    scores = processes.gather(nn.functional.pad(score, spare, value=-1.0)).flatten()
    squares = processes.gather(nn.functional.pad(moved, spare)).flatten()
    order = scores.argsort(descending=True, stable=True)
    kept = torch.ones_like(order, dtype=torch.bool)
    kept[1:] = squares[order].cumsum(0).sqrt()[:-1] < limit
    here = processes.rank * budget
    return torch.zeros_like(kept).scatter(0, order, kept)[here : here + len(score)]
