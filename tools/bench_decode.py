"""Times decoding, token by token, of a whole model with random codes: table, JSON file and chart.

Nothing is downloaded: shapes are built in, or come from a checkpoint folder with its own weights. The engine's steps
start from a cache filled with noise, so a long context costs no prompt. floor_fraction is the time in which memory, at
the speed of a large copy, delivers the bytes that a step must read, over the time measured.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from codegemm_kernels.errors import BadInput, run_command

FAMILIES = {"aqlm": ("aqlm-2x8", "aqlm-1x16"), "llama.cpp": ("llama.cpp-TQ2_0", "llama.cpp-Q2_K")}


@dataclass(frozen=True)
class Bench:
    """What to time."""

    json: Path
    """File for all rows; the chart goes beside it as .png."""
    shape: str = "llama-3.1-8b"
    """llama-3.2-1b, llama-3.1-8b, llama-3.1-70b, or a checkpoint folder."""
    scheme: tuple[str, ...] = ("m1v4g128",)
    """Codebooks, vector length and scale group size; a folder has its own."""
    batch: tuple[int, ...] = (1,)
    """Sequences at a time."""
    context: tuple[int, ...] = (128,)
    """Tokens each sequence has at the start."""
    prompt: tuple[int, ...] = ()
    """Lengths of prompts whose reading and first token are timed."""
    backends: str = "engine"
    """engine, transformers (its generate, with our layers), dense (the engine without codes), aqlm (2x8 and 1x16),
    llama.cpp (TQ2_0 and Q2_K with a 6-bit head, on the CPU)."""
    device: str = "cuda"
    """cuda, cuda:0 or cpu."""
    dtype: str = "float16"
    """Type of activations and of whatever is not codes: float16, bfloat16 or float32."""
    head_bits: int | None = None
    """Round the output head to 8 or 4 bits."""
    tokens: int = 64
    """New tokens a run."""
    runs: int = 5
    """Runs, each from the same context."""
    int8_cache: bool = False
    """Keep keys and values as int8."""
    start: bool = False
    """Also write the model to a temporary folder and time from opening it to the first token."""
    debug: bool = False
    """Show the traceback of a failure."""


def main() -> None:
    """Entry point."""
    import tyro

    config = tyro.cli(Bench, description=__doc__)
    sys.exit(run_command(lambda: run(config), debug=config.debug))


def run(config: Bench) -> dict[str, Any]:
    """Time everything and write the files; returns the rows."""
    from bench.decode_models import build

    from codegemm_runtime.loading import choose_device
    from codegemm_runtime.random_models import SHAPES
    from codegemm_runtime.rounding import round_head

    backends = [backend for backend in config.backends.split(",") if backend]
    backends = [one for backend in backends for one in FAMILIES.get(backend, (backend,))]
    if not backends or set(backends) - set(TIMERS):
        raise BadInput(f"unknown backends in {config.backends!r}: choose from {', '.join(TIMERS)}")
    if config.shape not in SHAPES and not Path(config.shape).is_dir():
        raise BadInput(f"unknown shape {config.shape!r}: choose from {', '.join(SHAPES)} or give a checkpoint folder")
    if config.runs < 2 or config.tokens < 1:
        raise BadInput("--runs must be at least 2, for a deviation, and --tokens at least 1")
    if any(backend.startswith("llama.cpp") for backend in backends) and config.batch != (1,):
        raise BadInput("llama.cpp is timed with one sequence: leave it out, or give --batch 1")
    device = choose_device(config.device)
    rate = copy_rate(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{name}, copies at {rate / 1e9:.0f} GB/s", file=sys.stderr)
    result: dict[str, Any] = {
        "device": name, "torch": torch.__version__, "threads": torch.get_num_threads(), "copy_rate": rate, "rows": []
    }  # fmt: skip
    config.json.parent.mkdir(parents=True, exist_ok=True)
    for backend in backends:
        schemes = config.scheme if backend in ("engine", "transformers") and config.shape in SHAPES else ("",)
        for scheme in schemes:
            room = max((*config.context, *config.prompt)) + config.tokens + 8
            model = build(backend, config.shape, scheme, getattr(torch, config.dtype), device, room)
            if config.head_bits is not None and not backend.startswith("llama.cpp"):
                round_head(model, config.head_bits)
            for row in TIMERS[backend](config, model, rate):
                row = {"shape": Path(config.shape).name, "scheme": scheme or backend, "backend": backend} | row
                if config.head_bits is not None and not backend.startswith("llama.cpp"):
                    row["head_bits"] = config.head_bits
                result["rows"].append(row)
                print(*row.values(), file=sys.stderr, flush=True)
                config.json.write_text(json.dumps(result, indent=1) + "\n")
            del model
            gc.collect()
            torch.cuda.empty_cache()
    from bench.decode_chart import draw

    draw(result["rows"], config.json.with_suffix(".png"))
    return {"rows": result["rows"]}


def time_engine(config: Bench, model: Any, rate: float) -> Any:
    """Rows of the engine, one a batch and context; then one a prompt."""
    from codegemm_runtime.engine import Engine
    from codegemm_runtime.engine.sampling import Kind

    room = max((*config.context, *config.prompt)) + config.tokens + 8
    start = time.perf_counter()
    engine = Engine(model, room, max(config.batch), config.int8_cache)
    if engine.context < room:
        raise BadInput(f"{room} tokens are wanted and the model takes {engine.context}: shorten --context or --prompt")
    engine.steps.advance(1, Kind())
    synchronise(model.device)
    ready = time.perf_counter() - start
    for tensor in (engine.cache.keys, engine.cache.values):
        for layer in range(tensor.shape[0]):
            tensor[layer].random_(-100, 100) if config.int8_cache else tensor[layer].normal_()
    weights = weight_bytes(model)
    cache_bytes = engine.cache.keys.nbytes + engine.cache.values.nbytes
    for batch in config.batch:
        for context in config.context:

            def decode(batch: int = batch, context: int = context) -> None:
                engine.steps.set_lengths([context] * batch)
                for _ in range(config.tokens):
                    engine.steps.advance(batch, Kind())

            read = cache_bytes // (engine.cache.slots * room) * batch * (context + config.tokens // 2)
            timed = timings(decode, config, model.device)
            yield row_of(timed, batch, context, weights + read, config, rate) | {
                "engine_ready_seconds": ready, "weight_bytes": weights, "cache_bytes": cache_bytes,
                "memory_bytes": taken(model.device),
            }  # fmt: skip
    yield from (time_prompt(config, engine, length) for length in config.prompt)
    if config.start:
        yield {"start_seconds": time_start(config, model)}


def time_prompt(config: Bench, engine: Any, length: int) -> dict[str, Any]:
    """Milliseconds from a prompt to its first token, and the speed of the tokens that a caller sees."""
    from codegemm_runtime.engine import Request

    prompt = torch.randint(0, engine.decoder.vocabulary, (length,)).tolist()
    first, streamed = [], []

    def stream() -> None:
        start = time.perf_counter()
        steps = engine.generate([prompt], Request(config.tokens))
        next(steps)
        first.append(time.perf_counter() - start)
        made = sum(1 for _ in steps)
        streamed.append(made / (time.perf_counter() - start - first[-1]))

    timings(stream, config, engine.decoder.device)
    return {
        "prompt": length,
        "first_token_ms": statistics.mean(first[1:]) * 1e3,
        "first_token_ms_std": statistics.stdev(first[1:]) * 1e3,
        "streamed_tokens_per_second": statistics.mean(streamed[1:]),
    }


def time_start(config: Bench, model: Any) -> float:
    """Seconds from a folder on disk to the first token of a 128-token prompt."""
    from codegemm_kernels import CheckpointMetadata, CodebookScheme
    from codegemm_runtime import load_model
    from codegemm_runtime.engine import Engine, Request

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        path = Path(folder) / "config.json"
        metadata = CheckpointMetadata(CodebookScheme.parse(config.scheme[-1]), {}, ("lm_head",))
        settings = json.loads(path.read_text()) | {"quantization_config": metadata.to_quantization_config()}
        path.write_text(json.dumps(settings))
        start = time.perf_counter()
        engine = Engine(load_model(folder, model.device), 256)
        next(engine.generate([list(range(128))], Request(2)))
        return time.perf_counter() - start


def time_generate(config: Bench, model: Any, rate: float) -> Any:
    """Rows of transformers' generate: longer answers to one prompt without the time of the quickest shorter one."""
    more, less = max(config.tokens // 4, 8), 4

    def answer(ids: torch.Tensor, count: int) -> None:
        settings = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": count, "min_new_tokens": count}
        model.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    for batch in config.batch:
        for context in config.context:
            ids = torch.randint(0, model.config.vocab_size, (batch, context), device=model.device)
            walls = [
                timings(lambda count=count, ids=ids: answer(ids, count), config, model.device)["wall"]
                for count in (less + more, less)
            ]
            wall = [(one - min(walls[1])) * config.tokens / more for one in walls[0]]
            timed: dict[str, list[float]] = {"wall": wall, "event": []}
            shape = model.config
            width = shape.num_key_value_heads * (shape.hidden_size // shape.num_attention_heads)
            read = 2 * shape.num_hidden_layers * width * model.dtype.itemsize * batch * context
            yield row_of(timed, batch, context, weight_bytes(model) + read, config, rate) | {
                "memory_bytes": taken(model.device)
            }


def time_llama(config: Bench, model: Any, rate: float) -> Any:
    """Rows of llama.cpp, one a context."""
    for context in config.context:
        model.read([7] * context)

        def decode(context: int = context) -> None:
            model.forget(context)
            for _ in range(config.tokens):
                model.read([7])

        timed = timings(decode, config, torch.device("cpu"))
        model.forget(0)
        yield row_of(timed, 1, context, model.weight_bytes, config, rate) | {"weight_bytes": model.weight_bytes}
    model.close()


TIMERS: dict[str, Callable[[Bench, Any, float], Any]] = {
    "engine": time_engine,
    "dense": time_engine,
    "transformers": time_generate,
    "aqlm-2x8": time_generate,
    "aqlm-1x16": time_generate,
    "llama.cpp-TQ2_0": time_llama,
    "llama.cpp-Q2_K": time_llama,
}


def row_of(
    timed: dict[str, list[float]], batch: int, context: int, read: int, config: Bench, rate: float
) -> dict[str, Any]:
    """A row from the seconds of each run."""
    wall = statistics.mean(timed["wall"]) / config.tokens
    return {
        "batch": batch,
        "context": context,
        "tokens_per_second": batch / wall,
        "tokens_per_second_std": statistics.pstdev([batch * config.tokens / each for each in timed["wall"]]),
        "ms_per_token": wall * 1e3,
        "event_ms_per_token": statistics.mean(timed["event"]) / config.tokens * 1e3 if timed["event"] else None,
        "floor_fraction": read / rate / wall,
    }


def timings(call: Callable[[], None], config: Bench, device: torch.device) -> dict[str, list[float]]:
    """Wall and CUDA-event seconds of each run, after one that does not count."""
    wall, event = [], []
    for _ in range(config.runs + 1):
        synchronise(device)
        if device.type == "cuda":
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            marks[0].record()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            marks[1].record()
        synchronise(device)
        wall.append(time.perf_counter() - start)
        if device.type == "cuda":
            event.append(marks[0].elapsed_time(marks[1]) / 1e3)
    return {"wall": wall[1:], "event": event[1:]}


def taken(device: torch.device) -> int:
    """Bytes taken on the GPU, whoever has them; of a CPU nothing is known."""
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
    return total - free


def synchronise(device: torch.device) -> None:
    """Wait for the GPU, where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def weight_bytes(model: Any) -> int:
    """Bytes of weights that a step reads: layers, last norm and head, but of the embedding only a few rows."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
    size = sum(parameter.nbytes for parameter in model.parameters() if parameter is not embedding)
    return size + (embedding.nbytes if getattr(head, "weight", None) is embedding else 0)


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written: the memory's practical ceiling."""
    source = torch.ones((1 << 30) if device.type == "cuda" else (1 << 28), dtype=torch.uint8, device=device)
    target = source.clone()
    seconds = []
    for _ in range(5):
        synchronise(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() / min(seconds)


if __name__ == "__main__":
    main()
