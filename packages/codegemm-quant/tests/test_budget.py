"""Schemes by layer within a budget of bits, and what a run would take."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from codegemm_kernels import BadInput, CheckpointMetadata, CodebookScheme
from codegemm_kernels.checkpoint import check_layer, checkpoint_files, quantized_names, read_config, read_headers
from codegemm_quant import QuantizeConfig, quantize
from codegemm_quant.bit_allocation import Sensitivity, allocate, candidates

CHEAP, DEAR, DEAREST = (CodebookScheme.parse(text) for text in ("m1v8g128", "m1v4g128", "m2v4g128"))


@pytest.fixture
def config(tiny_model, text_file, tmp_path):
    efforts = {"samples": 16, "sequence_length": 32, "rounds": 0, "tune_epochs": 0, "model_epochs": 0}
    return QuantizeConfig(str(tiny_model()), str(text_file), str(tmp_path / "out"), device="cpu", **efforts)


def layer(weights, *losses):
    bits = dict(zip((CHEAP, DEAR, DEAREST), (weights, 2 * weights, 4 * weights), strict=True))
    return Sensitivity(weights, bits, dict(zip((CHEAP, DEAR, DEAREST), losses, strict=True)))


def test_bits_go_where_they_save_most():
    layers = {"a": layer(100, 1.0, 0.5, 0.1), "b": layer(100, 0.2, 0.1, 0.02), "c": layer(100, 0.1, 0.1, 0.1)}
    assert allocate(layers, 1.0) == {"a": CHEAP, "b": CHEAP, "c": CHEAP}
    assert allocate(layers, 1.4) == {"a": DEAR, "b": CHEAP, "c": CHEAP}
    assert allocate(layers, 2.0) == {"a": DEAREST, "b": CHEAP, "c": CHEAP}
    assert allocate(layers, 7.0) == {"a": DEAREST, "b": DEAREST, "c": CHEAP}
    with pytest.raises(BadInput, match=r"bits 0\.9 is too few.*1\.000"):
        allocate(layers, 0.9)


def test_only_schemes_that_fit_are_candidates():
    assert [str(scheme) for scheme in candidates(64, 96)] == ["m1v4g-1", "m2v4g-1"]
    assert "m1v8g128" in map(str, candidates(512, 1024))


def test_a_checkpoint_keeps_to_its_budget(config):
    report = quantize(replace(config, bits=7.5))
    folder = Path(config.out)
    headers, metadata = read_headers(checkpoint_files(folder)), CheckpointMetadata.from_config(read_config(folder))
    layers = json.loads((folder / "quantization_report.json").read_text())["per_block"][0]["layers"]
    schemes = {metadata.scheme_of(name) for name in quantized_names(headers)}
    assert len(schemes) == 2
    assert 6.2 < report["bits_per_weight"] <= 7.5  # codebooks weigh much in so small a model
    assert report["scheme"] == "mixed"
    shapes = {"self_attn.q_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.down_proj": (64, 96)}
    for short, shape in shapes.items():
        name = f"model.layers.0.{short}"
        assert check_layer(name, metadata.scheme_of(name), *shape, headers) == []
        assert layers[short]["scheme"] == str(metadata.scheme_of(name))
        assert 0 < layers[short]["relative_error"] < layers[short]["relative_error_of_kmeans"] * 1.01
    assert (folder / "quantization_errors.png").read_bytes().startswith(b"\x89PNG")


def test_a_dry_run_says_what_would_come(config):
    dry = quantize(replace(config, dry_run=True, scheme="m1v4g32"))
    assert not Path(config.out).parent.joinpath("out.work").exists()
    assert not Path(config.out).exists()
    real = quantize(replace(config, scheme="m1v4g32"))
    assert dry["matrices"] == 14
    assert dry["bits_per_weight"] == pytest.approx(real["bits_per_weight"])
    stored = (Path(config.out) / "model.safetensors").stat().st_size
    assert dry["bytes_quantized"] == pytest.approx(stored, rel=0.1)  # names and shapes take some bytes too
    assert dry["seconds"] > 0
    assert 0 < dry["device_memory_gb"] < 1
    with pytest.raises(BadInput, match="exists already"):
        quantize(replace(config, dry_run=True))
