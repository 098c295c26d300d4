"""Hidden states of all calibration windows: on the device while they fit, pinned in host memory otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class HiddenStates:
    """A list of tensors [windows, tokens, hidden], read on the device in any order.

    Offloaded ones lie in pinned host memory; while one is used, the copy of the next is under way on a stream of its
    own. Written copies go the same way and are waited for by whoever reads them.
    """

    def __init__(self, device: torch.device, *, offload: bool = False) -> None:
        self.device = device
        self.offload = offload and device.type == "cuda"
        self._states: list[Tensor] = []
        self._written: list[torch.cuda.Event] = []
        self._copies = torch.cuda.Stream(device) if self.offload else None

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[Tensor]:
        return self.walk(range(len(self)))

    def append(self, state: Tensor) -> None:
        """Add the state of the next batch."""
        state = state.detach().to(self.device)
        if self._copies is None:
            self._states.append(state)
            return
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        kept = torch.empty(state.shape, dtype=state.dtype, pin_memory=True)
        with torch.cuda.stream(self._copies):
            kept.copy_(state, non_blocking=True)
            state.record_stream(self._copies)
            written = torch.cuda.Event()
            written.record()
        self._states.append(kept)
        self._written.append(written)

    def followed_by(self, others: HiddenStates) -> HiddenStates:
        """These states and then the others, as one list that shares their memory."""
        joined = HiddenStates(self.device, offload=self.offload)
        joined._states = self._states + others._states
        joined._written = self._written + others._written
        return joined

    def walk(self, order: Sequence[int]) -> Iterator[Tensor]:
        """The states of these batches on the device, one after the other."""
        if self._copies is None:
            yield from (self._states[i] for i in order)
            return
        following = self._fetch(order[0]) if order else None
        for number in range(len(order)):
            assert following is not None
            state, ready = following
            if number + 1 < len(order):
                following = self._fetch(order[number + 1])
            torch.cuda.current_stream(self.device).wait_event(ready)
            state.record_stream(torch.cuda.current_stream(self.device))
            yield state

    def _fetch(self, index: int) -> tuple[Tensor, torch.cuda.Event]:
        assert self._copies is not None
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._written[index])
            state = self._states[index].to(self.device, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        return state, ready

    def finite(self) -> bool:
        """Whether every value is finite."""
        return bool(torch.stack([state.isfinite().all() for state in self]).all())
