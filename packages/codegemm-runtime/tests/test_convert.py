"""codegemm-runtime convert, on folders built here from the descriptions of the formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from codegemm_kernels import BadInput, CheckpointError, unpack_codes
from codegemm_runtime import inspect_folder, load_model, load_tokenizer
from codegemm_runtime.convert.conversion import convert_folder
from codegemm_runtime.convert.writer import FolderWriter

Q = "model.layers.1.self_attn.q_proj"


def random_additive(n: int, k: int, m: int, bits: int, o: int, v: int, groups: int = 1) -> dict[str, Tensor]:
    """Codes as AQLM stores them: signed, in the smallest integer type that holds them."""
    codes = torch.randint(0, 2**bits, (n // o, k // v, m))
    signed = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
    return {
        "codes": signed.to(torch.int8 if bits <= 8 else torch.int16),
        "codebooks": (0.1 * torch.randn(m, 2**bits, o, v)).half(),
        "scales": (0.5 + torch.rand(n // o, groups, 1, 1)).half(),
    }


def additive_weight(parts: dict[str, Tensor]) -> Tensor:
    """The weight by the definition, block by block, in fp64."""
    codebooks, scales = parts["codebooks"].double(), parts["scales"].double()
    m, entries, o, v = codebooks.shape
    rows, positions, _ = parts["codes"].shape
    codes = parts["codes"].long() % entries
    scale = scales[:, :, 0, 0].repeat_interleave(positions // scales.shape[1], dim=1)
    blocks = sum(codebooks[i][codes[:, :, i]] for i in range(m)) * scale[:, :, None, None]
    return blocks.permute(0, 2, 1, 3).reshape(rows * o, positions * v)


def use_additive(checkpoint: Any, m: int, bits: int, o: int, v: int) -> None:
    """Make `checkpoint` an AQLM one, and its dense model that of the same codes."""
    for name in checkpoint.layers:
        linear = checkpoint.dense.get_submodule(name)
        parts = random_additive(linear.out_features, linear.in_features, m, bits, o, v)
        linear.weight.data = additive_weight(parts).float()
        checkpoint.tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    checkpoint.tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in checkpoint.tensors.items()
    }
    checkpoint.write(shards=3)
    block = {"quant_method": "aqlm", "nbits_per_codebook": bits, "num_codebooks": m, "out_group_size": o}
    block |= {"in_group_size": v, "linear_weights_not_to_quantize": ["lm_head.weight"]}
    checkpoint.edit_config(quantization_config=block, codegemm=None, dtype=None, torch_dtype="float16")


def relative_error(logits: Tensor, exact: Tensor) -> float:
    return ((logits.float() - exact).norm() / exact.norm()).item()


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def config_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    assert isinstance(config, dict)
    return config


def same_block(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether the published blocks say the same; the order of module names means nothing."""
    names = [set(config["codegemm"]["arch_config"].pop("module_names")) for config in (first, second)]
    return names[0] == names[1] and first["codegemm"] == second["codegemm"]


@pytest.fixture
def aqlm(make_checkpoint: Callable[..., Any], write_tokenizer: Callable[..., None]) -> Callable[..., Any]:
    def make(m: int = 2, bits: int = 8, o: int = 1, v: int = 8, architecture: str = "qwen2") -> Any:
        checkpoint = make_checkpoint(architecture)
        use_additive(checkpoint, m, bits, o, v)
        write_tokenizer(checkpoint.folder)
        return checkpoint

    return make


