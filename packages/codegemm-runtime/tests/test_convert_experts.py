"""A mixture of experts stored as codes, which a dense model has in one tensor for all experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from codegemm_kernels import BadInput, CodebookScheme, pack_codes, reference
from codegemm_kernels.checksums import checksum_problems
from codegemm_runtime import CodebookLinear, inspect_folder, load_model
from codegemm_runtime.convert.conversion import convert_folder


def test_experts_stored_as_codes_become_dense_again(
    make_checkpoint: Callable[..., Any], ids: Tensor, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("mixtral", "m2v8g32")
    checkpoint.tensors = {name: t for name, t in checkpoint.tensors.items() if ".experts." not in name}
    scheme = CodebookScheme.parse("m2v8g32")
    for i, block in enumerate(checkpoint.dense.model.layers):
        for part in ("gate_up_proj", "down_proj"):
            fused = getattr(block.mlp.experts, part)
            for number in range(len(fused)):
                n, k = fused[number].shape
                codes = pack_codes(torch.randint(0, 256, (n, k // 8, 2)))
                tensors = (codes, 0.1 * torch.randn(2, 256, 8), 0.5 + torch.rand(scheme.num_groups(k), n))
                fused.data[number] = reference.dequantize(*tensors)
                name = f"model.layers.{i}.mlp.experts.{number}.{part}"
                checkpoint.tensors |= {
                    f"{name}.{key}": t for key, t in zip(("codes", "codebooks", "scales"), tensors, strict=True)
                }
    checkpoint.write(shards=2)
    expected = checkpoint.dense(ids).logits
    assert inspect_folder(checkpoint.folder).problems == []
    packed = load_model(checkpoint.folder, "cpu")
    assert sum(isinstance(module, CodebookLinear) for module in packed.modules()) == 2 * (4 + 2 * 2)
    torch.testing.assert_close(packed(ids).logits, expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(BadInput, match=r"experts\.0\.down_proj is an expert's"):
        convert_folder(checkpoint.folder, tmp_path / "aqlm", "aqlm")
    result = convert_folder(checkpoint.folder, tmp_path / "dense", "dense")
    assert result["to"] == "dense"
    assert checksum_problems(tmp_path / "dense") == []
    dense = load_model(tmp_path / "dense", "cpu")
    torch.testing.assert_close(dense(ids).logits, expected, rtol=1e-3, atol=1e-4)
    for name, parameter in checkpoint.dense.named_parameters():
        torch.testing.assert_close(dense.get_parameter(name), parameter, rtol=1e-6, atol=1e-7)
