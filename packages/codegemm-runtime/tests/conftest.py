"""Tiny random checkpoints of several architectures, written straight with safetensors and no code under test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from codegemm_kernels import CheckpointMetadata, CodebookScheme, pack_codes, reference

CONTEXT = 64
SIZES = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, tie_word_embeddings=True),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, sliding_window=32, query_pre_attn_scalar=16),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=2, tie_word_embeddings=False),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=258,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    ),
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    unrunnable = [item for item in items if item.get_closest_marker("cuda")]
    if unrunnable:
        config.hook.pytest_deselected(items=unrunnable)
        items[:] = [item for item in items if item not in unrunnable]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@dataclass
class Checkpoint:
    """A folder, the tensors in it and the dense fp32 model that it should be equal to."""

    folder: Path
    config: Any
    tensors: dict[str, Tensor]
    layers: dict[str, CodebookScheme]
    dense: Any = field(repr=False)

    def write(self, shards: int = 1) -> None:
        """Write `tensors` in `shards` files, replacing whatever weights are there."""
        for old in self.folder.glob("model*"):
            old.unlink()
        names = sorted(self.tensors)
        if shards == 1:
            save_file(self.tensors, self.folder / "model.safetensors", metadata={"format": "pt"})
            return
        files = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)}
        for file, part in files.items():
            save_file({name: self.tensors[name] for name in part}, self.folder / file, metadata={"format": "pt"})
        weight_map = {name: file for file, part in files.items() for name in part}
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def edit_config(self, **changes: Any) -> None:
        """Set top-level fields of config.json; None removes one."""
        path = self.folder / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def random_layer(out_features: int, in_features: int, scheme: CodebookScheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random tensors of one layer: codes all over 0..255 (the top bit too), weights of about 0.1."""
    m, v = scheme.num_codebooks, scheme.vector_length
    codes = torch.randint(0, 256, (out_features, in_features // v, m))
    return {
        "codes": pack_codes(codes),
        "codebooks": (0.1 * torch.randn(m, 256, v)).to(dtype),
        "scales": (0.5 + torch.rand(scheme.num_groups(in_features), out_features)).to(dtype),
    }


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Checkpoint]:
    def make(
        architecture: str = "llama",
        scheme: str = "m2v8g32",
        dtype: torch.dtype = torch.float32,
        shards: int = 1,
        published: bool = False,
        layers: dict[str, str] | None = None,
        name: str = "checkpoint",
    ) -> Checkpoint:
        torch.manual_seed(0)
        folder = tmp_path / name
        # Bigger than the default, so that activations and logits are of a size at which errors show.
        config = CONFIGS[architecture]()
        setattr(config, "init_std" if architecture == "opt" else "initializer_range", 0.1)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("bias"):
                    parameter.normal_(std=0.1)
        model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        default = CodebookScheme.parse(scheme)
        overrides = {key: CodebookScheme.parse(text) for key, text in (layers or {}).items()}
        # Block linears only: the head and OPT's embedding projections are outside the numbered blocks.
        linears = {
            key: module
            for key, module in model.named_modules()
            if isinstance(module, nn.Linear) and any(part.isdigit() for part in key.split("."))
        }
        chosen = {key: overrides.get(key, default) for key in linears}
        for key, linear in linears.items():
            parts = random_layer(linear.out_features, linear.in_features, chosen[key], dtype)
            linear.weight.data = reference.dequantize(*(parts[p] for p in ("codes", "codebooks", "scales")))
            del tensors[f"{key}.weight"]
            tensors |= {f"{key}.{part}": tensor for part, tensor in parts.items()}
        metadata = CheckpointMetadata(default, overrides, ("lm_head",))
        block = metadata.to_published_block(list(linears))
        checkpoint = Checkpoint(folder, config, tensors, chosen, model.float())
        checkpoint.write(shards)
        checkpoint.edit_config(
            quantization_config=None if published else metadata.to_quantization_config(), codegemm=block
        )
        return checkpoint

    return make


@pytest.fixture
def ids() -> Tensor:
    return torch.tensor([[0, 17, 200, 31, 5, 99, 140, 3]])


@pytest.fixture
def write_tokenizer() -> Callable[..., None]:
    """Bytes as tokens: 2 special ones and 256 others."""

    def write(folder: Path, chat_template: str | None = None) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {"<s>": 0, "</s>": 1, **{character: i + 2 for i, character in enumerate(alphabet)}}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=CONTEXT
        )
        fast.chat_template = chat_template
        fast.save_pretrained(folder)

    return write


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a fresh interpreter with the import path of this one."""

    # Importing torch and transformers takes twice as long where their bytecode may not be kept.
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}

    def run(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,
            env=inherited | {"HF_HUB_OFFLINE": "1"} | environment,
        )

    return run