@pytest.mark.parametrize(("m", "bits", "v"), [(2, 8, 8), (1, 8, 8), (3, 8, 8), (4, 8, 16), (2, 6, 8), (1, 8, 4)])
def test_aqlm_comes_in_bit_for_bit(
    aqlm: Callable[..., Any], ids: Tensor, tmp_path: Path, m: int, bits: int, v: int
) -> None:
    checkpoint = aqlm(m, bits, 1, v)
    result = convert_folder(checkpoint.folder, tmp_path / "ours")
    assert (result["from"], result["to"], result["scheme"]) == ("aqlm", "codegemm", f"m{m}v{v}g-1")
    assert (result["layers"], result["dense_layers"]) == (14, [])
    ours = stored(tmp_path / "ours")
    for name in checkpoint.layers:
        was = {part: checkpoint.tensors[f"{name}.{part}"] for part in ("codes", "codebooks", "scales")}
        assert torch.equal(unpack_codes(ours[f"{name}.codes"]).long(), was["codes"].long() % 2**bits)
        assert torch.equal(ours[f"{name}.codebooks"][:, : 2**bits], was["codebooks"][:, :, 0])
        assert torch.equal(ours[f"{name}.scales"][0], was["scales"].flatten())
        bias = f"{name}.bias"
        assert (bias in ours) == (bias in checkpoint.tensors) == (name.split(".")[-1] in ("q_proj", "k_proj", "v_proj"))
        assert bias not in ours or torch.equal(ours[bias], checkpoint.tensors[bias])
    model = load_model(tmp_path / "ours", "cpu", torch.float32)
    assert relative_error(model(ids).logits, checkpoint.dense.half().float()(ids).logits) < 2e-3
    assert load_tokenizer(tmp_path / "ours").decode(load_tokenizer(checkpoint.folder)("ab").input_ids) == "ab"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("m", "bits", "o", "v"), [(1, 16, 1, 8), (2, 8, 2, 8), (5, 8, 1, 8)])
def test_aqlm_that_has_no_exact_form_becomes_dense(
    aqlm: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], m: int, bits: int, o: int, v: int
) -> None:
    checkpoint = aqlm(m, bits, o, v, "llama")
    result = convert_folder(checkpoint.folder, tmp_path / "dense")
    assert (result["to"], result["scheme"], result["dense_layers"]) == ("dense", None, sorted(checkpoint.layers))
    err = capsys.readouterr().err
    assert "model.layers.0.mlp.down_proj" in err
    assert f"codegemm-quant quantize {tmp_path / 'dense'} --data" in err
    assert inspect_folder(tmp_path / "dense").problems == []
    weights = stored(tmp_path / "dense")
    for name in checkpoint.layers:
        assert torch.equal(weights[f"{name}.weight"], checkpoint.dense.get_submodule(name).weight.half())
    assert "quantization_config" not in config_of(tmp_path / "dense")


def test_loading_aqlm_says_how_to_convert_it(aqlm: Callable[..., Any]) -> None:
    folder = aqlm().folder
    with pytest.raises(BadInput, match=r"is an AQLM checkpoint: .*codegemm-runtime convert"):
        load_model(folder, "cpu")
    (problem,) = inspect_folder(folder).problems
    assert f"codegemm-runtime convert {folder} OUT" in problem


