import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from codegemm_kernels import BadInput, CheckpointMetadata, CodebookScheme, NumericalError, reference
from codegemm_kernels.checkpoint import check_layer, checkpoint_files, quantized_names, read_config, read_headers
from codegemm_quant import QuantizeConfig, block_fit, quantize


@pytest.fixture
def config(tiny_model, text_file, tmp_path):
    return QuantizeConfig(
        model=str(tiny_model()),
        data=str(text_file),
        out=str(tmp_path / "out"),
        scheme="m1v4g32",
        samples=16,
        sequence_length=32,
        device="cpu",
        rounds=1,
        tune_epochs=1,
        model_epochs=1,
    )


def dequantised_model(folder, dense_folder):
    """The checkpoint with every weight rebuilt by the reference arithmetic, in an ordinary transformers model."""
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    tensors = load_file(folder / "model.safetensors")
    state = {name: value for name, value in tensors.items() if name.rpartition(".")[2] in ("weight", "bias")}
    for name in quantized_names(read_headers(checkpoint_files(folder))):
        parts = [tensors[f"{name}.{part}"] for part in ("codes", "codebooks", "scales")]
        state[f"{name}.weight"] = reference.dequantize(*parts)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    return model


def test_a_checkpoint_is_ready_and_whole(config):
    report = quantize(config)
    folder = Path(config.out)
    assert list(report) == ["out", "scheme", "bits_per_weight", "seconds", "blocks", "effort", "stages"]
    assert (report["out"], report["scheme"], report["blocks"]) == (config.out, "m1v4g32", 2)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert [p for p in folder.parent.iterdir() if "partial" in p.name or p.name.endswith(".work")] == []

    metadata = CheckpointMetadata.from_config(read_config(folder))
    headers = read_headers(checkpoint_files(folder))
    dense = AutoModelForCausalLM.from_pretrained(config.model)
    names = quantized_names(headers)
    assert len(names) == 14
    assert metadata.modules_to_not_convert == ("lm_head",)
    bits = weights = 0
    for name in names:
        linear = dense.get_submodule(name)
        assert check_layer(name, metadata.scheme, linear.out_features, linear.in_features, headers) == []
        assert f"{name}.weight" not in headers
        size = linear.weight.numel()
        weights += size
        bits += size * CodebookScheme(1, 4, 32).bits_per_weight(*linear.weight.shape)
    assert report["bits_per_weight"] == pytest.approx(bits / weights)
    assert "lm_head.weight" not in headers
    published = read_config(folder)["codegemm"]
    assert published["vec_len"] == 4
    assert "mlp.down_proj" in published["arch_config"]["module_names"]

    tokens = torch.randint(2, 258, (2, 20))
    with torch.no_grad():
        expected = dense(tokens).logits.float()
        actual = dequantised_model(folder, config.model)(tokens).logits.float()
    assert (actual - expected).norm() < 0.4 * expected.norm()


def test_the_ends_of_the_model_are_tuned_with_it(config, capsys):
    """Embedding and last norm, on other versions of the windows too; without tuning they stay as they are."""
    sharp = AutoConfig.from_pretrained(config.model, initializer_range=0.2)  # predictions that are not all alike
    AutoModelForCausalLM.from_config(sharp, dtype=torch.bfloat16).save_pretrained(config.model)
    quick = replace(config, rounds=0, tune_epochs=0, samples=64)
    report = quantize(replace(quick, model_epochs=4))
    assert report["stages"]["model tuning"] > 0
    bars = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "tune the model" in line]
    assert "100%" in bars[-1], "held-out batches are no steps of the bar"
    told = json.loads((Path(config.out) / "quantization_report.json").read_text())
    assert told["divergence"]["after"] < told["divergence"]["before"]
    untuned = replace(quick, model_epochs=0, samples=8, out=f"{config.out}-untuned")
    quantize(untuned)
    ends = ("model.embed_tokens.weight", "model.norm.weight")
    dense = load_file(Path(config.model) / "model.safetensors")
    for folder, same in ((config.out, False), (untuned.out, True)):
        stored = load_file(Path(folder) / "model.safetensors")
        assert [torch.equal(stored[name], dense[name]) for name in ends] == [same, same]


def test_biases_are_kept(config, tiny_model):
    folder = tiny_model("qwen2")
    quantize(replace(config, model=str(folder), tune_epochs=0, model_epochs=0))
    before, after = load_file(folder / "model.safetensors"), load_file(Path(config.out) / "model.safetensors")
    biases = [name for name in before if name.endswith("bias")]
    assert len(biases) == 6
    assert all(torch.equal(before[name], after[name]) for name in biases)


def test_skipped_layers_stay_dense(config):
    quantize(replace(config, skip=("*.down_proj", "model.layers.0.*"), tune_epochs=0, model_epochs=0))
    headers = read_headers(checkpoint_files(Path(config.out)))
    assert len(quantized_names(headers)) == 6
    assert "model.layers.1.mlp.down_proj.weight" in headers
    metadata = CheckpointMetadata.from_config(read_config(Path(config.out)))
    assert "model.layers.0.self_attn.q_proj" in metadata.modules_to_not_convert


