"""The fused kernels against plain torch: on a GPU as they are, elsewhere through Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

SETUP = """
import torch, transformers
from codegemm_runtime.engine import attention, attention_triton, fused, fused_triton
from codegemm_runtime.engine import cache as cache_module
from codegemm_runtime.engine.cache import KVCache, splits_for
from codegemm_runtime.engine.decoder import Norm, read_decoder
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
"""
NORM_AND_GATE = """
def exact_norm(x, norm):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * (norm.weight.double() + norm.offset)

for width, dtype, tolerance in ((96, torch.float32, 1e-6), (1536, torch.float16, 1e-3), (2048, torch.bfloat16, 8e-3)):
    norms = [Norm(torch.randn(width, device=device).to(dtype), 1e-5, offset) for offset in (0.0, 1.0)]
    for rows, norm, branch_norm in ((1, norms[0], None), (5, norms[1], norms[1])):
        x, branch = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
        for added in (None, branch):
            residual = x.clone()
            y = fused_triton.add_norm(residual, added, branch_norm if added is not None else None, norm)
            total = x.double()
            if added is not None:
                total = total + (added.double() if branch_norm is None else exact_norm(added, branch_norm))
            assert (residual - total).norm() <= tolerance * total.norm()
            exact = exact_norm(residual, norm)
            assert (y - exact).norm() <= tolerance * exact.norm(), (width, dtype, rows)
    wide = torch.randn(3, 2 * width + 8, device=device).to(dtype)
    gate, up = wide[:, :width], wide[:, width : 2 * width]
    silu = torch.nn.functional.silu(gate.double()) * up.double()
    gelu = torch.nn.functional.gelu(gate.double(), approximate="tanh") * up.double()
    for name, exact in (("silu", silu), ("gelu_tanh", gelu)):
        y = fused_triton.gated(gate, up, name)
        assert (y - exact).norm() <= tolerance * exact.norm(), (name, dtype)
from codegemm_runtime.engine.argmax_triton import first_largest
for rows, vocabulary in ((1, 5), (3, 2500), (2, 1024)):
    scores = torch.randint(-9, 9, (rows, vocabulary), device=device).to(torch.float16)  # many equal ones
    best = scores.max(-1, keepdim=True).values
    assert first_largest(scores).tolist() == [row.nonzero()[0].item() for row in scores == best]
print("equal")
"""
ATTENTION = """
sizes = dict(vocab_size=64, hidden_size=96, intermediate_size=64, num_hidden_layers=1, num_attention_heads=6,
             num_key_value_heads=2, max_position_embeddings=512, pad_token_id=1)
rope = {"rope_theta": 100.0, "rope_type": "default"}
configs = {
    "llama": transformers.LlamaConfig(**sizes, head_dim=24),
    "qwen3": transformers.Qwen3Config(**sizes, head_dim=16),
    "phi3": transformers.Phi3Config(**sizes, sliding_window=290, bos_token_id=0,
                                    eos_token_id=1, rope_parameters=rope | {"partial_rotary_factor": 0.5}),
    "gemma2": transformers.Gemma2Config(**sizes, head_dim=16, sliding_window=65, attn_logit_softcapping=2.0),
}
cache_module._PROGRAMS = 48  # parts of several tiles, and fewer programs for the interpreter
for name, int8, dtype, tolerance in CASES:
    model = transformers.AutoModelForCausalLM.from_config(configs[name], dtype=dtype).to(device)
    decoder = read_decoder(model)
    lengths = torch.tensor([0, 190, 500], dtype=torch.int32, device=device)
    batch = len(lengths)
    caches = [KVCache(decoder, batch, 400, int8) for _ in range(2)]
    keys = torch.randn(400, decoder.kv_heads, decoder.head_dim, device=device).to(dtype)
    for cache in caches:
        for slot in range(batch):
            cache.write(0, slot, slice(0, 400), keys.roll(slot, 0), keys.roll(-slot - 3, 0))
    assert splits_for(batch, decoder.kv_heads) > 1
    heads, width = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    # Slices of one tensor, as a fused q|k|v product gives them.
    qkv = (2 * torch.randn(batch, heads + 2 * width, device=device)).to(dtype)
    if decoder.layers[0].q_norm is not None:
        decoder.layers[0].q_norm.weight.data.copy_(torch.rand(decoder.head_dim))
    q, k, v = qkv.split([heads, width, width], -1)
    with torch.no_grad():
        expected = attention.decode_attention(decoder, 0, q, k, v, caches[0], lengths)
        for repeat in range(2 if name == "llama" else 1):  # the second run finds the counters that the first left
            y = attention_triton.decode_attention(decoder, 0, q, k, v, caches[1], lengths)
            error = ((y - expected).float().norm(dim=1) / expected.float().norm(dim=1)).max()
            assert error < tolerance, (name, int8, dtype, error)
    # A rotation in another order of operations may round an entry to the neighbouring code.
    for one, other in zip(caches[0].read(0, slice(0, batch), 400), caches[1].read(0, slice(0, batch), 400)):
        assert (one - other).abs().max() <= (0.06 if int8 else 0.04 if dtype != torch.float32 else 1e-5)
    places = [module.place_prompt(decoder, 0, q, k, v, cache, 1, 40)
              for module, cache in zip((attention, attention_triton), caches)]
    assert (places[0] - places[1]).float().norm() < max(tolerance, 1e-6) * places[0].float().norm(), name
    for one, other in zip(caches[0].read(0, slice(1, 2), 60), caches[1].read(0, slice(1, 2), 60)):
        assert (one - other).abs().max() <= (0.06 if int8 else 0.04 if dtype != torch.float32 else 1e-5)
print("equal")
"""


def run(script: str) -> None:
    environment = dict(os.environ) | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    done = subprocess.run(
        [sys.executable, "-c", SETUP + script], capture_output=True, text=True, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "equal"


def test_norm_and_gate() -> None:
    run(NORM_AND_GATE)


@pytest.mark.parametrize("half", [pytest.param("float16", marks=pytest.mark.cuda), "float32"])
def test_attention_of_a_new_token(half: str) -> None:
    tolerance = 1e-5 if half == "float32" else 4e-3  # 4 roundings of fp16 or an int8 code off by one
    cases = [("llama", False), ("qwen3", False), ("phi3", False), ("gemma2", True)]
    text = ", ".join(f"('{name}', {int8}, torch.{half}, {max(tolerance, 2e-3 if int8 else 0)})" for name, int8 in cases)
    run(ATTENTION.replace("CASES", f"[{text}]"))
