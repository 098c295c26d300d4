"""Serve a quantised checkpoint with vLLM on the CPU and compare its greedy tokens with those of transformers.

Runs in an environment of its own, as `make vllm-check` prepares it. Checked are offline generation, eager and compiled;
the OpenAI server with concurrent clients; two processes of tensor parallelism; and layers of vLLM, loaded as every
rank of a group would load them, against the whole layer. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SERVER = "vllm.entrypoints.openai.api_server"
START_SECONDS = 600
LIMITS = {"dtype": "float32", "max_model_len": 512}
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class VllmCheck:
    """What to check."""

    model: Path
    """Folder of a quantised Llama checkpoint with its tokenizer."""
    checks: tuple[str, ...] = ("layers", "eager", "compiled", "ranks", "server")
    """Which of the checks to run, in this order."""
    clients: int = 16
    """Prompts, and clients of the server at a time."""
    max_new_tokens: int = 24
    """Tokens to generate for each prompt."""
    json: Path | None = None
    """File for the JSON object of the last line."""
    debug: bool = False
    """Show the traceback of a failure."""


def main() -> None:
    """Entry point."""
    import tyro

    from codegemm_kernels.errors import run_command

    os.environ |= ENVIRONMENT  # read when vLLM is imported, here and in its processes
    config = tyro.cli(VllmCheck, description=__doc__)
    sys.exit(run_command(lambda: run(config), debug=config.debug))


def run(config: VllmCheck) -> dict[str, Any]:
    """All checks. Returns the JSON object of the last line; raises at the first answer that differs."""
    import torch
    import transformers
    import vllm

    prompts = read_prompts(config.clients)
    expected = transformers_tokens(config, prompts)
    ways = {
        "layers": lambda: check_layers(config.model),
        "eager": lambda: check_offline(config, expected, enforce_eager=True),
        "compiled": lambda: check_offline(config, expected),
        "ranks": lambda: check_offline(config, expected, enforce_eager=True, tensor_parallel_size=2),
        "server": lambda: check_server(config, prompts, expected),
    }
    found: dict[str, Any] = {}
    for name in config.checks:
        start = time.perf_counter()
        say(f"{name} ...")
        found[name] = ways[name]() | {"seconds": round(time.perf_counter() - start, 1)}
        say(f"{name}: {found[name]}")
    versions = {package.__name__: package.__version__ for package in (vllm, torch, transformers)}
    result = versions | {"prompts": len(prompts), "new_tokens": config.max_new_tokens, "checks": found}
    if config.json is not None:
        config.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)


def read_prompts(count: int) -> list[str]:
    """Beginnings of code from the validation text, of many lengths."""
    text = (ROOT / "models" / "pylm-4m" / "validation.txt").read_text()
    step = len(text) // count
    return [text[i * step : i * step + 40 + 25 * i] for i in range(count)]


def transformers_tokens(config: VllmCheck, prompts: list[str]) -> list[tuple[list[int], list[int]]]:
    """For every prompt its tokens and the greedy ones that transformers puts after them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=config.max_new_tokens, do_sample=False
        )
        answers.append((ids[0].tolist(), out[0, ids.shape[1] :].tolist()))
    return answers


def compare(got: list[list[int]], expected: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """Raises NumericalError at the first prompt with other tokens; counts those that are equal."""
    from codegemm_kernels import NumericalError

    for number, (tokens, (_, wanted)) in enumerate(zip(got, expected, strict=True)):
        if tokens != wanted:
            raise NumericalError(f"prompt {number}: vLLM says {tokens}, transformers {wanted}")
    return {"equal_tokens": sum(map(len, got))}


def check_offline(config: VllmCheck, expected: list[tuple[list[int], list[int]]], **options: Any) -> dict[str, Any]:
    """All prompts as one batch through `vllm.LLM`."""
    from vllm import LLM, SamplingParams

    if options.get("tensor_parallel_size", 1) > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join("0" for _ in range(options["tensor_parallel_size"]))
    llm = LLM(model=str(config.model), **LIMITS, **options)
    sampling = SamplingParams(temperature=0, max_tokens=config.max_new_tokens)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in expected], sampling, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    os.environ.pop("VLLM_CPU_OMP_THREADS_BIND", None)
    return compare([list(output.outputs[0].token_ids) for output in outputs], expected)


