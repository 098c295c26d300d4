"""The vLLM plugin without vLLM: its layer interface is played by the few lines below, everything else is ours.

`make vllm-check` runs the same code inside vLLM itself: models, server, real layers, compilation, two processes.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from codegemm_kernels import BadInput, CheckpointError
from codegemm_kernels.checkpoint import PARTS

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class LinearBase(nn.Module):
    """As much of vLLM's layer as its quantisation methods see."""

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        super().__init__()
        self.tp_rank, self.tp_size = rank, ranks


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


def set_weight_attrs(weight: Tensor, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        setattr(weight, name, value)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Stand-ins for the modules of vLLM that the plugin imports, and what was registered with them."""
    registered: dict[str, type] = {}

    def register(name: str) -> Callable[[type], type]:
        return lambda kind: registered.setdefault(name, kind)

    layers = "vllm.model_executor.layers"
    contents = {
        "vllm": {},
        "vllm.model_executor": {},
        "vllm.model_executor.utils": {"set_weight_attrs": set_weight_attrs},
        layers: {},
        f"{layers}.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": type("LinearMethodBase", (), {}),
            "UnquantizedLinearMethod": type("UnquantizedLinearMethod", (), {}),
        },
        f"{layers}.quantization": {"register_quantization_config": register},
        f"{layers}.quantization.base_config": {
            "QuantizationConfig": QuantizationConfig,
            "QuantizeMethodBase": type("QuantizeMethodBase", (), {}),
        },
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "codegemm_runtime.vllm_linear", raising=False)
    importlib.import_module("codegemm_runtime.vllm_plugin").register()
    yield SimpleNamespace(config=registered["codegemm"])
    sys.modules.pop("codegemm_runtime.vllm_linear", None)


def quantization(vllm: SimpleNamespace, checkpoint: Any) -> Any:
    """The plugin's config of a folder, as vLLM makes it."""
    block = json.loads((checkpoint.folder / "config.json").read_text())["quantization_config"]
    config = vllm.config.from_config(block)
    config.maybe_update_config(str(checkpoint.folder))
    config.packed_modules_mapping = FUSED
    return config


def run_layer(config: Any, tensors: dict[str, Tensor], prefix: str, x: Tensor, rank: int = 0, ranks: int = 1) -> Tensor:
    """What one rank makes of x: the stand-in layer is created, loaded and called as vLLM does it."""
    layer = LinearBase(rank, ranks)
    method = config.get_quant_method(layer, prefix)
    stored = config._stored_names(prefix)
    outputs = [tensors[f"{name}.scales"].shape[1] for name in stored]
    inputs = x.shape[-1]
    by_inputs = prefix.endswith(("o_proj", "down_proj"))
    local = outputs if by_inputs else [size // ranks for size in outputs]
    own_inputs = inputs // ranks if by_inputs else inputs
    method.create_weights(layer, own_inputs, local, inputs, sum(outputs), torch.float32, weight_loader=None)
    places: Any = [None] if len(stored) == 1 else ["q", "k", "v"] if "qkv" in prefix else [0, 1]
    for name, place in zip(stored, places, strict=True):
        for part in PARTS:
            parameter = getattr(layer, part)
            if f"{name}.{part}" in tensors:
                parameter.weight_loader(parameter, tensors[f"{name}.{part}"], *([] if place is None else [place]))
    biases = [tensors[f"{name}.bias"] for name in stored if f"{name}.bias" in tensors]
    layer.bias = None
    if biases:
        layer.bias = nn.Parameter(torch.cat([bias.chunk(ranks)[rank] for bias in biases]))
    method.process_weights_after_loading(layer)
    own = x.chunk(ranks, dim=-1)[rank] if by_inputs else x
    result: Tensor = method.apply(layer, own, layer.bias)
    return result


def dense_outputs(checkpoint: Any, names: list[str], x: Tensor) -> list[Tensor]:
    return [checkpoint.dense.get_submodule(name)(x) for name in names]


@pytest.mark.parametrize("ranks", [1, 2])
def test_fused_layers_of_matrices_with_their_own_codebooks(
    vllm: SimpleNamespace, make_checkpoint: Callable[..., Any], ranks: int
) -> None:
    """q, k, v with biases, and gate and up of two schemes, put together from all ranks."""
    checkpoint = make_checkpoint("qwen2", layers={f"{MLP}.up_proj": "m1v4g-1"}, shards=2)
    config = quantization(vllm, checkpoint)
    x = torch.randn(3, 64)
    for prefix in (f"{ATTENTION}.qkv_proj", f"{MLP}.gate_up_proj"):
        parent, _, last = prefix.rpartition(".")
        exact = dense_outputs(checkpoint, [f"{parent}.{part}" for part in FUSED[last]], x)
        sizes = [y.shape[-1] // ranks for y in exact]
        parts = [
            run_layer(config, checkpoint.tensors, prefix, x, rank, ranks).split(sizes, -1) for rank in range(ranks)
        ]
        together = [torch.cat(pieces, dim=-1) for pieces in zip(*parts, strict=True)]
        for found, wanted in zip(together, exact, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_row_parallel_shares_add_up(vllm: SimpleNamespace, make_checkpoint: Callable[..., Any], ranks: int) -> None:
    checkpoint = make_checkpoint("llama")
    config = quantization(vllm, checkpoint)
    for prefix, width in ((f"{ATTENTION}.o_proj", 64), (f"{MLP}.down_proj", 128)):
        x = torch.randn(3, width)
        total = sum(run_layer(config, checkpoint.tensors, prefix, x, rank, ranks) for rank in range(ranks))
        torch.testing.assert_close(total, dense_outputs(checkpoint, [prefix], x)[0], rtol=1e-4, atol=1e-4)


def test_neighbouring_ranks_share_the_heads_of_k_and_v(
    vllm: SimpleNamespace, make_checkpoint: Callable[..., Any]
) -> None:
    """Four ranks, two heads of 16 for k and v: vLLM asks each rank for one head."""
    checkpoint = make_checkpoint("llama")
    config = quantization(vllm, checkpoint)
    k = f"{ATTENTION}.k_proj"
    for rank in range(4):
        layer = LinearBase(rank, 4)
        method = config.get_quant_method(layer, f"{ATTENTION}.qkv_proj")
        method.create_weights(layer, 64, [16, 16, 16], 64, 192, torch.float32)
        assert method.shards[1].rows == ((rank // 2 * 16, rank // 2 * 16 + 16),)
        layer.scales.weight_loader(layer.scales, checkpoint.tensors[f"{k}.scales"], "k")
        own = checkpoint.tensors[f"{k}.scales"][:, rank // 2 * 16 :][:, :16]
        assert torch.equal(method.loaded[1, "scales"], own)


def test_cuts_inside_a_group_name_the_tensor(vllm: SimpleNamespace, make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint("llama", "m2v8g64")
    config = quantization(vllm, checkpoint)
    with pytest.raises(BadInput, match=rf"{MLP}\.down_proj\.scales cannot be shared: 128 inputs would be cut at 32"):
        run_layer(config, checkpoint.tensors, f"{MLP}.down_proj", torch.randn(1, 128), 1, 4)


def loaded_layer(config: Any, tensors: dict[str, Tensor]) -> tuple[Any, LinearBase]:
    """gate and up of block 0 as one layer on torch's default device, with its method."""
    layer = LinearBase()
    method = config.get_quant_method(layer, f"{MLP}.gate_up_proj")
    method.create_weights(layer, 64, [128, 128], 64, 256, torch.float32)
    layer.bias = None
    for place, name in enumerate(FUSED["gate_up_proj"]):
        for part in PARTS:
            getattr(layer, part).weight_loader(getattr(layer, part), tensors[f"{MLP}.{name}.{part}"], place)
    method.process_weights_after_loading(layer)
    return method, layer


def test_a_compiled_layer_has_no_graph_break(vllm: SimpleNamespace, make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint("qwen2")
    method, layer = loaded_layer(quantization(vllm, checkpoint), checkpoint.tensors)
    compiled = torch.compile(lambda x: method.apply(layer, x), fullgraph=True, backend="eager", dynamic=True)
    for rows in (1, 3, 17):
        x = torch.randn(rows, 64)
        assert torch.equal(compiled(x), method.apply(layer, x))


@pytest.mark.cuda
def test_a_layer_in_a_cuda_graph(vllm: SimpleNamespace, make_checkpoint: Callable[..., Any]) -> None:
    """Captured once for each batch size, as vLLM does; the graph computes of whatever is in x when it is replayed."""
    checkpoint = make_checkpoint("qwen2")
    with torch.device("cuda"):
        method, layer = loaded_layer(quantization(vllm, checkpoint), checkpoint.tensors)
    for rows in (1, 4, 100):
        x = torch.randn(rows, 64, device="cuda")
        method.apply(layer, x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = method.apply(layer, x)
        x.copy_(torch.randn(rows, 64))
        graph.replay()
        assert torch.equal(y, method.apply(layer, x))


def drop(checkpoint: Any, name: str) -> None:
    del checkpoint.tensors[name]


def spoil(checkpoint: Any, name: str) -> None:
    checkpoint.tensors[name][0, 0] = float("nan")


def widen(checkpoint: Any, name: str) -> None:
    checkpoint.tensors[name] = torch.zeros(2, 2, 70, dtype=torch.int32)


@pytest.mark.parametrize(
    ("fault", "tensor", "prefix", "sentence"),
    [
        (drop, f"{ATTENTION}.k_proj.scales", f"{ATTENTION}.qkv_proj", r"k_proj\.scales is missing"),
        (drop, f"{ATTENTION}.k_proj.bias", f"{ATTENTION}.qkv_proj", r"k_proj\.bias is missing"),
        (drop, f"{ATTENTION}.k_proj.codes", f"{ATTENTION}.qkv_proj", r"joins .*q_proj.* with .*k_proj, which is dense"),
        (drop, f"{ATTENTION}.o_proj.codes", f"{ATTENTION}.o_proj", r"o_proj\.weight is missing"),
        (spoil, f"{MLP}.up_proj.scales", f"{MLP}.gate_up_proj", r"up_proj\.scales in model\.safetensors holds NaN"),
        (widen, f"{MLP}.down_proj.codes", f"{MLP}.down_proj", r"down_proj\.codes in model\.safetensors has shape"),
    ],
)
def test_a_faulty_tensor_stops_the_load(
    vllm: SimpleNamespace,
    make_checkpoint: Callable[..., Any],
    fault: Callable[[Any, str], None],
    tensor: str,
    prefix: str,
    sentence: str,
) -> None:
    checkpoint = make_checkpoint("qwen2")
    sound = dict(checkpoint.tensors)
    fault(checkpoint, tensor)
    checkpoint.write()
    config = quantization(vllm, checkpoint)
    sizes = {name: checkpoint.tensors.get(name, one) for name, one in sound.items() if name.endswith(".scales")}
    width = 128 if "down" in prefix else 64
    with pytest.raises((CheckpointError, BadInput), match=sentence):
        run_layer(config, Loadable(checkpoint.tensors, sizes), prefix, torch.randn(1, width))


class Loadable(dict[str, Tensor]):
    """The tensors of a folder, which also knows the sizes of those that were removed from it."""

    def __init__(self, tensors: dict[str, Tensor], sizes: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.sizes = sizes

    def __missing__(self, name: str) -> Tensor:
        return self.sizes[name]


def test_a_stranger_of_a_bias_stops_the_load(vllm: SimpleNamespace, make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint("llama")
    checkpoint.tensors[f"{MLP}.down_proj.bias"] = torch.zeros(64)
    checkpoint.write()
    config = quantization(vllm, checkpoint)
    del checkpoint.tensors[f"{MLP}.down_proj.bias"]
    with pytest.raises(CheckpointError, match=r"down_proj\.bias would be ignored"):
        run_layer(config, checkpoint.tensors, f"{MLP}.down_proj", torch.randn(1, 128))


def test_codes_where_vllm_has_no_linear_are_refused(vllm: SimpleNamespace, make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint("llama")
    config = quantization(vllm, checkpoint)
    assert config.get_quant_method(nn.Embedding(2, 2), "model.embed_tokens") is None
    with pytest.raises(BadInput, match=r"experts\.0\.down_proj is stored as codes, which the Embedding of vLLM"):
        config.headers["model.layers.0.experts.0.down_proj.codes"] = config.headers[f"{MLP}.down_proj.codes"]
        config.get_quant_method(nn.Embedding(2, 2), "model.layers.0.experts")


def test_dense_layers_and_vllm_names(vllm: SimpleNamespace, make_checkpoint: Callable[..., Any]) -> None:
    """lm_head-like linears stay vLLM's own; a vLLM model may call its modules by other names than transformers."""
    checkpoint = make_checkpoint("llama", layers={f"{MLP}.up_proj": "m1v4g-1"})
    config = quantization(vllm, checkpoint)
    assert type(config.get_quant_method(LinearBase(), "lm_head")).__name__ == "UnquantizedLinearMethod"

    def rename(names: dict[str, Any]) -> dict[str, Any]:
        return {name.replace("model.", "language_model.model.", 1): value for name, value in names.items()}

    config.apply_vllm_mapper(SimpleNamespace(apply_dict=rename))
    method = config.get_quant_method(LinearBase(), f"language_model.{MLP}.gate_up_proj")
    assert [str(config.metadata.scheme_of(name)) for name in method.names] == ["m2v8g32", "m1v4g-1"]


def test_a_folder_without_headers_is_refused(vllm: SimpleNamespace, tmp_path: Path) -> None:
    config = vllm.config.from_config({"quant_method": "codegemm", "scheme": "m1v4g128"})
    with pytest.raises(CheckpointError, match="headers"):
        config.get_quant_method(LinearBase(), "lm_head")
    with pytest.raises(CheckpointError, match="is missing"):
        config.maybe_update_config(str(tmp_path))
    assert config.get_supported_act_dtypes() == [torch.float16, torch.bfloat16, torch.float32]
    assert (config.get_name(), config.get_min_capability(), config.get_config_filenames()) == ("codegemm", 80, [])


def test_the_entry_point_needs_no_vllm() -> None:
    """It is the function that vLLM calls, and finding it imports nothing of vLLM."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    declared = project["entry-points"]["vllm.general_plugins"]
    assert declared == {"codegemm": "codegemm_runtime.vllm_plugin:register"}
    script = """
import sys
from codegemm_runtime.vllm_plugin import register
assert not {"vllm", "torch", "transformers"} & set(sys.modules)
try:
    register()
except ModuleNotFoundError as error:
    assert error.name == "vllm"
"""
    subprocess.run([sys.executable, "-c", script], check=True)