def test_an_interrupted_run_continues_to_the_same_bits(config, monkeypatch, tmp_path):
    undisturbed = replace(config, out=str(tmp_path / "undisturbed"))
    quantize(undisturbed)
    original = block_fit.tune_block

    def interrupted(*args):
        if args[-1].name.endswith(".1"):
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(block_fit, "tune_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(config)
    monkeypatch.setattr(block_fit, "tune_block", original)
    assert not Path(config.out).exists()
    assert (tmp_path / "out.work" / "block-0000.safetensors").exists()
    with pytest.raises(BadInput, match="--resume"):
        quantize(config)
    with pytest.raises(BadInput, match="seed was 0, now 1"):
        quantize(replace(config, resume=True, seed=1))
    text = Path(config.data).read_text()
    Path(config.data).write_text(text[::-1])
    with pytest.raises(BadInput, match="text was"):
        quantize(replace(config, resume=True))
    Path(config.data).write_text(text)
    quantize(replace(config, resume=True))
    files = [Path(run.out) / "model.safetensors" for run in (config, undisturbed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_nothing_half_written_is_left_when_saving_fails(config, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(OSError, match=r"cannot write .*out .*No space left.*--resume"):
        quantize(replace(config, tune_epochs=0, model_epochs=0))
    left = sorted(path.name for path in Path(config.out).parent.iterdir() if path.name.lstrip(".").startswith("out"))
    assert left == ["out.work"]


def test_nan_in_a_weight_names_the_layer(config):
    path = Path(config.model) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"layers\.1\.mlp\.up_proj.*not finite"):
        quantize(config)
    assert not Path(config.out).exists()
    assert not Path(f"{config.out}.work").exists()


def test_moments_that_overflow_name_the_layer(config):
    path = Path(config.model) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.post_attention_layernorm.weight"] *= 1e15
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        NumericalError, match=r"model\.layers\.1\.mlp\.down_proj: its calibration inputs are not finite"
    ):
        quantize(config)
    assert not Path(config.out).exists()


def test_a_singular_second_moment_is_damped_and_told(config, capfd):
    path = Path(config.model) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.v_proj.weight"].zero_()  # so that o_proj sees nothing
    save_file(tensors, path, metadata={"format": "pt"})
    quantize(replace(config, rounds=0, model_epochs=0))
    assert "model.layers.0.self_attn.o_proj: the second moment of its inputs is singular" in capfd.readouterr().err


def test_models_that_cannot_be_quantised(config, tmp_path):
    with pytest.raises(BadInput, match=r"layers\.0\.self_attn\.q_proj has 64 input features.*g48"):
        quantize(replace(config, scheme="m1v4g48"))
    with pytest.raises(BadInput, match="sequence_length 200 is more than the 128 positions"):
        quantize(replace(config, sequence_length=200))
    with pytest.raises(BadInput, match="every linear layer is skipped"):
        quantize(replace(config, skip=("*",)))
    folder = tmp_path / "gpt2"
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 258, "n_positions": 64}
    AutoModelForCausalLM.from_config(GPT2Config(**shape)).save_pretrained(folder)
    for file in Path(config.model).glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(BadInput, match="nothing to quantise"):
        quantize(replace(config, model=str(folder), sequence_length=16))


def test_an_out_folder_that_cannot_be_written_is_refused_at_once(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"cannot write in .*file"):
        quantize(replace(config, model="nowhere", out=str(tmp_path / "file" / "out")))


def test_the_checkpoint_says_the_dtype_it_is_stored_in(config):
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float16)
    model.save_pretrained(config.model)
    quantize(replace(config, rounds=0, tune_epochs=0, model_epochs=1))
    assert read_config(Path(config.out))["dtype"] == "float16"


def test_damaged_models_are_refused(config, tmp_path):
    path = Path(config.model) / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(BadInput, match=r"model\.safetensors.*cut short"):
        quantize(config)
    path.write_bytes(whole)
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"lacks 1 of.*layers\.0\.mlp\.up_proj"):
        quantize(config)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(90, 64, dtype=torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"layers\.0\.mlp\.up_proj.weight has shape \[90, 64\].*\[96, 64\]"):
        quantize(config)
    with pytest.raises(BadInput, match="there is no folder"):
        quantize(replace(config, model=str(tmp_path / "nowhere")))
    with pytest.raises(BadInput, match=r"no config\.json"):
        quantize(replace(config, model=str(tmp_path)))


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-c", "from codegemm_quant.cli import main; main()", "quantize", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_line_ends_with_json_or_a_sentence(config, tmp_path):
    options = ["--data", config.data, "--samples", 4, "--sequence-length", 32, "--device", "cpu", "--rounds", 0]
    options += ["--tune-epochs", 0, "--model-epochs", 0, "--scheme", "m2v8g32"]
    done = command(config.model, *options, "--out", config.out)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["scheme"] == "m2v8g32"
    again = command(config.model, *options, "--out", config.out)
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1].startswith("error: ")
    assert "exists already" in again.stderr
    assert "Traceback" not in again.stderr
    wrong = command(config.model, *options[:-1], "m9v4g128", "--out", tmp_path / "x")
    assert wrong.returncode == 2
    assert "must be 1 to 4" in " ".join(wrong.stderr.replace("│", " ").split())
