import json

import pytest
import torch
from safetensors.torch import save_file

from codegemm_kernels import CheckpointError, CheckpointMetadata, CodebookScheme
from codegemm_kernels.checkpoint import check_layer, checkpoint_files, quantized_names, read_config, read_headers

SCHEME = CodebookScheme.parse("m2v8g32")
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    shapes = SCHEME.shapes(12, 64)
    tensors = {f"{LAYER}.{part}": torch.zeros(shapes[part], dtype=torch.float16) for part in ("codebooks", "scales")}
    tensors[f"{LAYER}.codes"] = torch.zeros(shapes["codes"], dtype=torch.int32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": CheckpointMetadata(SCHEME).to_quantization_config()})
    )
    return tmp_path


def headers_of(folder):
    return read_headers(checkpoint_files(folder))


def test_a_sound_layer_has_no_problems(folder):
    headers = headers_of(folder)
    assert quantized_names(headers) == [LAYER]
    assert check_layer(LAYER, SCHEME, 12, 64, headers) == []
    assert headers[f"{LAYER}.codes"].nbytes == 2 * 2 * 12 * 4


def test_finds_shards_through_the_index(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    weight_map = {f"{LAYER}.codes": "model-00001-of-00001.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert [file.name for file in checkpoint_files(folder)] == ["model-00001-of-00001.safetensors"]
    (folder / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001\.safetensors is missing"):
        checkpoint_files(folder)


@pytest.mark.parametrize("keep", [-1, 4, 40])
def test_a_truncated_file_is_named(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        headers_of(folder)


def test_a_file_with_more_than_its_header_says_is_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match=r"model\.safetensors holds"):
        headers_of(folder)


def test_garbage_is_no_safetensors_file(folder):
    (folder / "model.safetensors").write_bytes((5).to_bytes(8, "little") + b"[1,2]")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        headers_of(folder)


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("codes", torch.zeros(2, 2, 11, dtype=torch.int32), r"codes in model\.safetensors has shape \[2, 2, 11\]"),
        ("codes", torch.zeros(2, 2, 12), r"codes in model\.safetensors is F32, not I32"),
        ("codebooks", torch.zeros(2, 256, 4, dtype=torch.float16), "codebooks .* needs"),
        ("scales", torch.zeros(2, 12, dtype=torch.float64), "scales .* is F64"),
        ("scales", None, "scales is missing"),
    ],
)
def test_a_wrong_tensor_is_named(folder, part, tensor, message):
    shapes = SCHEME.shapes(12, 64)
    tensors = {f"{LAYER}.{p}": torch.zeros(shapes[p], dtype=torch.float16) for p in ("codebooks", "scales")}
    tensors[f"{LAYER}.codes"] = torch.zeros(shapes["codes"], dtype=torch.int32)
    del tensors[f"{LAYER}.{part}"]
    if tensor is not None:
        tensors[f"{LAYER}.{part}"] = tensor
    save_file(tensors, folder / "model.safetensors")
    problems = check_layer(LAYER, SCHEME, 12, 64, headers_of(folder))
    assert len(problems) == 1
    with pytest.raises(CheckpointError, match=message):
        raise CheckpointError(problems[0])


def test_a_layer_the_scheme_cannot_store_is_one_problem(folder):
    assert "multiple of" in check_layer(LAYER, SCHEME, 12, 65, headers_of(folder))[0]


def test_quantization_config_round_trip():
    metadata = CheckpointMetadata(SCHEME, {"a.b": CodebookScheme(1, 4)}, ("lm_head",))
    block = json.loads(json.dumps(metadata.to_quantization_config()))
    assert block["quant_method"] == "codegemm"
    assert CheckpointMetadata.from_config({"quantization_config": block}) == metadata
    assert metadata.scheme_of("a.b") == CodebookScheme(1, 4)
    assert metadata.scheme_of("c") == SCHEME


def test_published_block_round_trip():
    names = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")]
    block = CheckpointMetadata(SCHEME).to_published_block(names)
    assert block == {
        "arch_config": {
            "layers_name": "layers",
            "model_name": "model",
            "module_names": ["self_attn.q_proj", "mlp.down_proj"],
        },
        "group_size": 32,
        "vec_len": 8,
        "num_codebooks": 2,
        "nbits_per_codebook": 8,
    }
    assert CheckpointMetadata.from_config({"codegemm": block}) == CheckpointMetadata(SCHEME)


def test_layers_of_several_schemes_have_no_published_block():
    metadata = CheckpointMetadata(SCHEME, {"model.layers.0.x": CodebookScheme(1, 4)})
    assert metadata.to_published_block(["model.layers.0.x"]) is None


def test_no_block_is_no_metadata():
    assert CheckpointMetadata.from_config({"quantization_config": {"quant_method": "other"}}) is None
    assert CheckpointMetadata.from_config({}) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": {"quant_method": "codegemm", "format_version": 9}}, "format_version 9"),
        ({"quantization_config": {"quant_method": "codegemm"}}, "not usable"),
        ({"quantization_config": {"quant_method": "codegemm", "scheme": "q4"}}, "not usable.*q4"),
        ({"codegemm": {"group_size": 128}}, "lacks or garbles"),
        ({"codegemm": {"group_size": 128, "vec_len": 8, "num_codebooks": 1, "nbits_per_codebook": 16}}, "16-bit"),
    ],
)
def test_a_block_that_cannot_be_understood_is_refused(config, message):
    with pytest.raises(CheckpointError, match=message):
        CheckpointMetadata.from_config(config)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "no config.json"), ("{", "not valid JSON"), ("[]", "JSON object")]
)
def test_a_folder_that_is_no_checkpoint_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is n"):
        read_config(tmp_path / "nowhere")
