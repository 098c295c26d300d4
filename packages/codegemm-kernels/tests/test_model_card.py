"""The model card says what is in the folder, and nothing of the machine it was written on."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from codegemm_kernels import BadInput, CheckpointMetadata, CodebookScheme
from codegemm_kernels.model_card import REPORT_FILE, write_model_card

SCHEME = CodebookScheme.parse("m2v8g128")
BASE_CARD = """---
license: other
license_name: llama3.1
license_link: https://example.org/licence
base_model:
- owner/pretrained
---
# Base
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one quantised layer of 96 x 256 and an embedding of 1000 numbers, under its temporary name."""
    folder = tmp_path / ".small.partial"
    folder.mkdir()
    block = CheckpointMetadata(SCHEME).to_quantization_config()
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "quantization_config": block, "transformers_version": "5"})
    )
    shapes = SCHEME.shapes(96, 256)
    tensors = {
        "q.codes": torch.zeros(shapes["codes"], dtype=torch.int32),
        "q.codebooks": torch.zeros(shapes["codebooks"], dtype=torch.float16),
        "q.scales": torch.zeros(shapes["scales"], dtype=torch.float16),
        "embedding": torch.zeros(1000, dtype=torch.float16),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def card(folder: Path, source: str, text: str | None = None) -> str:
    write_model_card(folder, "small", source, text)
    return (folder / "README.md").read_text()


def test_it_says_what_is_in_the_folder(folder):
    text = card(folder, "owner/dense", BASE_CARD)
    # codes 2*8*96*4, codebooks 2*256*8*2, scales 2*96*2 bytes for 96*256 weights; 2000 bytes of embedding
    quantised = 6144 + 8192 + 384
    assert f"| bits a weight | {8 * quantised / (96 * 256):.3f} in" in text
    assert "| size | 0.0 MB: 0.0 MB in" in text
    assert "| scheme | m2v8g128: 2 codebooks of 256 vectors of 8 weights, a scale for 128 weights of a row |" in text
    assert "LlamaForCausalLM in which 1 linear layers" in text
    assert f"torch {torch.__version__}, transformers 5 |" in text
    assert 'AutoModelForCausalLM.from_pretrained("small", device_map="auto")' in text
    assert ".partial" not in text


def test_base_model_and_licence_come_from_the_base_models_card(folder):
    text = card(folder, "owner/dense", BASE_CARD)
    header = text.split("---\n")[1].splitlines()
    assert 'base_model: "owner/dense"' in header, "the model itself, not what that was made from"
    assert "base_model_relation: quantized" in header
    assert {'license: "other"', 'license_name: "llama3.1"', 'license_link: "https://example.org/licence"'} <= {*header}
    assert "whose card says `llama3.1` (https://example.org/licence)" in text
    without = card(folder, "owner/dense")
    assert "license" not in without.split("---\n")[1]
    assert "look there before you publish" in without


def test_a_model_made_from_a_quantised_one_has_the_same_base_model(folder, tmp_path):
    first = tmp_path / "first"
    first.mkdir()
    (first / "README.md").write_text(card(folder, "owner/dense", BASE_CARD))
    again = card(folder, str(first))
    assert 'base_model: "owner/dense"\n' in again
    assert "`llama3.1`" in again


def test_a_local_folder_is_called_by_its_name_only(folder, tmp_path):
    (tmp_path / "dense").mkdir()
    text = card(folder, str(tmp_path / "dense"))
    assert str(tmp_path) not in text
    assert 'base_model: "dense"  # a local folder' in text
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    assert 'base_model: "owner/name"\n' in card(folder, str(snapshot))
    assert "given in memory" in card(folder, "")


def test_quality_comes_from_the_report(folder):
    assert "Not measured when this was written" in card(folder, "owner/dense")
    report = {"divergence": {"before": 0.25, "after": 0.125}, "measured_on": "held-out windows"}
    (folder / REPORT_FILE).write_text(json.dumps(report))
    text = card(folder, "owner/dense")
    assert "| KL divergence from the base model's predictions | 0.2500 | 0.1250 |" in text
    assert "on held-out windows" in text
    (folder / REPORT_FILE).write_text(json.dumps({"divergence": None}))
    assert "Not measured" in card(folder, "owner/dense")


def test_schemes_by_layer_are_all_named(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["layers"] = {"other": "m1v4g128"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "| scheme | by layer: m1v4g128, m2v8g128" in card(folder, "owner/dense")


def test_a_dense_folder_gets_none(folder):
    (folder / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="not quantised"):
        card(folder, "owner/dense")
