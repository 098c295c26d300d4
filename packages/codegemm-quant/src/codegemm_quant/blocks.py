"""Finding a model's decoder blocks and their linears in the module tree, and running blocks outside the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from codegemm_kernels import BadInput


@dataclass(frozen=True)
class BlockCall:
    """Everything a decoder block is called with besides its hidden states: positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def to(self, device: torch.device, dtype: torch.dtype) -> BlockCall:
        """The same arguments on another device, floats in another dtype."""
        return BlockCall(_moved(self.args, device, dtype), _moved(dict(self.kwargs), device, dtype))

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states for input hidden states [batch, tokens, hidden]."""
        output = block(hidden, *self.args, **self.kwargs)
        return output if isinstance(output, Tensor) else output[0]


class _BlockReached(Exception):
    """Ends a forward pass once the first block has been called."""


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the module list that holds the most linear weights.

    Raises BadInput when the model has no list of modules with linears in it.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            size = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
            if size and (best is None or size > best[0]):
                best = (size, name, module)
    if best is None:
        raise BadInput(f"{type(model).__name__} has no decoder blocks with linear layers: there is nothing to quantise")
    return best[1], best[2]


def find_linears(block: nn.Module, prefix: str, skip: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The linears of one block by name inside the block, without those whose full name matches a `skip` pattern."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and not any(fnmatchcase(f"{prefix}.{name}", pattern) for pattern in skip)
    }


@torch.no_grad()
def capture_inputs(model: nn.Module, first: nn.Module, batches: list[Tensor], device: torch.device) -> list[Tensor]:
    """Hidden states that reach the first block, one tensor [batch, tokens, hidden] for each batch of token ids."""
    states: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append((args[0] if args else kwargs["hidden_states"]).detach())
        raise _BlockReached

    with _hooks([(first, stop)]):
        for batch in batches:
            try:
                model(input_ids=batch.to(device), use_cache=False)
            except _BlockReached:
                continue
    return states


@torch.no_grad()
def capture_calls(model: nn.Module, blocks: nn.ModuleList, batch: Tensor, device: torch.device) -> list[BlockCall]:
    """The arguments each block is called with besides its hidden states, for a batch of full windows.

    They do not depend on the text (masks, positions, rotary tables), but they do differ between blocks: models with
    local and global attention pass each its own. One whole forward pass finds them all.
    """
    calls: dict[int, BlockCall] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls[id(module)] = BlockCall(tuple(args[1:]), kept)

    with _hooks([(block, note) for block in blocks]):
        model(input_ids=batch.to(device), use_cache=False)
    return [calls[id(block)] for block in blocks]


@torch.no_grad()
def input_groups(
    block: nn.Module, linears: Mapping[str, nn.Linear], call: BlockCall, hidden: Tensor
) -> list[list[str]]:
    """Names of linears that receive the very same input tensor, in the order in which the block uses them.

    Raises BadInput for a linear that the block never calls: it could not be calibrated.
    """
    groups: list[tuple[Tensor, list[str]]] = []  # holds the inputs so that no address is used twice

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_module: nn.Module, args: tuple[Any, ...]) -> None:
            for tensor, names in groups:
                if tensor is args[0]:
                    names.append(name)
                    return
            groups.append((args[0], [name]))

        return note

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        call.run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    called = {name for _, names in groups for name in names}
    for name in linears:
        if name not in called:
            raise BadInput(f"{name} is never called by its block: leave it dense with --skip '*.{name}'")
    return [names for _, names in groups]


@torch.no_grad()
def input_moments(
    block: nn.Module,
    dense_block: nn.Module,
    linear: str,
    call: BlockCall,
    inputs: list[Tensor],
    dense_inputs: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Second moments of the inputs of one linear: H = XᵀX / tokens and C = DᵀX / tokens, both fp32 [K, K].

    X are its inputs in the (partly quantised) block fed by the quantised model, D those of the dense model.
    """
    width = block.get_submodule(linear).in_features
    own = cross = torch.zeros(width, width, device=inputs[0].device)  # type: ignore[call-overload]
    own, tokens = own.clone(), 0
    for hidden, dense_hidden in zip(inputs, dense_inputs, strict=True):
        x = _input_of(block, linear, call, hidden)
        d = _input_of(dense_block, linear, call, dense_hidden)
        own.addmm_(x.t(), x)
        cross.addmm_(d.t(), x)
        tokens += len(x)
    return own / tokens, cross / tokens


def _input_of(block: nn.Module, linear: str, call: BlockCall, hidden: Tensor) -> Tensor:
    """What the named linear is given, fp32 [tokens, K]; the block is run no further than that."""
    caught: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        caught.append(args[0].reshape(-1, args[0].shape[-1]).float())
        raise _BlockReached

    with _hooks([(block.get_submodule(linear), stop)]), suppress(_BlockReached):
        call.run(block, hidden)
    return caught[0]


@contextmanager
def _hooks(pairs: list[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device, dtype) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device, dtype) for item in value)
    return value
