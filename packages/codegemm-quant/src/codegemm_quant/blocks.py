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
from codegemm_kernels.experts import Experts
from codegemm_quant.experts import is_fused


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


class Reached(Exception):
    """Ends a forward pass once a module has been called."""


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


def linear_shapes(block: nn.Module, prefix: str, skip: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Rows and columns of what will be quantised in a block, by name inside it, experts still fused or not."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
        elif is_fused(module):
            for part in ("gate_up_proj", "down_proj"):
                experts, rows, columns = getattr(module, part).shape
                shapes |= {f"{name}.{i}.{part}": (rows, columns) for i in range(experts)}
    return {
        name: shape
        for name, shape in shapes.items()
        if not any(fnmatchcase(f"{prefix}.{name}", pattern) for pattern in skip)
    }


@torch.no_grad()
def fitting_order(
    block: nn.Module, linears: Mapping[str, nn.Linear], call: BlockCall, hidden: Tensor
) -> list[list[list[str]]]:
    """What can be fitted when: stages in the order in which the block uses them, each a list of groups of linears.

    The linears of a group receive the very same tensor. A stage is one group, or the same projection of all experts
    of a mixture. Raises BadInput for a linear that the block never calls: it could not be calibrated.
    """
    stages: list[list[list[str]]] = []
    inputs: list[Tensor | None] = []  # of each stage; holds them so that no address is used twice
    mixtures = {name: module for name, module in block.named_modules() if isinstance(module, Experts)}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
            for stage, tensor in zip(stages, inputs, strict=True):
                if tensor is args[0]:
                    stage[0].append(name)
                    return
            stages.append([[name]])
            inputs.append(args[0])

        return hook

    def note_mixture(mixture: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            for part in ("gate_up_proj", "down_proj"):
                own = [[name] for name in linears if name.startswith(f"{mixture}.") and name.endswith(part)]
                if own:
                    stages.append(own)
                    inputs.append(None)

        return hook

    pairs = [(linear, note(name)) for name, linear in linears.items() if not is_routed(block, name)]
    with hooks([*pairs, *((module, note_mixture(name)) for name, module in mixtures.items())]):
        call.run(block, hidden)
    called = {name for stage in stages for group in stage for name in group}
    for name in linears:
        if name not in called:
            raise BadInput(f"{name} is never called by its block: leave it dense with --skip '*.{name}'")
    return stages


def is_routed(block: nn.Module, linear: str) -> bool:
    """Whether the named linear belongs to an expert, which sees only the tokens routed to it."""
    above = [linear.rsplit(".", depth)[0] for depth in range(1, linear.count(".") + 1)]
    return any(isinstance(block.get_submodule(name), Experts) for name in above)


def inputs_of(block: nn.Module, linears: list[str], call: BlockCall, hidden: Tensor) -> dict[str, Tensor]:
    """What the named linears are given, fp32 [tokens, K], without those that are not called.

    For a single linear the block is run no further than that.
    """
    caught: dict[str, Tensor] = {}

    def catch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
            caught[name] = args[0].reshape(-1, args[0].shape[-1]).float()
            if len(linears) == 1:
                raise Reached

        return hook

    with hooks([(block.get_submodule(name), catch(name)) for name in linears]), suppress(Reached):
        call.run(block, hidden)
    return caught


@contextmanager
def hooks(pairs: list[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Forward pre-hooks (with keyword arguments) for as long as the context lasts."""
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
