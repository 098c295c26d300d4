import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch

from codegemm_quant.pv.codes import CodeSearch, encode, update_codes
from codegemm_quant.pv.processes import Processes
from codegemm_quant.weight import CodebookWeight

ALONE = Processes()
ROWS, VECTORS, V, GROUPS = 13, 24, 4, 3


def matrix(num_codebooks, entries=256):
    """A weight with scales of both signs, and a latent weight some way off."""
    chance = torch.Generator().manual_seed(num_codebooks)
    weight = CodebookWeight(
        torch.randint(0, entries, (ROWS, VECTORS, num_codebooks), generator=chance),
        torch.randn(num_codebooks, entries, V, generator=chance),
        torch.randn(ROWS, GROUPS, generator=chance),
    )
    return weight, weight.dequantize() + 0.3 * torch.randn(ROWS, VECTORS * V, generator=chance)


def distances(weight, latent):
    return (latent - weight.dequantize()).view(-1, V).square().sum(1)


def search(num_codebooks, beam_size=5, trust_ratio=None):
    return CodeSearch(tuple(reversed(range(num_codebooks))), beam_size, trust_ratio)


@pytest.mark.parametrize("num_codebooks", [1, 2, 3])
@pytest.mark.parametrize("budget", [1, 17, ROWS * VECTORS])
def test_the_furthest_vectors_come_nearer_and_no_others_change(num_codebooks, budget):
    weight, latent = matrix(num_codebooks)
    codes = weight.codes.to(torch.uint8)
    before = distances(weight, latent)
    changed = update_codes(weight, codes, latent, budget, search(num_codebooks), ALONE)
    moved = (codes != weight.codes).any(2).flatten()
    assert int(changed) == int(moved.sum())
    assert 0 < changed <= budget
    chosen = before.topk(budget).indices
    assert set(moved.nonzero().flatten().tolist()) <= set(chosen.tolist())
    after = distances(CodebookWeight(codes.long(), weight.codebooks, weight.scales), latent)
    assert (after[moved] < before[moved]).all()
    assert torch.equal(after[~moved], before[~moved])


def test_one_codebook_gets_the_nearest_entry():
    weight, latent = matrix(1)
    codes = weight.codes.to(torch.uint8)
    update_codes(weight, codes, latent, ROWS * VECTORS, search(1), ALONE)
    entries = weight.vector_scales()[..., None, None] * weight.codebooks[0]
    nearest = (latent.view(ROWS, VECTORS, 1, V) - entries).square().sum(-1).argmin(-1)
    assert torch.equal(codes[..., 0].long(), nearest)


def test_a_full_beam_finds_the_best_pair():
    chance = torch.Generator().manual_seed(5)
    books = torch.randn(2, 6, V, generator=chance)
    targets, scales = torch.randn(40, V, generator=chance), torch.randn(40, generator=chance)
    start = torch.zeros(40, 2, dtype=torch.int64)

    def error(codes):
        return (targets - scales[:, None] * (books[0][codes[:, 0]] + books[1][codes[:, 1]])).square().sum(1)

    best = torch.stack([error(torch.tensor([pair] * 40)) for pair in itertools.product(range(6), repeat=2)]).amin(0)
    greedy, full = (encode(targets, scales, start, books, CodeSearch((0, 1), size, None)) for size in (1, 6))
    assert torch.allclose(error(full), best, rtol=1e-5)
    assert (error(greedy) <= error(start) + 1e-5).all()
    assert error(greedy).sum() > error(full).sum()


def test_chunks_change_nothing(monkeypatch):
    weight, latent = matrix(2)
    whole, pieces = weight.codes.to(torch.uint8), weight.codes.to(torch.uint8)
    update_codes(weight, whole, latent, 100, search(2), ALONE)
    monkeypatch.setattr("codegemm_quant.pv.codes.MAX_SCORES", 256 * 5 * 7)
    update_codes(weight, pieces, latent, 100, search(2), ALONE)
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize("ratio", [1e-9, 0.02, 0.1, 1.0])
def test_trust_ratio_keeps_the_furthest_changes(ratio):
    weight, latent = matrix(1)
    free, codes = weight.codes.to(torch.uint8), weight.codes.to(torch.uint8)
    budget = 60
    update_codes(weight, free, latent, budget, search(1), ALONE)
    update_codes(weight, codes, latent, budget, search(1, trust_ratio=ratio), ALONE)
    start = weight.dequantize().view(-1, V)
    steps = (CodebookWeight(free.long(), weight.codebooks, weight.scales).dequantize().view(-1, V) - start).norm(dim=1)
    kept, total = [], 0.0  # the rule, one vector at a time
    for place in distances(weight, latent).topk(budget).indices.tolist():
        kept.append(place)
        total += float(steps[place]) ** 2
        if total**0.5 >= ratio * float(start.norm()):
            break
    expected = weight.codes.to(torch.uint8).view(-1, 1).clone()
    expected[kept] = free.view(-1, 1)[kept]
    assert torch.equal(codes.view(-1, 1), expected)
    assert (len(kept) == budget) == (ratio == 1.0)


@dataclass(frozen=True)
class Thread(Processes):
    """A process that is a thread: what is gathered goes through a list that both see."""

    slots: list = field(default_factory=lambda: [None, None])
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=10))

    def gather(self, tensor):
        self.slots[self.rank] = tensor
        self.barrier.wait()
        gathered = torch.stack(self.slots)
        self.barrier.wait()
        return gathered

    def sum(self, tensor):
        return tensor.copy_(self.gather(tensor.clone()).sum(0))


@pytest.mark.parametrize("ratio", [None, 0.05, 0.2])
@pytest.mark.parametrize("budget", [1, 40, 200, ROWS * VECTORS])
def test_two_processes_choose_the_same_vectors_as_one(budget, ratio):
    weight, latent = matrix(1)
    alone = weight.codes.to(torch.uint8)
    update_codes(weight, alone, latent, budget, search(1, trust_ratio=ratio), ALONE)
    first = Thread(0, 2)
    pair = [first, Thread(1, 2, slots=first.slots, barrier=first.barrier)]
    codes = weight.codes.to(torch.uint8)

    def half(processes):
        rows = processes.rows(ROWS)  # 7 and 6
        part = CodebookWeight(weight.codes[rows], weight.codebooks, weight.scales[rows])
        own = codes[rows].clone()
        changed = update_codes(part, own, latent[rows], budget, search(1, trust_ratio=ratio), processes)
        codes[rows] = own
        return int(changed)

    with ThreadPoolExecutor(2) as threads:
        changed = sum(threads.map(half, pair))
    assert torch.equal(codes, alone)
    assert changed == int((alone != weight.codes).any(2).sum())