def test_aqlm_to_dense_on_request(aqlm: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = aqlm()
    convert_folder(checkpoint.folder, tmp_path / "dense", "dense", torch.float32)
    model = load_model(tmp_path / "dense", "cpu")
    for name in checkpoint.layers:
        torch.testing.assert_close(
            model.get_submodule(name).weight, checkpoint.dense.get_submodule(name).weight, rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize("shards", [1, 4])
def test_published_folder(
    make_checkpoint: Callable[..., Any], ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    """Declared fp16, stored as bf16 and fp32: what is written has one dtype and loads as the source does."""
    checkpoint = make_checkpoint("qwen3", "m1v4g64", published=True)
    checkpoint.edit_config(dtype=None, torch_dtype="float16")
    checkpoint.tensors = {
        name: tensor.bfloat16() if name.endswith(".scales") else tensor for name, tensor in checkpoint.tensors.items()
    }
    checkpoint.write(shards=2)
    monkeypatch.setattr("codegemm_runtime.convert.writer.SHARD_BYTES", 30_000 if shards > 1 else 2**30)
    convert_folder(checkpoint.folder, tmp_path / "ours")
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 1) == (shards > 1)
    config = config_of(tmp_path / "ours")
    assert config["quantization_config"]["scheme"] == "m1v4g64"
    assert same_block(config, config_of(checkpoint.folder))
    assert (config["dtype"], "torch_dtype" in config) == ("float16", False)
    ours = stored(tmp_path / "ours")
    assert all(torch.equal(ours[name], t) for name, t in checkpoint.tensors.items() if name.endswith(".codes"))
    assert {tensor.dtype for tensor in ours.values()} == {torch.float16, torch.int32}
    loaded, source = load_model(tmp_path / "ours", "cpu"), load_model(checkpoint.folder, "cpu")
    assert torch.equal(loaded(ids).logits, source(ids).logits)


def test_ours_to_aqlm_and_back(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = make_checkpoint("qwen2", "m2v8g-1", torch.float16)
    result = convert_folder(checkpoint.folder, tmp_path / "aqlm", "aqlm")
    assert (result["to"], result["layers"]) == ("aqlm", 14)
    block = config_of(tmp_path / "aqlm")["quantization_config"]
    assert {key: block[key] for key in ("quant_method", "nbits_per_codebook", "num_codebooks")} == {
        "quant_method": "aqlm",
        "nbits_per_codebook": 8,
        "num_codebooks": 2,
    }
    assert (block["in_group_size"], block["out_group_size"]) == (8, 1)
    assert block["linear_weights_not_to_quantize"] == ["lm_head.weight", "lm_head"]
    there = stored(tmp_path / "aqlm")
    assert (there[f"{Q}.codes"].dtype, there[f"{Q}.codes"].shape) == (torch.int8, (64, 8, 2))
    assert there[f"{Q}.codebooks"].shape == (2, 256, 1, 8)
    assert there[f"{Q}.scales"].shape == (64, 1, 1, 1)
    convert_folder(checkpoint.folder, tmp_path / "dense", "dense")
    weight = additive_weight({part: there[f"{Q}.{part}"] for part in ("codes", "codebooks", "scales")})
    assert torch.equal(weight.half(), stored(tmp_path / "dense")[f"{Q}.weight"])
    convert_folder(tmp_path / "aqlm", tmp_path / "again")
    again = stored(tmp_path / "again")
    assert again.keys() == checkpoint.tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in checkpoint.tensors.items())
    assert same_block(config_of(tmp_path / "again"), config_of(checkpoint.folder))


def test_groups_of_equal_scales_fit_aqlm(make_checkpoint: Callable[..., Any], tmp_path: Path, ids: Tensor) -> None:
    checkpoint = make_checkpoint("llama", "m2v8g32")
    for name in checkpoint.layers:
        scales = checkpoint.tensors[f"{name}.scales"]
        checkpoint.tensors[f"{name}.scales"] = scales[:1].expand_as(scales).contiguous()
    checkpoint.write()
    convert_folder(checkpoint.folder, tmp_path / "aqlm", "aqlm")
    convert_folder(tmp_path / "aqlm", tmp_path / "again")
    before, after = load_model(checkpoint.folder, "cpu")(ids).logits, load_model(tmp_path / "again", "cpu")(ids).logits
    assert relative_error(after, before) < 2e-5


@pytest.mark.parametrize(
    ("scheme", "layers", "message"),
    [
        ("m2v8g32", {}, r"model\.layers\.0\.mlp\.down_proj has 4 scales a row \(m2v8g32\)"),
        ("m2v8g-1", {Q: "m1v4g-1"}, r"q_proj has scheme m1v4g-1 and .* has m2v8g-1"),
    ],
)
def test_what_aqlm_cannot_hold_is_refused(
    make_checkpoint: Callable[..., Any], tmp_path: Path, scheme: str, layers: dict[str, str], message: str
) -> None:
    checkpoint = make_checkpoint("llama", scheme, layers=layers)
    with pytest.raises(BadInput, match=message):
        convert_folder(checkpoint.folder, tmp_path / "aqlm", "aqlm")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_mixed_schemes_to_dense(make_checkpoint: Callable[..., Any], tmp_path: Path, ids: Tensor) -> None:
    checkpoint = make_checkpoint("gemma2", "m2v8g32", layers={Q: "m1v4g-1"})
    convert_folder(checkpoint.folder, tmp_path / "dense", "dense")
    assert relative_error(load_model(tmp_path / "dense", "cpu")(ids).logits, checkpoint.dense(ids).logits) < 1e-5


def break_header(checkpoint: Any) -> None:
    next(checkpoint.folder.glob("*.safetensors")).write_bytes(b"\xff" * 64)


def drop(part: str) -> Callable[[Any], None]:
    def edit(checkpoint: Any) -> None:
        del checkpoint.tensors[part]
        checkpoint.write()

    return edit


def change(part: str, edit_tensor: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def edit(checkpoint: Any) -> None:
        checkpoint.tensors[part] = edit_tensor(checkpoint.tensors[part]).contiguous()
        checkpoint.write()

    return edit


def declare(**fields: Any) -> Callable[[Any], None]:
    def edit(checkpoint: Any) -> None:
        block = config_of(checkpoint.folder)["quantization_config"]
        checkpoint.edit_config(quantization_config=block | fields)

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_header, r"is cut short or no safetensors file"),
        (drop(f"{Q}.scales"), rf"{Q}\.scales is missing"),
        (drop(f"{Q}.bias"), rf"{Q}\.bias is missing"),
        (drop("model.norm.weight"), r"model\.norm\.weight is missing"),
        (change(f"{Q}.codes", lambda codes: codes[:5]), rf"{Q} do not belong together"),
        (change(f"{Q}.codes", lambda codes: codes.float()), rf"{Q} has codes of F32"),
        (change(f"{Q}.scales", lambda scales: scales.flatten()), rf"{Q} are no \[N/o"),
        (change(f"{Q}.codebooks", lambda books: books[:, :200]), rf"{Q} do not belong together"),
        (change(f"{Q}.codebooks", lambda books: books[:, :128]), rf"{Q} has 2 codebooks of 7 bits .* declares 2 of 8"),
        (change(f"{Q}.codebooks", lambda books: books * float("nan")), rf"{Q}\.codebooks holds NaN or inf"),
        (declare(num_codebooks=None), r"quantization_config of config\.json lacks or garbles"),
        (declare(quant_method="gptq"), r"quantised with 'gptq'"),
    ],
)
def test_damaged_aqlm_folders(
    aqlm: Callable[..., Any], tmp_path: Path, damage: Callable[[Any], None], message: str
) -> None:
    checkpoint = aqlm()
    damage(checkpoint)
    with pytest.raises(BadInput, match=message):
        convert_folder(checkpoint.folder, tmp_path / "ours")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_header, r"is cut short or no safetensors file"),
        (drop(f"{Q}.codebooks"), rf"{Q}\.codebooks is missing"),
        (drop("model.layers.0.input_layernorm.weight"), r"input_layernorm\.weight is missing"),
        (change(f"{Q}.codes", lambda codes: codes[:, :1]), rf"{Q}\.codes .*has shape"),
    ],
)
def test_damaged_published_folders(
    make_checkpoint: Callable[..., Any], tmp_path: Path, damage: Callable[[Any], None], message: str
) -> None:
    checkpoint = make_checkpoint("llama", published=True)
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        convert_folder(checkpoint.folder, tmp_path / "ours")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_what_is_refused_at_once(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama", dtype=torch.float32)
    with pytest.raises(BadInput, match="codegemm already"):
        convert_folder(checkpoint.folder, tmp_path / "out")
    with pytest.raises(BadInput, match="exists"):
        convert_folder(checkpoint.folder, checkpoint.folder, "dense")
    checkpoint.dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(BadInput, match=r"dense model: .*codegemm-quant quantize"):
        convert_folder(tmp_path / "dense", tmp_path / "out")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        convert_folder(tmp_path / "nothing", tmp_path / "out")


def test_overflow_names_the_tensor(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama", published=True)
    checkpoint.tensors[f"{Q}.scales"] *= 1e6
    checkpoint.write()
    with pytest.raises(BadInput, match=rf"{Q}\.scales .*--dtype bfloat16"):
        convert_folder(checkpoint.folder, tmp_path / "out", dtype=torch.float16)
    convert_folder(checkpoint.folder, tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(stored(tmp_path / "out")[f"{Q}.scales"], checkpoint.tensors[f"{Q}.scales"].bfloat16())


def test_nothing_is_left_of_an_interrupted_conversion(
    make_checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint("llama")

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FolderWriter, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert_folder(checkpoint.folder, tmp_path / "out", "dense")
    with monkeypatch.context() as patch:
        patch.setattr("codegemm_runtime.convert.writer.save_file", lambda *a, **o: (_ for _ in ()).throw(OSError(28)))
        with pytest.raises(OSError, match=r"cannot write .*make room"):
            convert_folder(checkpoint.folder, tmp_path / "out", "dense")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}
