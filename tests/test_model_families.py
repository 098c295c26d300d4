"""Every kind of model through the whole road: quantise, save, load, generate."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import codegemm_runtime  # noqa: F401  (registers the format)
from codegemm_kernels import reference
from codegemm_kernels.experts import Experts
from codegemm_quant import QuantizeConfig, quantize
from codegemm_runtime.linear import CodebookLinear

SHAPE = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "dtype": "bfloat16",
}
OPT = {key: SHAPE[key] for key in SHAPE if key not in ("num_key_value_heads", "head_dim", "intermediate_size")}
MIXTURE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES = {
    "llama": (SHAPE, 14),
    "mistral": (SHAPE | {"sliding_window": 32}, 14),
    "qwen2": (SHAPE, 14),
    "qwen3": (SHAPE, 14),
    "gemma2": (SHAPE | {"sliding_window": 16, "query_pre_attn_scalar": 16}, 14),
    "gemma3_text": (SHAPE | {"sliding_window": 16, "query_pre_attn_scalar": 16}, 14),
    "phi3": (SHAPE, 8),
    "opt": (OPT | {"ffn_dim": 96, "word_embed_proj_dim": 64}, 12),
    "mixtral": (SHAPE | MIXTURE, 24),
    "qwen3_moe": (SHAPE | MIXTURE, 24),
}
"""Configuration and the number of matrices that are quantised."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"def function_{i}(x, y={i}): return x * {i} + y" for i in range(200)))
    return path


def save_tiny(kind, folder):
    torch.manual_seed(0)
    shape, _ = FAMILIES[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape), dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases that do something
            torch.nn.init.normal_(parameter, std=0.3)
            if "norm" in name and name.endswith("weight") and "gemma" not in kind:
                parameter.data += 1
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: i + 2 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", FAMILIES)
def test_quantise_save_load_generate(kind, text, tmp_path):
    dense = save_tiny(kind, tmp_path / "dense")
    config = QuantizeConfig(
        model=str(tmp_path / "dense"),
        data=str(text),
        out=str(tmp_path / "out"),
        scheme="m1v4g32",
        samples=8,
        sequence_length=48,
        device="cpu",
        rounds=0,
        tune_epochs=1,
        model_epochs=1,
    )
    assert quantize(config)["blocks"] == 2
    model = AutoModelForCausalLM.from_pretrained(config.out, dtype=torch.float32)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, CodebookLinear)}
    assert len(packed) == FAMILIES[kind][1]
    assert any(isinstance(module, Experts) for module in model.modules()) == (FAMILIES[kind][0] == SHAPE | MIXTURE)

    rebuilt = rebuild(dense, model, packed)
    tokens = torch.tensor(AutoTokenizer.from_pretrained(config.out)(text.read_text()).input_ids[:80]).view(2, 40)
    with torch.no_grad():
        expected, actual, original = (m(tokens).logits for m in (rebuilt, model, dense.float()))
    assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert (actual - original).norm() < 0.4 * original.norm()
    generated = model.generate(tokens[:1, :8], max_new_tokens=6, do_sample=False, use_cache=True)
    assert generated.shape == (1, 14)


def rebuild(dense, model, packed):
    """The dense architecture in fp32 with every weight rebuilt from codes by the reference arithmetic."""
    rebuilt = type(dense)(dense.config).float().eval()
    stored = model.state_dict()
    state = {name: value for name, value in stored.items() if name.rpartition(".")[0] not in packed}
    state |= {f"{name}.bias": module.bias for name, module in packed.items() if module.bias is not None}
    parts = ("codes", "codebooks", "scales")
    weights = {name: reference.dequantize(*(stored[f"{name}.{part}"] for part in parts)) for name in packed}
    for name in [n for n, m in rebuilt.named_modules() if isinstance(getattr(m, "gate_up_proj", None), torch.Tensor)]:
        for part in ("gate_up_proj", "down_proj"):
            experts = [key for key in weights if key.startswith(f"{name}.") and key.endswith(part)]
            state[f"{name}.{part}"] = torch.stack([weights.pop(key) for key in experts])
    state |= {f"{name}.weight": weight for name, weight in weights.items()}
    missing, unexpected = rebuilt.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("lm_head" in name for name in missing)
    rebuilt.tie_weights()
    return rebuilt
