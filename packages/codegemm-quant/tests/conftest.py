import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

TEXT = "\n".join(f"def function_{i}(x, y={i}): return x * {i} + y  # line {i}" for i in range(400))


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: i + 2 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def tiny_config(kind):
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config}
    return kinds[kind](
        vocab_size=258,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


@pytest.fixture(name="tokenizer", scope="session")
def _tokenizer():
    return byte_tokenizer()


@pytest.fixture
def tiny_model(tmp_path):
    """Write a random model of a kind to a folder and return the folder."""

    def make(kind="llama"):
        torch.manual_seed(0)
        folder = tmp_path / f"tiny-{kind}"
        model = AutoModelForCausalLM.from_config(tiny_config(kind)).to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def problem():
    """A weight [192, 64] and the second moment of inputs whose features are strongly correlated."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.eye(64) + torch.randn(64, 6, generator=generator) @ torch.randn(6, 64, generator=generator) / 4
    inputs = torch.randn(2000, 64, generator=generator) @ mix
    return torch.randn(192, 64, generator=generator), inputs.t() @ inputs / 2000
