"""Two processes with half of every layer each, and one process that plays both."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from codegemm_kernels import BadInput
from codegemm_runtime import CodebookLinear, CodeGemmConfig, CodeGemmQuantizer, load_model
from codegemm_runtime.engine.choice import find_engine
from codegemm_runtime.tensor_parallel import RowParallelLinear, load_tensor_parallel, shard_model

# One import for both processes: the second is a copy of the first.
SCRIPT = """
import json, os, sys, torch
import torch.distributed as dist
from codegemm_runtime.tensor_parallel import load_tensor_parallel
folder, store, ids = sys.argv[1], sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
torch.set_num_threads(1)
child = os.fork()
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(child == 0), world_size=2)
model = load_tensor_parallel(folder)
options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12, "pad_token_id": 1}
with torch.no_grad():
    found = {"tokens": model.generate(ids, **options)[0].tolist(), "logits": model(ids).logits[0, -1].tolist()}
dist.destroy_process_group()
with open(f"{store}-{int(child == 0)}", "w") as out:
    json.dump(found, out)
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_two_processes_say_what_one_says(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
    make_checkpoint: Callable[..., Any],
    ids: Tensor,
    tmp_path: Path,
    architecture: str,
) -> None:
    folder = make_checkpoint(architecture).folder
    model = load_model(folder, "cpu")
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12, "pad_token_id": 1}
    tokens = model.generate(ids, **options)[0].tolist()
    done = run_python("-c", SCRIPT, str(folder), str(tmp_path / "store"), json.dumps(ids.tolist()), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        found = json.loads((tmp_path / f"store-{rank}").read_text())
        assert found["tokens"] == tokens
        assert found["logits"] == pytest.approx(model(ids).logits[0, -1].tolist(), rel=1e-3, abs=1e-4)


def test_every_process_has_its_share(make_checkpoint: Callable[..., Any]) -> None:
    """Half of the codes, dense linears inside the blocks cut too, heads and embeddings whole."""
    checkpoint = make_checkpoint("llama")
    whole, half = load_model(checkpoint.folder, "cpu"), load_model(checkpoint.folder, "cpu")
    up = "model.layers.1.mlp.up_proj"
    dense = torch.nn.Linear(64, 128, bias=False)
    half.set_submodule(up, dense)
    names = shard_model(half, 1, 2)
    assert len(names) == len(checkpoint.layers) == 14
    assert torch.equal(half.get_submodule(up).weight, dense.weight[64:])
    for name in set(names) - {up}:
        module = half.get_submodule(name)
        by_inputs = isinstance(module, RowParallelLinear)
        assert by_inputs == name.endswith(("o_proj", "down_proj"))
        own = module.linear if by_inputs else module
        assert isinstance(own, CodebookLinear)
        axis = 1 if by_inputs else 0
        assert torch.equal(own.dequantize(), whole.get_submodule(name).dequantize().chunk(2, axis)[1])
        assert own.codes.untyped_storage().nbytes() == own.codes.nbytes
    assert half.lm_head.weight.shape == whole.lm_head.weight.shape


def test_the_engine_leaves_a_share_alone(make_checkpoint: Callable[..., Any], capsys: Any) -> None:
    """It reads the module tree, and a share of a layer is no layer."""
    model = load_model(make_checkpoint("llama").folder, "cpu")
    shard_model(model, 0, 2)
    assert find_engine(model, 64) is None


def test_what_cannot_be_shared(make_checkpoint: Callable[..., Any]) -> None:
    folder = make_checkpoint("llama", "m1v16g64").folder
    with pytest.raises(BadInput, match="start with torchrun"):
        load_tensor_parallel(folder)
    model = load_model(folder, "cpu")
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(BadInput, match="2 key and value heads cannot be shared by 4 processes"):
        shard_model(model, 0, 4)
    with pytest.raises(BadInput, match=r"o_proj\.codes cannot be shared: 64 inputs would be cut at 32"):
        shard_model(model, 0, 2)
    assert {name: type(module) for name, module in model.named_modules()} == before
    with pytest.raises(BadInput, match="cannot be shared"):
        shard_model(load_model(make_checkpoint("mixtral", name="mixtral").folder, "cpu"), 0, 2)
    with pytest.raises(BadInput, match="no tensor parallel plan"):
        shard_model(load_model(make_checkpoint("opt", name="opt").folder, "cpu"), 0, 2)


def test_the_plan_of_transformers_is_refused(make_checkpoint: Callable[..., Any]) -> None:
    """It would cut codes along the wrong axis."""
    config = AutoConfig.from_pretrained(make_checkpoint("llama").folder)
    quantizer = CodeGemmQuantizer(CodeGemmConfig(**config.quantization_config))
    model = SimpleNamespace(config=SimpleNamespace(distributed_config=SimpleNamespace(tp_size=2)))
    with pytest.raises(BadInput, match="load_tensor_parallel"):
        quantizer._process_model_before_weight_loading(model, checkpoint_files=["model.safetensors"])
