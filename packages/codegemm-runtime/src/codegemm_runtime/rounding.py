"""A dense linear layer as codes without calibration: rounding to a grid that codebooks hold exactly.

At 8 bits each of the four codebooks describes one weight of a vector of four, at 4 bits each of the two describes two;
the rest of its entries is zero. So a code is the rounded weight, and the kernels need to know nothing of it. Meant for
output heads, which are read whole for every token and are dense in most checkpoints.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from codegemm_kernels.errors import BadInput
from codegemm_kernels.layout import pack_codes
from codegemm_kernels.scheme import CodebookScheme
from codegemm_runtime.linear import CodebookLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEMES = {8: CodebookScheme.parse("m4v4g128"), 4: CodebookScheme.parse("m2v4g128")}
"""Scheme by bits a weight."""
_ROWS = 4096  # rounded at a time, so that a head of 262 M weights needs no fp32 copy


def round_linear(linear: nn.Linear, bits: int) -> CodebookLinear:
    """`linear` [N, K] with weights rounded to 2**bits levels between -s and s, s the largest of 128 neighbours in K.

    The error of a weight is at most s / (2**bits - 1). A K that 128 does not divide gets one s a row. Raises BadInput
    for other bits than 8 and 4, and for a K that is no multiple of 16.
    """
    if bits not in SCHEMES:
        raise BadInput(f"weights can be rounded to {' or '.join(map(str, SCHEMES))} bits, not to {bits}")
    scheme, weight = SCHEMES[bits], linear.weight.detach()
    if linear.in_features % scheme.group_size:
        scheme = replace(scheme, group_size=-1)
    scheme.check_matrix(linear.out_features, linear.in_features, "the layer")
    has_bias = linear.bias is not None
    packed = CodebookLinear(linear.in_features, linear.out_features, scheme, has_bias, weight.dtype, weight.device)
    packed.codebooks.copy_(_grid(bits))
    if has_bias:
        packed.bias = linear.bias
    top = (1 << bits) - 1
    for start in range(0, linear.out_features, _ROWS):
        rows = slice(start, start + _ROWS)
        grouped = weight[rows].float().unflatten(1, (scheme.num_groups(linear.in_features), -1))
        size = grouped.abs().amax(2)
        packed.scales[:, rows] = size.t().to(weight.dtype)
        size = packed.scales[:, rows].float().t().clamp_min(torch.finfo(torch.float32).tiny)
        levels = ((grouped / size.unsqueeze(2) + 1) * (top / 2)).round().clamp(0, top).to(torch.uint8).flatten(1)
        if bits == 4:
            levels = levels[:, 0::2] | levels[:, 1::2] << 4
        packed.codes[:, :, rows] = pack_codes(levels.unflatten(1, (-1, scheme.num_codebooks)))
    return packed


def _grid(bits: int) -> Tensor:
    """Codebooks [m, 256, 4]: entry e of codebook i has the levels that its bits name, in its own weights."""
    scheme = SCHEMES[bits]
    each = scheme.vector_length // scheme.num_codebooks
    books = torch.zeros(scheme.num_codebooks, 256, scheme.vector_length)
    top = (1 << bits) - 1
    for i in range(scheme.num_codebooks):
        for t in range(each):
            books[i, :, i * each + t] = (torch.arange(256) >> bits * t & top) * 2 / top - 1
    return books


def round_head(model: PreTrainedModel, bits: int) -> None:
    """Round the output head of a language model in place; the embedding it may share a weight with stays as it is.

    A model that was loaded with codes can be saved: its configuration then says that the head is stored as codes.
    Raises BadInput for a model whose head is no dense linear layer.
    """
    head: Any = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise BadInput(f"the head of this {type(model).__name__} is no dense linear layer: leave it as it is")
    name = next(name for name, module in model.named_modules() if module is head)
    packed = round_linear(head, bits)
    packed.train(head.training)
    if packed.codes.device.type == "cpu":
        packed.tile()
    model.set_submodule(name, packed)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {
        one: other for one, other in getattr(model, "all_tied_weights_keys", {}).items() if not one.startswith(name)
    }
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None:
        quantization.layers = {**quantization.layers, name: str(packed.scheme)}
        dense = quantization.modules_to_not_convert
        quantization.modules_to_not_convert = [one for one in dense if one != name]
