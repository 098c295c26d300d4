"""Published layer checkpoints: pickled decoder layers whose classes need not be importable, and hostile pickles."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from codegemm_kernels import BadInput, unpack_codes
from codegemm_kernels.checkpoint import TensorHeader
from codegemm_runtime import load_model
from codegemm_runtime.convert import unpickle
from codegemm_runtime.convert.conversion import convert_folder
from codegemm_runtime.convert.matrix import AdditiveForm, AdditiveMatrix, PackedMatrix


class QuantizedWeight(nn.Module):
    """Only the names matter: reading must work where this class does not exist."""

    def __init__(self, codes: Tensor, codebooks: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.codebooks = nn.Parameter(codebooks)
        self.scales = nn.Parameter(scales)
        self.codebook_value_nbits = 16


class QuantizedLinear(nn.Module):
    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.quantized_weight = weight
        self.bias = None if bias is None else nn.Parameter(bias)


def random_weight(linear: nn.Linear, bits: int = 8) -> tuple[QuantizedWeight, Tensor]:
    """m2v8g32 codes as the quantiser keeps them, and the weight that they mean."""
    n, k = linear.weight.shape
    codes = torch.randint(0, 2**bits, (n, k // 8, 2), dtype=torch.int32)
    codebooks, scales = 0.1 * torch.randn(2, 2**bits, 1, 8), 0.5 + torch.rand(n, k // 32, 1, 1)
    weight = (codebooks[0, :, 0][codes[:, :, 0].long()] + codebooks[1, :, 0][codes[:, :, 1].long()]).reshape(n, k)
    return QuantizedWeight(codes, codebooks, scales), weight * scales.reshape(n, -1).repeat_interleave(32, dim=1)


@pytest.fixture
def layers(make_checkpoint: Callable[..., Any], write_tokenizer: Callable[..., None], tmp_path: Path) -> Any:
    """The dense model of a layer checkpoint in tmp_path/layers, whose original model is in tmp_path/base."""
    dense = make_checkpoint("qwen2").dense
    dense.config.dtype = torch.float32
    dense.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    folder = tmp_path / "layers"
    folder.mkdir()
    for i, block in enumerate(dense.model.layers):
        linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        for name, linear in linears.items():
            weight, linear.weight.data = random_weight(linear)
            block.set_submodule(name, QuantizedLinear(weight, linear.bias))
        torch.save(block, folder / f"{i}.pth")
        for name, linear in linears.items():
            block.set_submodule(name, linear)
    outside = {name: p for name, p in dense.named_parameters() if ".layers." not in name}
    torch.save(outside, folder / "not_quantized_weights.pt")
    torch.save({"devices": [torch.device("cuda:0")]}, folder / "args.pt")
    return dense


def convert(tmp_path: Path, to: Any = "codegemm", **options: Any) -> dict[str, Any]:
    return convert_folder(
        tmp_path / "layers", tmp_path / "out", to, base=tmp_path / "base", allow_pickle=True, **options
    )


def test_layers_come_in_bit_for_bit(layers: Any, tmp_path: Path, ids: Tensor) -> None:
    for left_by_a_killed_run in (".out.layers", ".out.partial"):
        (tmp_path / left_by_a_killed_run).mkdir()
        (tmp_path / left_by_a_killed_run / "7.safetensors").write_bytes(b"half")
    result = convert(tmp_path)
    assert not list(tmp_path.glob(".out*"))
    assert not (tmp_path / "out" / "7.safetensors").exists()
    assert (result["from"], result["scheme"], result["layers"]) == ("layers", "m2v8g32", 14)
    block = torch.load(tmp_path / "layers" / "1.pth", weights_only=False)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    assert torch.equal(unpack_codes(stored[f"{name}.codes"]), block.self_attn.q_proj.quantized_weight.codes)
    assert torch.equal(stored[f"{name}.bias"], block.self_attn.q_proj.bias)
    logits = load_model(tmp_path / "out", "cpu")(ids).logits
    torch.testing.assert_close(logits, layers(ids).logits, rtol=1e-4, atol=1e-4)
    convert_folder(tmp_path / "out", tmp_path / "dense", "dense")
    weight = load_file(tmp_path / "dense" / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(weight, layers.get_submodule(name).weight, rtol=1e-6, atol=1e-7)


def test_layer_with_long_codes_becomes_dense_among_the_others(layers: Any, tmp_path: Path, ids: Tensor) -> None:
    block = torch.load(tmp_path / "layers" / "0.pth", weights_only=False)
    linear = layers.model.layers[0].mlp.up_proj
    weight, linear.weight.data = random_weight(linear, bits=10)
    block.mlp.up_proj = QuantizedLinear(weight, None)
    torch.save(block, tmp_path / "layers" / "0.pth")
    with pytest.raises(BadInput, match=r"exported to aqlm: model\.layers\.0\.mlp\.up_proj has 10-bit codes"):
        convert(tmp_path, "aqlm")
    result = convert(tmp_path)
    assert result["dense_layers"] == ["model.layers.0.mlp.up_proj"]
    logits = load_model(tmp_path / "out", "cpu")(ids).logits
    torch.testing.assert_close(logits, layers(ids).logits, rtol=1e-4, atol=1e-4)


class Hostile:
    """Unpickling an object of this class would create the file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def test_a_hostile_pickle_runs_nothing(layers: Any, tmp_path: Path) -> None:
    block = torch.load(tmp_path / "layers" / "0.pth", weights_only=False)
    block.extra = Hostile(tmp_path / "owned")
    torch.save(block, tmp_path / "layers" / "0.pth")
    torch.load(tmp_path / "layers" / "0.pth", weights_only=False)
    assert (tmp_path / "owned").exists(), "the pickle does what it should"
    (tmp_path / "owned").unlink()
    assert convert(tmp_path)["layers"] == 14
    assert not (tmp_path / "owned").exists()
    torch.save(Hostile(tmp_path / "owned"), tmp_path / "layers" / "0.pth")
    torch.save({"a": Hostile(tmp_path / "owned")}, tmp_path / "layers" / "not_quantized_weights.pt")
    for file in ("0.pth", "not_quantized_weights.pt"):
        with pytest.raises((ValueError, pickle.UnpicklingError)):
            unpickle.read(tmp_path / "layers" / file, "model.layers.")
    assert not (tmp_path / "owned").exists()


