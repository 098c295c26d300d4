"""Runs that are killed at any moment and continued."""

import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from codegemm_kernels import BadInput
from codegemm_quant import QuantizeConfig, ptq, quantize


@pytest.fixture
def options(tiny_model, text_file, tmp_path):
    return {
        "model": str(tiny_model()),
        "data": str(text_file),
        "out": str(tmp_path / "out"),
        "scheme": "m1v4g32",
        "samples": 16,
        "sequence_length": 32,
        "device": "cpu",
        "rounds": 1,
        "tune_epochs": 1,
        "model_epochs": 1,
    }


@pytest.fixture(scope="module")
def start():
    """Start a run in a process of its own, from a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["codegemm_quant", "transformers.models.llama.modeling_llama"])

    def start_run(options):
        process = context.Process(target=quantize, args=(QuantizeConfig(**options),))
        process.start()
        return process

    return start_run


def test_a_run_killed_at_random_moments_ends_as_an_undisturbed_one(options, start, tmp_path):
    undisturbed = start(options | {"out": str(tmp_path / "undisturbed")})
    undisturbed.join(300)
    assert undisturbed.exitcode == 0
    chooser = random.Random(0)
    work, out = tmp_path / "out.work", Path(options["out"])
    exits = []
    while not out.exists() and len(exits) < 20:
        process = start(options | {"resume": True})
        while not work.exists() and process.is_alive():
            time.sleep(0.01)
        process.join(chooser.uniform(0.1, 0.5) * (1 + len(exits)))
        process.kill()  # SIGKILL
        process.join()
        exits.append(process.exitcode)
    assert exits[0] == -9
    assert set(exits) <= {-9, 0}
    files = [folder / "model.safetensors" for folder in (out, tmp_path / "undisturbed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def interrupt_after_the_first_block(options, monkeypatch):
    with monkeypatch.context() as patch:
        original = ptq.quantize_block

        def stop(dense, name, *rest):
            if name.endswith(".1"):
                raise KeyboardInterrupt
            return original(dense, name, *rest)

        patch.setattr(ptq, "quantize_block", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(QuantizeConfig(**options))


def test_another_model_under_the_same_name_is_noticed(options, monkeypatch):
    interrupt_after_the_first_block(options, monkeypatch)
    path = Path(options["model"]) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] = -tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BadInput, match="model_files was"):
        quantize(QuantizeConfig(**options, resume=True))


def test_the_text_is_looked_at_before_the_weights(options, monkeypatch):
    def too_early(_name):
        raise AssertionError("the weights were read first")

    monkeypatch.setattr("codegemm_quant.subject.load_model", too_early)
    with pytest.raises(BadInput, match=r"nowhere\.txt does not exist"):
        quantize(QuantizeConfig(**options | {"data": "nowhere.txt"}))
    with pytest.raises(BadInput, match="too short"):
        quantize(QuantizeConfig(**options | {"samples": 100_000}))


def test_a_loaded_model_needs_no_folder(options, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    quantize(QuantizeConfig(**options | {"out": str(tmp_path / "other")}))
    quantize(QuantizeConfig(**options | {"model": "in memory"}), model, tokenizer)
    files = [folder / "model.safetensors" for folder in (Path(options["out"]), tmp_path / "other")]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(BadInput, match="tokenizer"):
        quantize(QuantizeConfig(**options | {"out": str(tmp_path / "third")}), model)


def test_a_loaded_model_stays_what_it_was(options):
    """In a dtype that is not stored; its config must not say that it is quantised."""
    sharp = AutoConfig.from_pretrained(options["model"], initializer_range=0.2)  # whose tuning changes something
    model = AutoModelForCausalLM.from_config(sharp, dtype=torch.float32).requires_grad_(False).eval()
    config, before = model.config.to_dict(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    changes = {"model": "in memory", "model_epochs": 4, "samples": 64}
    quantize(QuantizeConfig(**options | changes), model, tokenizer)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    assert model.config.to_dict() == config
    assert not any(parameter.requires_grad for parameter in model.parameters())
