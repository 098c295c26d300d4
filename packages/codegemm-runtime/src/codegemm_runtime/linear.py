"""The packed linear layer: what `nn.Linear` becomes when its weight is stored as codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from codegemm_kernels import ops
from codegemm_kernels.autograd import gemm_with_grad
from codegemm_kernels.scheme import CODES_PER_WORD, CodebookScheme


class CodebookLinear(nn.Module):
    """`y = x W^T + bias` with W [out_features, in_features] stored as codes, codebooks and scales.

    Parameters, all frozen: `codes` int32 [m, K/(4v), N], `codebooks` [m, 256, v], `scales` [G, N], `bias` [N] or None.
    Those are the stored tensors, so `state_dict` is the checkpoint. On the CPU `tile` puts the codes into the order in
    which its kernels read them; `state_dict`, and a move to another device, undo that. Construction leaves the tensors
    uninitialised, as they are about to be loaded. Gradients reach x, and the other tensors once they are unfrozen.
    """

    codes: nn.Parameter
    codebooks: nn.Parameter
    scales: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: CodebookScheme,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Raises BadInput when a matrix of this shape cannot be stored in `scheme`."""
        super().__init__()
        shapes = scheme.shapes(out_features, in_features)
        self.codes = _frozen(torch.empty(shapes["codes"], dtype=torch.int32, device=device))
        self.codebooks = _frozen(torch.empty(shapes["codebooks"], dtype=dtype, device=device))
        self.scales = _frozen(torch.empty(shapes["scales"], dtype=dtype, device=device))
        self.bias = _frozen(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    @property
    def in_features(self) -> int:
        """K, the width of an input row."""
        return self.codes.shape[1] * (1 if self.is_tiled else CODES_PER_WORD) * self.codebooks.shape[2]

    @property
    def out_features(self) -> int:
        """N, the width of an output row."""
        return self.codes.shape[2]

    @property
    def scheme(self) -> CodebookScheme:
        """The scheme the tensors have; one scale a row reads as group size -1 whatever it was declared as."""
        groups = self.scales.shape[0]
        return CodebookScheme(
            self.codebooks.shape[0], self.codebooks.shape[2], -1 if groups == 1 else self.in_features // groups
        )

    @property
    def is_tiled(self) -> bool:
        """Whether `codes` are uint8 [m, K/v, N] in the order of the CPU kernels."""
        return self.codes.dtype == torch.uint8

    def tile(self) -> None:
        """Put codes that are on the CPU into the order of its kernels, which is several times faster to read."""
        if self.codes.device.type == "cpu" and not self.is_tiled:
            self.codes = _frozen(ops.tile(self.codes, self.codebooks.shape[2], self.scales.shape[0]))

    def untile(self) -> None:
        """Put codes back into the stored order, int32 [m, K/(4v), N]."""
        if self.is_tiled:
            self.codes = _frozen(ops.untile(self.codes, self.codebooks.shape[2], self.scales.shape[0]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Behind `to`, `half`, `cuda` and the like: other devices want stored codes."""
        tiled = self.is_tiled
        self.untile()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if tiled:
            self.tile()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_tiled:
            stored = ops.untile(self.codes, self.codebooks.shape[2], self.scales.shape[0])
            destination[prefix + "codes"] = _frozen(stored) if keep_vars else stored

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        tiled = self.is_tiled
        self.untile()
        super()._load_from_state_dict(*args, **kwargs)
        if tiled:
            self.tile()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] to a new tensor [..., out_features].

        Dtypes as in F.linear: under autocast everything is computed in the autocast dtype, outside it the op refuses
        an x of another dtype than the weights (BadInput).
        """
        codebooks: Tensor = self.codebooks
        scales: Tensor = self.scales
        bias: Tensor | None = self.bias
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):  # meta has no autocast to ask about
            dtype = torch.get_autocast_dtype(device)
            codebooks, scales, bias = codebooks.to(dtype), scales.to(dtype), None if bias is None else bias.to(dtype)
            # x last, and copied where weights were: a kernel reads them before the one in front of it has ended.
            x = x.to(dtype, copy=codebooks is not self.codebooks)
        if torch.is_grad_enabled() and (
            x.requires_grad
            or codebooks.requires_grad
            or scales.requires_grad
            or (bias is not None and bias.requires_grad)
        ):
            return gemm_with_grad(x, self.codes, codebooks, scales, bias)
        y: Tensor = ops.gemm(x, self.codes, codebooks, scales, bias)
        return y

    def dequantize(self) -> Tensor:
        """The weight [out_features, in_features] in the dtype of the codebooks."""
        weight: Tensor = ops.dequantize(self.codes, self.codebooks, self.scales)
        return weight

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme={self.scheme}, bias={self.bias is not None}"
        )


def tile_linears(model: nn.Module) -> None:
    """Tile the layers of a model that is on the CPU as a whole: hooks that move layers about want stored codes."""
    if all(parameter.device.type == "cpu" for parameter in model.parameters()):
        for module in model.modules():
            if isinstance(module, CodebookLinear):
                module.tile()


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
