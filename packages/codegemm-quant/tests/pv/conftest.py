from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from codegemm_quant import QuantizeConfig, quantize
from codegemm_quant.pv.config import TuneConfig

TEXT = "\n".join(f"def function_{i}(x, y={i}): return x * {i % 7} + y  # line {i}" for i in range(300))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder with `dense`, `quantised` (m2v8g32) and `text.txt`; fp32, so sums in another order differ little."""
    folder = tmp_path_factory.mktemp("pv")
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
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "dense")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    quantize(
        QuantizeConfig(
            model=str(folder / "dense"),
            data=str(folder / "text.txt"),
            out=str(folder / "quantised"),
            scheme="m2v8g32",
            samples=8,
            sequence_length=32,
            device="cpu",
            rounds=0,
            tune_epochs=0,
            model_epochs=0,
        )
    )
    return folder


@pytest.fixture(scope="session")
def short_run():
    """Makes the config of a run of 20 small steps in which codes move."""

    def make(folders: Path, out: Path) -> TuneConfig:
        return TuneConfig(
            student=str(folders / "quantised"),
            teacher=str(folders / "dense"),
            data=str(folders / "text.txt"),
            out=str(out / "tuned"),
            steps=20,
            batch_size=8,
            sequence_length=32,
            resample=0.1,  # the teacher is random: what it says is far from the text
            learning_rate=1e-3,
            code_learning_rate=6e-2,
            eval_every=10,
            eval_windows=6,
            save_every=8,
            device="cpu",
        )

    return make


@pytest.fixture
def config(folders, short_run, tmp_path) -> TuneConfig:
    return short_run(folders, tmp_path)
