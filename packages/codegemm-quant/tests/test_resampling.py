"""Other versions of a text: what is replaced, by what, and that it can be repeated."""

import torch

from codegemm_quant.resampling import chances, predicted, resampled


def test_chances_of_a_window_follow_from_its_seed():
    both, one = chances([3, 4], 50), chances([4], 50)
    assert torch.equal(both[1], one[0])
    assert not torch.equal(both[0], both[1])
    assert 0 <= both.min() < 0.1 < 0.9 < both.max() < 1


def test_tokens_are_drawn_as_often_as_they_are_predicted():
    logits = torch.tensor([0.5, 0.25, 0.25, 0.0]).log()  # the last never
    drawn = predicted(logits.expand(4000, 4), torch.rand(4000, generator=torch.Generator().manual_seed(0)))
    counts = drawn.bincount(minlength=4) / 4000
    assert torch.allclose(counts, torch.tensor([0.5, 0.25, 0.25, 0.0]), atol=0.03)
    assert counts[3] == 0


def test_a_share_of_the_tokens_is_replaced_by_guesses_for_their_place():
    tokens, guesses = torch.arange(1000).view(2, 500), -torch.arange(1000).view(2, 500) - 1
    chance = torch.rand(2, 500, generator=torch.Generator().manual_seed(0))
    fresh = resampled(tokens, guesses, chance, 0.3)
    assert torch.equal(fresh[:, 0], tokens[:, 0])
    replaced = fresh != tokens
    assert torch.equal(replaced[:, 1:], chance[:, 1:] < 0.3)
    assert 0.2 < replaced.float().mean() < 0.4
    before = guesses.roll(1, dims=1)  # what may follow the token before
    assert torch.equal(fresh[replaced], before[replaced])
    assert torch.equal(resampled(tokens, guesses, chance, 0.0), tokens)