def check_server(config: VllmCheck, prompts: list[str], expected: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """All prompts at once over HTTP, one client each."""
    with serving(config.model) as address, ThreadPoolExecutor(config.clients) as clients:
        body = {"model": str(config.model), "temperature": 0, "max_tokens": config.max_new_tokens}

        def ask(prompt: str) -> list[int]:
            answer = post(f"{address}/v1/completions", body | {"prompt": prompt, "return_token_ids": True})
            tokens: list[int] = answer["choices"][0]["token_ids"]
            return tokens

        start = time.perf_counter()
        got = list(clients.map(ask, prompts))
        return compare(got, expected) | {"answered_in": round(time.perf_counter() - start, 2)}


@contextmanager
def serving(model: Path) -> Any:
    """Address of a running server, which ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in LIMITS.items()]
    command = [sys.executable, "-m", SERVER, "--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    log = model.parent / "vllm-server.log"
    with log.open("w") as stream:
        process = subprocess.Popen([*command, *options], stdout=stream, stderr=stream)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, process, log)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the server answers. Raises RuntimeError when it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=10).close()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    raise RuntimeError(f"the server does not answer: see {log}")


def post(address: str, body: dict[str, Any]) -> dict[str, Any]:
    """One JSON request."""
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


BLOCK = "model.layers.0"
FUSED = {
    "self_attn.qkv_proj": {"q": "q_proj", "k": "k_proj", "v": "v_proj"},
    "mlp.gate_up_proj": {0: "gate_proj", 1: "up_proj"},
}


def check_layers(folder: Path) -> dict[str, Any]:
    """vLLM's layers of block 0 as each rank of a group loads them: outputs joined or added up, against one rank.

    Where a matrix cannot be cut for a group, its layer has to refuse, and is counted.
    """
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    from codegemm_kernels import BadInput, NumericalError

    store = folder.parent / f".vllm-layers-{os.getpid()}"
    errors, refused = [], []
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        initialize_model_parallel(1, 1)
        layers = RankLayers(folder)
        for name in (*FUSED, "self_attn.o_proj", "mlp.down_proj"):
            x = torch.randn(5, layers.inputs(name), generator=torch.Generator().manual_seed(0))
            whole = layers.outputs(name, x, 1)
            for ranks in (2, 4):
                try:
                    error = float((layers.outputs(name, x, ranks) - whole).norm() / whole.norm())
                except BadInput as refusal:
                    refused.append(str(refusal))
                    continue
                errors.append(error)
    store.unlink(missing_ok=True)
    if max(errors) > 1e-5 or len(errors) < 6:
        raise NumericalError(f"relative errors of {len(errors)} sharded layers against whole ones: {errors}")
    return {"sharded_layers": len(errors), "worst_relative_error": max(errors), "refused": refused}


class RankLayers:
    """vLLM layers of one checkpoint, built as if this process were any rank of a group of any size."""

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file
        from vllm.model_executor.layers.quantization import get_quantization_config
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors: dict[str, Any] = {}
        for file in folder.glob("*.safetensors"):
            self.tensors |= load_file(file)
        self.quantization = get_quantization_config("codegemm").from_config(self.config["quantization_config"])
        self.quantization.maybe_update_config(str(folder))
        self.quantization.packed_modules_mapping = {
            name.rpartition(".")[2]: list(parts.values()) for name, parts in FUSED.items()
        }

    def inputs(self, name: str) -> int:
        """Input features of the whole layer."""
        size: int = self.config["intermediate_size" if name == "mlp.down_proj" else "hidden_size"]
        return size

    def outputs(self, name: str, x: Any, ranks: int) -> Any:
        """What the ranks compute of x, put together: outputs by part for fused layers, sums for the others."""
        import torch

        if name not in FUSED:
            pieces = x.chunk(ranks, dim=-1)
            return torch.stack([self.build(name, r, ranks)(pieces[r])[0] for r in range(ranks)]).sum(0)
        layers = [self.build(name, rank, ranks) for rank in range(ranks)]
        split = [layer(x)[0].split(layer.output_partition_sizes, dim=-1) for layer in layers]
        joined = []
        for place in range(len(FUSED[name])):
            stored = self.tensors[f"{BLOCK}.{name.partition('.')[0]}.{list(FUSED[name].values())[place]}.scales"]
            copies = ranks * split[0][place].shape[-1] // stored.shape[-1]  # ranks that hold the same head
            joined.append(torch.cat([one[place] for one in split[::copies]], dim=-1))
        return torch.cat(joined, dim=-1)

    def build(self, name: str, rank: int, ranks: int) -> Any:
        """The loaded layer of one rank."""
        from unittest import mock

        from vllm.model_executor.layers import linear

        group = {"get_tensor_model_parallel_rank": rank, "get_tensor_model_parallel_world_size": ranks}
        hidden, heads = self.config["hidden_size"], self.config["num_attention_heads"]
        size = {"prefix": f"{BLOCK}.{name}", "quant_config": self.quantization, "bias": False}
        with mock.patch.multiple(linear, **{key: mock.Mock(return_value=value) for key, value in group.items()}):
            if name == "self_attn.qkv_proj":
                head = self.config.get("head_dim") or hidden // heads
                layer = linear.QKVParallelLinear(hidden, head, heads, self.config["num_key_value_heads"], **size)
            elif name == "mlp.gate_up_proj":
                layer = linear.MergedColumnParallelLinear(hidden, [self.config["intermediate_size"]] * 2, **size)
            else:
                layer = linear.RowParallelLinear(self.inputs(name), hidden, reduce_results=False, **size)
        parent = f"{BLOCK}.{name.partition('.')[0]}"
        for part in ("codes", "codebooks", "scales"):
            parameter = getattr(layer, part)
            for place, stored in FUSED.get(name, {None: name.rpartition(".")[2]}).items():
                arguments = () if place is None else (place,)
                parameter.weight_loader(parameter, self.tensors[f"{parent}.{stored}.{part}"], *arguments)
        layer.quant_method.process_weights_after_loading(layer)
        return layer


if __name__ == "__main__":
    main()
