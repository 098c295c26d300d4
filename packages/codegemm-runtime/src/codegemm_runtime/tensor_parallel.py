"""One transformers model over several processes, each with its share of every layer, without vLLM.

Which linears are cut by outputs and which by inputs is the plan that transformers keeps for each architecture. What the
plan gathers again (output heads, layers fused at birth) every process keeps whole, which gives the same numbers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from codegemm_kernels.errors import BadInput
from codegemm_runtime.linear import CodebookLinear, tile_linears
from codegemm_runtime.loading import load_model
from codegemm_runtime.sharding import MatrixShard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WHOLE = ("_gather_output", "_rep", "_split_input", "_with_grad_allreduce")
"""Ends of the styles whose inputs and outputs are the same in every process."""
_EMBEDDINGS = ("embedding_rowwise", "embedding_colwise")


class RowParallelLinear(nn.Module):
    """A linear that has this process's range of inputs; the processes add up what they compute."""

    def __init__(self, linear: nn.Module, bias: nn.Parameter | None) -> None:
        """`linear` is this process's share without a bias, which is added once, to the sum."""
        super().__init__()
        self.linear = linear
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., own inputs] -> [..., out_features], the same in every process."""
        y: Tensor = self.linear(x)
        dist.all_reduce(y)
        return y if self.bias is None else y + self.bias


def load_tensor_parallel(
    folder: Path | str, device: str | torch.device = "cpu", dtype: str | torch.dtype = "auto"
) -> PreTrainedModel:
    """This process's share of a causal language model, ready for `generate`; every process must call it.

    Needs `torch.distributed.init_process_group`. All processes generate the same tokens, if those are chosen greedily
    or from one seed. Arguments and errors as for `load_model`, and BadInput for what cannot be shared.
    """
    if not dist.is_initialized():
        raise BadInput("tensor parallelism needs processes: start with torchrun and call init_process_group first")
    model = load_model(folder, "cpu", dtype)
    shard_model(model, dist.get_rank(), dist.get_world_size())
    model.to(torch.device(device))
    tile_linears(model)
    return model


def shard_model(model: PreTrainedModel, rank: int, ranks: int) -> list[str]:
    """Keep of each planned linear what belongs to `rank`; returns their names.

    Raises BadInput, before anything is changed, for an architecture without a plan, heads or matrices that `ranks`
    cannot share, and layers that this cannot cut, such as fused experts.
    """
    plan: dict[str, str] = model.tp_plan
    if not plan:
        raise BadInput(f"transformers has no tensor parallel plan for {type(model).__name__}: use one process")
    heads = model.config.get_text_config().num_key_value_heads
    if heads % ranks:
        raise BadInput(f"{heads} key and value heads cannot be shared by {ranks} processes: use a divisor of {heads}")
    replaced: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style is None or style in _EMBEDDINGS or style.endswith(_WHOLE):
            continue
        if style not in ("colwise", "rowwise") or not isinstance(module, nn.Linear | CodebookLinear):
            raise BadInput(f"{name} ({type(module).__name__}, planned as {style}) cannot be shared: use one process")
        replaced[name] = _share(name, module, style == "rowwise", rank, ranks)
    for name, module in replaced.items():
        model.set_submodule(name, module)
    return list(replaced)


def _share(name: str, module: nn.Linear | CodebookLinear, by_inputs: bool, rank: int, ranks: int) -> nn.Module:
    size = (module.out_features, module.in_features)
    own: nn.Module
    if isinstance(module, CodebookLinear):
        own = _codebook_share(name, module, by_inputs, rank, ranks)
    else:
        axis = 1 if by_inputs else 0
        if size[axis] % ranks:
            raise BadInput(f"{name}.weight of {size[0]} x {size[1]} cannot be shared by {ranks} processes")
        with torch.device("meta"):
            own = nn.Linear(1, 1, bias=False)
        own.weight = _frozen(module.weight.detach().chunk(ranks, axis)[rank])
        own.out_features, own.in_features = own.weight.shape
    if by_inputs:
        return RowParallelLinear(own, module.bias)
    own.bias = None if module.bias is None else _frozen(module.bias.detach().chunk(ranks)[rank])
    return own


def _codebook_share(name: str, module: CodebookLinear, by_inputs: bool, rank: int, ranks: int) -> CodebookLinear:
    size, scheme = (module.out_features, module.in_features), module.scheme
    module.untile()
    if by_inputs:
        shard = MatrixShard.by_columns(name, scheme, size, rank, ranks)
    else:
        shard = MatrixShard.by_rows(name, scheme, size, rank, ranks, size[:1])
    own = CodebookLinear(shard.shape[1], shard.shape[0], scheme, False, module.codebooks.dtype, "meta")
    for part in ("codes", "codebooks", "scales"):
        setattr(own, part, _frozen(shard.cut(part, getattr(module, part).detach())))
    return own


def _frozen(tensor: Tensor) -> nn.Parameter:
    """A copy, so that the whole tensor is freed."""
    return nn.Parameter(tensor.clone(memory_format=torch.contiguous_format), requires_grad=False)
