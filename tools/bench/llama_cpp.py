"""llama.cpp beside our own on the CPU, by the packages llama-cpp-python and gguf: one matrix, and a whole Llama.

Weights are random blocks of llama.cpp's formats; a head is Q6_K, which is what its quantiser makes of it.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from codegemm_kernels.errors import BadInput

# Bytes and weights of a block, and where its fp16 scales are: ggml-common.h of llama.cpp.
_BLOCKS = {"TQ2_0": (66, 256, (64,)), "Q2_K": (84, 256, (80, 82)), "Q4_0": (18, 32, (0,)), "Q6_K": (210, 256, (208,))}
HEAD = "Q6_K"


def packages() -> tuple[Any, Any]:
    """The modules llama_cpp and gguf; BadInput where they are not installed."""
    try:
        import gguf
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise BadInput(
            f"the peer llama.cpp needs the packages llama-cpp-python and gguf ({error}): "
            "run with `uv run --with llama-cpp-python --with gguf`, or leave it out"
        ) from error
    return llama_cpp, gguf


def check_format(name: str) -> str:
    """`name`, or BadInput when it is no format of `_BLOCKS`."""
    if name not in _BLOCKS:
        raise BadInput(f"unknown format {name!r} of llama.cpp: choose from {', '.join(_BLOCKS)}")
    return name


def random_blocks(N: int, K: int, name: str) -> Any:
    """Random weights [N, bytes of a row] in a format, with scales that keep activations finite."""
    import numpy as np

    size, weights, scales = _BLOCKS[name]
    blocks = np.random.default_rng(0).integers(0, 256, (N, K // weights, size), dtype=np.uint8)
    for at in scales:
        blocks[..., at : at + 2] = np.array([0.01], np.float16).view(np.uint8)
    return blocks.reshape(N, -1)


def write_model(path: Path, shape: dict[str, Any], name: str) -> None:
    """A GGUF file of a Llama with the arguments of LlamaConfig in `shape`, its products in a format, without words."""
    import numpy as np

    _, gguf = packages()
    writer = gguf.GGUFWriter(path, "llama")
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    heads, kv_heads, words = shape["num_attention_heads"], shape["num_key_value_heads"], shape["vocab_size"]
    writer.add_block_count(layers)
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_rope_freq_base(shape["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(words)
    writer.add_tokenizer_model("none")
    kv = hidden // heads * kv_heads
    products = {
        "attn_q": (hidden, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }

    def add(tensor: str, N: int, K: int, kind: str) -> None:
        blocks = random_blocks(N, K, kind)
        writer.add_tensor(tensor, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])

    ones = np.ones(hidden, np.float32)
    add("token_embd.weight", words, hidden, HEAD)
    if not shape["tie_word_embeddings"]:
        add("output.weight", words, hidden, HEAD)
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", ones)
        for product, (N, K) in products.items():
            add(f"blk.{layer}.{product}.weight", N, K, name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Model:
    """A random Llama that llama.cpp decodes, one sequence, on `threads` threads."""

    def __init__(self, shape: dict[str, Any], name: str, room: int, threads: int) -> None:
        """`room` is the context with the new tokens."""
        self._api, _ = packages()
        self._silence = self._api.llama_log_callback(lambda level, text, data: None)  # kept: the library calls it
        self._api.llama_log_set(self._silence, None)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "random.gguf"
            write_model(path, shape, check_format(name))
            self.weight_bytes = path.stat().st_size
            loading = self._api.llama_model_default_params()
            loading.use_mmap = False
            self._model = self._api.llama_model_load_from_file(str(path).encode(), loading)
        if not self._model:
            raise RuntimeError("llama.cpp cannot read the model that was written for it")
        settings = self._api.llama_context_default_params()
        settings.n_ctx, settings.n_batch = room, room
        settings.n_threads = settings.n_threads_batch = threads
        self._context = self._api.llama_init_from_model(self._model, settings)

    def read(self, tokens: list[int]) -> None:
        """Append tokens to the sequence and compute the logits after the last."""
        array = (self._api.llama_token * len(tokens))(*tokens)
        if self._api.llama_decode(self._context, self._api.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama.cpp cannot decode")

    def forget(self, start: int) -> None:
        """Shorten the sequence to `start` tokens."""
        self._api.llama_memory_seq_rm(self._api.llama_get_memory(self._context), -1, start, -1)

    def close(self) -> None:
        """Free everything."""
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)


class _InitParams(ctypes.Structure):
    """ggml_init_params of ggml.h."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Plan(ctypes.Structure):
    """ggml_cplan of ggml-cpu.h; what follows its first two fields is left to ggml."""

    _fields_ = (("work_size", ctypes.c_size_t), ("work_data", ctypes.c_void_p), ("rest", ctypes.c_char * 64))


def _library(name: str, folder: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(next(folder.glob(f"lib{name}.*"))))


@contextmanager
def matrix_product(N: int, K: int, batch: int, name: str, copies: int, threads: int) -> Iterator[Callable[[int], None]]:
    """`call(i)` multiplies random x [batch, K] by copy i of a random matrix in a format, by ggml."""
    import numpy as np

    api, gguf = packages()
    folder = Path(api.__file__).parent / "lib"
    base, cpu = _library("ggml-base", folder), _library("ggml-cpu", folder)
    for function in ("ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph", "ggml_get_data"):
        getattr(base, function).restype = ctypes.c_void_p
    blocks = random_blocks(N, K, check_format(name))
    room = copies * (blocks.nbytes + batch * N * 4 + (1 << 20)) + batch * K * 8 + (64 << 20)
    context = ctypes.c_void_p(base.ggml_init(_InitParams(room, None, False)))

    def new(kind: int, width: int, height: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(base.ggml_new_tensor_2d(context, kind, ctypes.c_int64(width), ctypes.c_int64(height)))

    def fill(tensor: ctypes.c_void_p, data: Any) -> None:
        ctypes.memmove(base.ggml_get_data(tensor), data.ctypes.data, data.nbytes)

    x = new(0, K, batch)  # GGML_TYPE_F32
    fill(x, np.random.default_rng(1).standard_normal((batch, K), np.float32))
    graphs = []
    for _ in range(copies):
        weight = new(int(gguf.GGMLQuantizationType[name]), K, N)
        fill(weight, blocks)
        graph = ctypes.c_void_p(base.ggml_new_graph(context))
        base.ggml_build_forward_expand(graph, ctypes.c_void_p(base.ggml_mul_mat(context, weight, x)))
        graphs.append(graph)
    cpu.ggml_graph_plan.restype = _Plan
    plan = cpu.ggml_graph_plan(graphs[0], threads, None)
    work = ctypes.create_string_buffer(max(plan.work_size, 1))
    plan.work_data = ctypes.cast(work, ctypes.c_void_p)
    try:
        yield lambda i: cpu.ggml_graph_compute(graphs[i % copies], ctypes.byref(plan))
    finally:
        base.ggml_free(context)
