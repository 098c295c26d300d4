"""A tuned checkpoint is ready: the command that made it is all there is, and other packages load and score it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from codegemm_eval.score import evaluate_folder
from codegemm_quant import QuantizeConfig, quantize
from codegemm_quant.cli import main
from codegemm_runtime.linear import CodebookLinear

TEXT = "\n".join(f"def function_{i}(x, y={i}): return x * {i % 7} + y  # line {i}" for i in range(200))
WINDOW, WINDOWS = 32, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `dense`, `quantised`, `text.txt` and `tuned`, and the JSON line of the tuning."""
    folder: Path = tmp_path_factory.mktemp("tuned")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"</s>": 0, **{a: i + 1 for i, a in enumerate(alphabet)}}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "dense")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    small = {"scheme": "m2v8g32", "samples": 8, "sequence_length": 32, "device": "cpu"}
    short = {"rounds": 0, "tune_epochs": 0, "model_epochs": 0}
    dense, text = str(folder / "dense"), str(folder / "text.txt")
    quantize(QuantizeConfig(model=dense, data=text, out=str(folder / "quantised"), **small, **short))
    return folder


def command(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of codegemm-quant."""
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


def test_tokenize_tune_load_and_score(folder, capsys):
    text = folder / "text.txt"
    status, out, _ = command(capsys, "tokenize", text, "--tokenizer", folder / "dense", "--out", folder / "tokens")
    assert status == 0
    assert json.loads(out)["documents"] == 1
    size = ("--sequence-length", WINDOW, "--eval-windows", WINDOWS, "--batch-size", 8, "--steps", 10)
    size += ("--learning-rate", 3e-3, "--code-learning-rate", 6e-2, "--resample", 0)  # a random model predicts noise
    texts = ("--data", folder / "tokens", "--eval-data", text, "--teacher", folder / "dense")
    status, out, _ = command(
        capsys, "tune", folder / "quantised", *texts, *size, "--device", "cpu", "--out", folder / "tuned"
    )
    assert status == 0
    told = json.loads(out)  # nothing but the line of JSON on stdout
    assert told["best"]["divergence"] < told["start"]["divergence"]

    model = AutoModelForCausalLM.from_pretrained(folder / "tuned", dtype=torch.float32)
    assert sum(isinstance(module, CodebookLinear) for module in model.modules()) == 14
    for name, judged in (("quantised", "start"), ("tuned", "best")):
        scored = evaluate_folder(
            folder / name, str(text), window=WINDOW, windows=WINDOWS, device="cpu", dtype="float32"
        )
        # the same text and windows; other kernels, fp32 in both
        assert scored.perplexity == pytest.approx(told[judged]["perplexity"], rel=1e-3)


def test_bad_input_is_one_sentence(folder, capsys):
    common = ("tune", folder / "dense", "--data", folder / "text.txt", "--out", folder / "never", "--device", "cpu")
    status, out, err = command(capsys, *common)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert "is not quantised: make a checkpoint with `codegemm-quant quantize` first" in err
    assert err.count("\n") == 1
