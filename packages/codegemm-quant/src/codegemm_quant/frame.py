"""The model around its decoder blocks: what reaches the first, with what they are called, what follows the last."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from codegemm_quant.blocks import BlockCall, Reached


class ModelFrame:
    """A model whose blocks are replaced by stand-ins; this frame alone is moved to `device` and to `dtype`.

    Token ids [windows, tokens] go in, hidden states come out in front of the blocks, and logits behind them.
    """

    def __init__(
        self, model: Any, prefix: str, blocks: nn.ModuleList, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._model, self._prefix, self._blocks = model, prefix, blocks
        self._device = device
        returns_tuple = _returns_tuple(model, blocks[0])
        self._stand_ins = [_StandIn(block, returns_tuple=returns_tuple) for block in blocks]
        model.set_submodule(prefix, nn.ModuleList(self._stand_ins))
        tensors = [*model.parameters(), *model.buffers()]
        self._before = [(tensor, tensor.data, tensor.requires_grad) for tensor in tensors]
        place(model, device, dtype)
        self._dense: dict[str, Tensor] | None = None

    def close(self) -> None:
        """Put the blocks back, and everything else where it was."""
        for tensor, data, requires_grad in self._before:
            tensor.data = data
            tensor.requires_grad_(requires_grad)
        self._model.set_submodule(self._prefix, self._blocks)

    def train(self) -> nn.Module:
        """Make the frame's parameters (embedding, last norm, head) trainable in fp32; returns a module of them alone.

        What they are now is kept for `dense_logits`.
        """
        self._dense = {name: parameter.detach() for name, parameter in self._model.named_parameters()}
        for parameter in self._model.parameters():
            parameter.data = parameter.data.to(torch.float32, copy=True)
            parameter.requires_grad_(True)
        module: nn.Module = self._model
        return module

    def stored_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The frame's parameters by full name, on the CPU."""
        return {name: parameter.detach().to("cpu", dtype) for name, parameter in self._model.named_parameters()}

    def inputs(self, tokens: Tensor) -> Tensor:
        """The hidden states that reach the first block; gradients pass."""
        self._run(tokens, None, stop=self._stand_ins[0])
        seen = self._stand_ins[0].seen
        assert seen is not None
        return seen

    @torch.no_grad()
    def calls(self, tokens: Tensor) -> list[BlockCall]:
        """What each block is called with besides hidden states, for windows of the number and length of `tokens`.

        It does not depend on the text (masks, positions, rotary tables), but it differs between blocks: models with
        local and global attention pass each its own.
        """
        self._run(tokens, None, stop=self._stand_ins[-1])
        return [stand_in.call for stand_in in self._stand_ins if stand_in.call is not None]

    def logits(self, hidden: Tensor) -> Tensor:
        """Predictions from the last block's output; gradients pass."""
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self._device)
        output: Tensor = self._run(tokens, hidden, stop=None).logits
        return output

    @torch.no_grad()
    def dense_logits(self, hidden: Tensor) -> Tensor:
        """The same by the parameters from before `train`."""
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self._device)
        output: Tensor = self._run(tokens, hidden, stop=None, parameters=self._dense or {}).logits
        return output

    def _run(
        self, tokens: Tensor, answer: Tensor | None, *, stop: _StandIn | None, parameters: Mapping[str, Tensor] = {}
    ) -> Any:
        for stand_in in self._stand_ins:
            stand_in.answer, stand_in.stops = answer, stand_in is stop
        call = {"input_ids": tokens.to(self._device), "use_cache": False}
        with suppress(Reached):
            return functional_call(self._model, dict(parameters), kwargs=call) if parameters else self._model(**call)


class _StandIn(nn.Module):
    """In a block's place: notes the call and returns the hidden states given to it, or else its input.

    It answers for the block's attributes, since models ask their blocks whether attention is local.
    """

    def __init__(self, block: nn.Module, *, returns_tuple: bool) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not as a submodule, which would move with the frame
        self.returns_tuple = returns_tuple
        self.stops = False
        self.answer: Tensor | None = None
        self.seen: Tensor | None = None
        self.call: BlockCall | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen = args[0] if args else kwargs["hidden_states"]
        self.call = BlockCall(tuple(args[1:]), {key: kwargs[key] for key in kwargs if key != "hidden_states"})
        if self.stops:
            raise Reached
        output = self.seen if self.answer is None else self.answer
        return (output,) if self.returns_tuple else output


def place(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move a module, its floating parameters to `dtype`; buffers keep theirs, for rotary frequencies are fp32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(device, dtype if parameter.is_floating_point() else None)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


@torch.no_grad()
def _returns_tuple(model: Any, block: nn.Module) -> bool:
    """Whether a block returns a tuple: the first one is run on two tokens, where it is."""
    kinds: list[bool] = []

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        kinds.append(isinstance(output, tuple))
        raise Reached

    handle = block.register_forward_hook(note)
    try:
        with suppress(Reached):
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        handle.remove()
    return kinds[0]
