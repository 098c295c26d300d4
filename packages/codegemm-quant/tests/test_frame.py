"""The model around its blocks, and what loading it costs."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from codegemm_quant.blocks import find_blocks
from codegemm_quant.frame import ModelFrame
from codegemm_quant.loading import load_model

SHAPE = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}


def tiny(kind):
    torch.manual_seed(0)
    options = {"sliding_window": 8, "query_pre_attn_scalar": 16} if kind.startswith("gemma") else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, **options), dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text"])
def test_frame_and_blocks_are_the_model(kind):
    model, tokens = tiny(kind), torch.randint(258, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits
        prefix, blocks = find_blocks(model)
        frame = ModelFrame(model, prefix, blocks, torch.device("cpu"), torch.float32)
        hidden, calls = frame.inputs(tokens), frame.calls(tokens)
        for block, call in zip(blocks, calls, strict=True):
            hidden = call.run(block, hidden)
        assert torch.equal(frame.logits(hidden), expected)
        frame.close()
        assert torch.equal(model(tokens).logits, expected)


def test_only_the_frame_is_cast_and_not_its_buffers():
    model = tiny("llama")
    prefix, blocks = find_blocks(model)
    frame = ModelFrame(model, prefix, blocks, torch.device("cpu"), torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert blocks[0].mlp.up_proj.weight.dtype == torch.float32
    hidden = frame.inputs(torch.zeros(1, 4, dtype=torch.long)).detach().requires_grad_(True)
    frame.logits(hidden).float().square().mean().backward()
    assert hidden.grad.abs().sum() > 0
    frame.close()
    assert model.lm_head.weight.dtype == torch.float32


def test_weights_are_mapped_and_not_read(tmp_path):
    shape = SHAPE | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape), dtype=torch.bfloat16)
    size = sum(parameter.numel() for parameter in model.parameters()) * 2
    model.save_pretrained(tmp_path, max_shard_size="10MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    del model
    before = anonymous_memory()
    loaded = load_model(str(tmp_path))
    assert anonymous_memory() - before < size / 4
    assert loaded.model.layers[7].mlp.up_proj.weight.abs().sum() > 0


def anonymous_memory():
    """Bytes of this process that no file backs."""
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