def second_level(folder: Path) -> None:
    block = torch.load(folder / "1.pth", weights_only=False)
    block.mlp.up_proj.quantized_weight.scales_clusters = nn.Parameter(torch.zeros(128, 4))
    torch.save(block, folder / "1.pth")


def quantised_codebooks(folder: Path) -> None:
    block = torch.load(folder / "1.pth", weights_only=False)
    block.mlp.up_proj.quantized_weight.codebook_value_nbits = 4
    torch.save(block, folder / "1.pth")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (second_level, r"mlp\.up_proj has scales_clusters"),
        (quantised_codebooks, r"mlp\.up_proj.* 4-bit values"),
        (lambda folder: torch.save([1], folder / "1.pth"), r"holds no tensors"),
    ],
)
def test_layers_that_cannot_be_understood(
    layers: Any, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(tmp_path / "layers")
    with pytest.raises(ValueError, match=message):
        unpickle.read(tmp_path / "layers" / "1.pth", "model.layers.")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "1.pth").write_bytes(b"PK"), r"1\.pth cannot be read"),
        (lambda folder: (folder / "1.pth").rename(folder / "2.pth"), r"has no 1\.pth"),
        (lambda folder: (folder / "1.pth").unlink(), r"holds 1 layers, but .*base has 2"),
        (lambda folder: (folder / "not_quantized_weights.pt").unlink(), r"no not_quantized_weights\.pt"),
        (lambda folder: torch.save({"x": torch.ones(1)}, folder / "not_quantized_weights.pt"), r"is missing"),
    ],
)
def test_damaged_layer_checkpoints(layers: Any, tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(tmp_path / "layers")
    with pytest.raises(BadInput, match=message):
        convert(tmp_path)
    assert not (tmp_path / "out").exists()


def test_pickles_are_read_on_request_only(layers: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--allow-pickle"):
        convert_folder(tmp_path / "layers", tmp_path / "out", base=tmp_path / "base")
    with pytest.raises(BadInput, match="--base"):
        convert_folder(tmp_path / "layers", tmp_path / "out", allow_pickle=True)


@settings(deadline=None, max_examples=60)
@given(
    m=st.integers(1, 4),
    bits=st.integers(1, 8),
    v=st.sampled_from([4, 8, 16]),
    words=st.integers(1, 5),
    groups=st.sampled_from([1, 2, 4]),
    rows=st.integers(1, 9),
    signed=st.booleans(),
)
def test_packing_keeps_every_bit(m: int, bits: int, v: int, words: int, groups: int, rows: int, signed: bool) -> None:
    """Random shapes: what is packed reads back as the same codes, and means the same weight."""
    codes = torch.randint(0, 2**bits, (rows, 4 * words, m))
    given = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes) if signed else codes
    codebooks, scales = torch.randn(m, 2**bits, 1, v), torch.rand(rows, groups, 1, 1)
    matrix = AdditiveMatrix(given.short(), codebooks, scales)
    named = zip(("codes", "codebooks", "scales"), matrix, strict=True)
    kinds = {"codes": "I16", "codebooks": "F32", "scales": "F32"}
    headers = {f"x.{part}": TensorHeader(kinds[part], tuple(t.shape), t.nbytes, Path()) for part, t in named}
    form = AdditiveForm.from_headers("x", headers)
    assert form == (rows, 4 * words * v, m, bits, 1, v, groups)
    packed = matrix.pack()
    assert {part: tuple(t.shape) for part, t in packed._asdict().items()} == form.scheme("x").shapes(
        rows, form.in_features
    )
    assert torch.equal(unpack_codes(packed.codes).long(), codes)
    torch.testing.assert_close(packed.dequantize(), matrix.dequantize(), rtol=1e-6, atol=1e-6)
    if groups == 1:
        again = packed.to_additive().pack()
        assert all(torch.equal(a, b) for a, b in zip(packed, again, strict=True))
        assert isinstance(again, PackedMatrix)
