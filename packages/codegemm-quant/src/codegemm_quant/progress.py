"""What a run shows while it works: one bar with block, layer, stage, error and the time that is left."""

from __future__ import annotations

from typing import Any, Self

from tqdm import tqdm


class Progress:
    """A bar of one step for each linear and one for each block's tuning."""

    def __init__(self, linears: int, blocks: int, *, shown: bool = True) -> None:
        self._bar = tqdm(
            total=linears + blocks, desc="quantise", unit="step", dynamic_ncols=True, disable=not shown, mininterval=0.5
        )
        self._state: dict[str, Any] = {}
        self._stepwise = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def tell(self, news: dict[str, Any]) -> None:
        """What is being done now; a fitted layer is a step of the bar, and so is each step after `restart`."""
        self._state |= news
        self._bar.set_postfix(self._state, refresh=False)
        self._bar.update(int(self._stepwise or news.get("stage") == "fitted"))

    def block(self, index: int) -> None:
        """Work on a block begins."""
        self._state = {"block": index}

    def finished(self, steps: int) -> None:
        """A block is done, and with it the first `steps` steps."""
        self._bar.update(max(0, steps - self._bar.n))

    def restart(self, steps: int) -> None:
        """A new bar, of `steps` steps that are told one by one."""
        self._state, self._stepwise = {}, True
        self._bar.set_postfix(self._state, refresh=False)
        self._bar.reset(steps)
