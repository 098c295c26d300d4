from __future__ import annotations

import pytest
import torch

from codegemm_eval.windows import Protocol, cut_windows
from codegemm_kernels import BadInput


def starts(count: int, **protocol) -> list[int]:
    """First tokens of the windows of the text 0, 1, 2, ..."""
    return cut_windows(torch.arange(count), Protocol(**protocol)).inputs[:, 0].tolist()


def test_the_last_full_window_counts_and_the_rest_is_dropped():
    assert starts(30, window=10) == [0, 10, 20]
    assert starts(29, window=10) == [0, 10]
    assert starts(30, window=10, stride=4) == [0, 4, 8, 12, 16, 20]
    assert starts(29, window=10, stride=4) == [0, 4, 8, 12, 16]


def test_windows_are_the_first_ones_or_evenly_spaced():
    assert starts(100, window=10, windows=3) == [0, 10, 20]
    assert starts(100, window=10, windows=99) == [10 * i for i in range(10)]
    assert starts(110, window=10, windows=3, spread=True) == [0, 50, 100]
    assert starts(110, window=10, windows=1, spread=True) == [0]
    assert starts(110, window=10, windows=11, spread=True) == [10 * i for i in range(11)]
    assert cut_windows(torch.arange(110), Protocol(window=10, windows=3)).available == 11


def test_overlapping_windows_predict_every_token_but_the_first_once():
    found = cut_windows(torch.arange(30), Protocol(window=10, stride=4))
    predicted = [
        token
        for row, last in zip(found.inputs.tolist(), found.predicted.tolist(), strict=True)
        for token in row[-last:]
    ]
    assert predicted == list(range(1, 30))
    assert cut_windows(torch.arange(30), Protocol(window=10)).predicted.tolist() == [9, 9, 9]


def test_a_bos_replaces_the_first_token_of_every_window_and_not_the_text():
    tokens = torch.arange(20, dtype=torch.int32)
    found = cut_windows(tokens, Protocol(window=5, stride=4), bos=77)
    assert found.inputs.tolist() == [[77, *range(at + 1, at + 5)] for at in (0, 4, 8, 12)]
    assert tokens.tolist() == list(range(20))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 1}, "window of 1"),
        ({"window": 16, "windows": 0}, "0 windows"),
        ({"window": 16, "stride": 17}, "stride of 17"),
        ({"window": 16, "stride": 0}, "stride of 0"),
        ({"window": 16, "spread": True}, "--windows"),
    ],
)
def test_bad_protocols(settings, message):
    with pytest.raises(BadInput, match=message):
        Protocol(**settings)


@pytest.mark.parametrize("count", [0, 15])
def test_too_little_text(count):
    with pytest.raises(BadInput, match=f"{count} tokens and one window needs 16"):
        cut_windows(torch.zeros(count), Protocol(window=16))
