"""Serves thousands of mixed requests with one engine and watches its answers, its memory and its time.

Requests are drawn at random: one prompt or several of different lengths, greedy or sampled, with stop strings, given up
in the middle, with sequences stopped, displaced by another request, and such that must be refused. Greedy tokens are
compared with those of transformers' generate, sampled ones with the first answer to the same request.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from codegemm_kernels.errors import BadInput, run_command
from codegemm_runtime.engine import Engine, Request, Sampling

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "models" / "pylm-4m"
CONTEXT, BATCH, LONGEST_ANSWER = 96, 4, 16
WARM_UP = 0.2
"""Part of the run after which memory is to stay where it is: caches of allocators and libraries are full then."""
SAMPLES = 200  # points of memory and time in the result


@dataclass(frozen=True)
class Soak:
    """What to serve."""

    json: Path
    """File for the figures; the chart goes beside it as .png."""
    model: Path | None = None
    """Checkpoint folder; without it the bundled model is quantised for the occasion."""
    data: Path = BUNDLED / "validation.txt"
    """Text that prompts are cut from."""
    requests: int = 10_000
    """How many."""
    prompts: int = 100
    """Different prompts."""
    seed: int = 0
    """Seed of the mixture."""
    debug: bool = False
    """Show the traceback of a failure."""


@dataclass
class Run:
    """A model, its engine, and what was seen."""

    model: Any
    tokenizer: Any
    engine: Any
    prompts: list[list[int]]
    chooser: random.Random
    expected: dict[Any, list[int]] = field(default_factory=dict)
    """Right answers by request: transformers' for greedy ones, the first for sampled ones."""
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0


def main() -> None:
    """Entry point."""
    import tyro

    config = tyro.cli(Soak, description=__doc__)
    sys.exit(run_command(lambda: run(config), debug=config.debug))


def run(config: Soak) -> dict[str, Any]:
    """Serve everything and write the files; returns the figures. Raises BadInput for a count that is none."""
    if config.requests < 50 or config.prompts < 2:
        raise BadInput("--requests must be at least 50, for a trend, and --prompts at least 2")
    with tempfile.TemporaryDirectory() as scratch:
        served = open_run(config, config.model or quantised_model(Path(scratch) / "model"))
        seconds, rss = serve(served, config.requests)
    result = summary(served, seconds, rss) | {"model": config.model.name if config.model else BUNDLED.name}
    config.json.parent.mkdir(parents=True, exist_ok=True)
    config.json.write_text(json.dumps(result, indent=1) + "\n")
    draw(seconds, rss, config.json.with_suffix(".png"))
    return {key: value for key, value in result.items() if key not in ("milliseconds", "mebibytes")}


def quantised_model(out: Path) -> Path:
    """The bundled model with codes that took seconds."""
    from codegemm_quant import QuantizeConfig, quantize

    text = str(BUNDLED / "calibration.txt")
    few = {"samples": 16, "sequence_length": 128, "rounds": 1, "tune_epochs": 0, "model_epochs": 0}
    quantize(QuantizeConfig(model=str(BUNDLED), data=text, out=str(out), scheme="m1v4g128", device="cpu", **few))
    return out


def open_run(config: Soak, folder: Path) -> Run:
    """Load in fp32, in which equal answers are equal tokens: in 16 bits a batch may round two logits the other way."""
    from codegemm_runtime.loading import load_model, load_tokenizer

    model, tokenizer = load_model(folder, "cpu", "float32"), load_tokenizer(folder)
    text, chooser = tokenizer(config.data.read_text(encoding="utf-8")).input_ids, random.Random(config.seed)
    longest = CONTEXT - LONGEST_ANSWER
    starts = [chooser.randrange(len(text) - longest) for _ in range(config.prompts)]
    prompts = [text[start : start + chooser.randint(1, longest)] for start in starts]
    return Run(model, tokenizer, Engine(model, CONTEXT, BATCH), prompts, chooser)


def serve(served: Run, requests: int) -> tuple[list[float], list[int]]:
    """Every request; returns the seconds of each and the resident bytes after each."""
    from tqdm import tqdm

    seconds, rss = [], []
    kinds, weights = list(KINDS), [weight for _, weight in KINDS.values()]
    for number in tqdm(range(requests), desc="serve", unit="request", dynamic_ncols=True):
        (kind,) = served.chooser.choices(kinds, weights)
        start = time.perf_counter()
        try:
            KINDS[kind][0](served)
        finally:
            seconds.append(time.perf_counter() - start)
        served.kinds[kind] += 1
        if number % max(requests // SAMPLES, 1) == 0:
            ctypes.CDLL(None).malloc_trim(0)  # free memory that the allocator keeps would hide a leak
        rss.append(resident_bytes())
    return seconds, rss


def resident_bytes() -> int:
    """Memory of this process that is not swapped out, as Linux counts it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def greedy(served: Run, which: int, count: int) -> list[int]:
    """The first `count` tokens that transformers makes of a prompt."""
    key = ("greedy", which)
    if key not in served.expected:
        ids, endless = torch.tensor([served.prompts[which]]), {"eos_token_id": None, "pad_token_id": 0}
        made = served.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONGEST_ANSWER, do_sample=False, **endless
        )
        served.expected[key] = made[0, ids.shape[1] :].tolist()
    return served.expected[key][:count]


def compare(served: Run, what: str, made: list[int], wanted: list[int]) -> None:
    """Note a wrong answer."""
    served.tokens += len(made)
    if made != wanted:
        served.wrong.append(f"{what}: {made} instead of {wanted}")


def drawn(served: Run, most: int = BATCH) -> tuple[list[int], int]:
    """Numbers of some prompts and how many tokens are wanted."""
    chooser = served.chooser
    count = chooser.randint(1, most)
    return [chooser.randrange(len(served.prompts)) for _ in range(count)], chooser.randint(1, LONGEST_ANSWER)


def collect(served: Run, which: list[int], wanted: Any, stop: dict[int, int] | None = None) -> list[list[int]]:
    """Tokens of every sequence; `stop` says after how many tokens one is stopped."""
    made: list[list[int]] = [[] for _ in range(len(which) * wanted.sequences)]
    for step in served.engine.generate([served.prompts[i] for i in which], wanted):
        for sequence, token in step:
            made[sequence].append(token)
            if stop and len(made[sequence]) == stop.get(sequence):
                served.engine.stop(sequence)
    return made


def one(served: Run) -> None:
    """One prompt, greedy."""
    which, count = drawn(served, 1)
    compare(served, "one", *collect(served, which, Request(count)), greedy(served, which[0], count))


def several(served: Run) -> None:
    """Prompts of different lengths at once; more than the batch holds wait."""
    which, count = drawn(served, BATCH + 3)
    for i, made in zip(which, collect(served, which, Request(count)), strict=True):
        compare(served, "several", made, greedy(served, i, count))


def sampled(served: Run) -> None:
    """Sampled twice with one seed, in two sequences: the same tokens as the first time."""
    which, seed = served.chooser.randrange(min(len(served.prompts), 20)), served.chooser.randrange(3)
    sampling = Sampling(temperature=0.8, top_p=0.9, top_k=served.chooser.choice([0, 40]), seed=seed)
    made = collect(served, [which], Request(12, sampling=sampling, sequences=2))
    flat = [token for tokens in made for token in tokens]
    compare(served, "sampled", flat, served.expected.setdefault((which, sampling), flat))


def given_up(served: Run) -> None:
    """The caller closes the stream after some tokens, or just forgets it."""
    which, count = drawn(served)
    stream = served.engine.generate([served.prompts[i] for i in which], Request(LONGEST_ANSWER))
    made: list[list[int]] = [[] for _ in which]
    for _ in range(min(count, LONGEST_ANSWER - 1)):
        for sequence, token in next(stream):
            made[sequence].append(token)
    if served.chooser.random() < 0.5:
        stream.close()
    for i, tokens in zip(which, made, strict=True):
        compare(served, "given up", tokens, greedy(served, i, len(tokens)))


def stopped(served: Run) -> None:
    """Some sequences of a batch are stopped while the others go on."""
    which, count = drawn(served)
    stop = {sequence: served.chooser.randint(1, count) for sequence in range(0, len(which), 2)}
    for sequence, made in enumerate(collect(served, which, Request(count), stop)):
        compare(served, "stopped", made, greedy(served, which[sequence], stop.get(sequence, count)))


def displaced(served: Run) -> None:
    """A second request begins before the first has ended: the second is right, and the first is told."""
    (first, second), count = [served.chooser.randrange(len(served.prompts)) for _ in range(2)], 5
    stream = served.engine.generate([served.prompts[first]], Request(LONGEST_ANSWER))
    (_, token), *_ = next(stream)
    compare(served, "displaced", [token], greedy(served, first, 1))
    compare(served, "displacing", *collect(served, [second], Request(count)), greedy(served, second, count))
    try:
        next(stream)
    except RuntimeError:
        return
    served.wrong.append("displaced: a stream went on with the tokens of another request")


def stop_string(served: Run) -> None:
    """Text that ends before a stop string, by the function that the command line uses."""
    from codegemm_runtime.generation import generate_text

    which, count = drawn(served, 1)
    prompt = torch.tensor([served.prompts[which[0]]])
    pieces: list[str] = []
    made = generate_text(served.model, served.tokenizer, prompt, count, write=pieces.append, stops=("\n", "self"))
    served.tokens += made.tokens
    text = served.tokenizer.decode(greedy(served, which[0], count), skip_special_tokens=True)
    end = min([place for place in (text.find(stop) for stop in ("\n", "self")) if place >= 0], default=len(text))
    if "".join(pieces) != made.text or not text[:end].startswith(made.text.rstrip("�")):
        served.wrong.append(f"stop string: {made.text!r} instead of {text[:end]!r}")


def refused(served: Run) -> None:
    """Input that must not be taken, and must not matter to the next request."""
    from codegemm_runtime.generation import generate_text

    good, vocabulary = served.prompts[0][:4], served.model.config.vocab_size
    faults: list[Callable[[], Any]] = [
        lambda: next(served.engine.generate([[]], Request(4))),
        lambda: next(served.engine.generate([good, [vocabulary]], Request(4))),
        lambda: next(served.engine.generate([[-1, 3]], Request(4))),
        lambda: next(served.engine.generate([[1.5, float("nan")]], Request(4))),
        lambda: next(served.engine.generate([["text"]], Request(4))),
        lambda: next(served.engine.generate([good * CONTEXT], Request(4))),
        lambda: next(served.engine.generate([good], Request(0))),
        lambda: next(served.engine.generate([good], Request(10**18))),
        lambda: next(served.engine.generate([good], Request(4, sequences=0))),
        lambda: Sampling(temperature=float("nan")),
        lambda: Sampling(top_p=2.0),
        lambda: generate_text(served.model, served.tokenizer, "", 4),
        lambda: generate_text(served.model, served.tokenizer, "half \ud800", 4),
        lambda: generate_text(served.model, served.tokenizer, torch.tensor([[-7]]), 4),
        lambda: generate_text(served.model, served.tokenizer, torch.tensor([1, 2]), 4),
    ]
    number = served.chooser.randrange(len(faults))
    try:
        faults[number]()
    except BadInput:
        return
    served.wrong.append(f"refused: fault {number} was taken")


KINDS: dict[str, tuple[Callable[[Run], None], int]] = {
    "one": (one, 35),
    "several": (several, 15),
    "sampled": (sampled, 10),
    "given up": (given_up, 10),
    "stopped": (stopped, 10),
    "displaced": (displaced, 5),
    "stop string": (stop_string, 10),
    "refused": (refused, 5),
}
"""Kinds of requests, and how many of a hundred are of each."""


def summary(served: Run, seconds: list[float], rss: list[int]) -> dict[str, Any]:
    """The figures: what was wrong, memory after the warm-up, seconds of a request early and late."""
    warm = int(WARM_UP * len(rss))
    tenth = max(len(rss) // 10, 1)
    settled = statistics.median(rss[warm : warm + tenth])
    steady = sorted(seconds[warm:])
    return {
        "requests": len(seconds),
        "kinds": dict(sorted(served.kinds.items())),
        "tokens": served.tokens,
        "wrong": len(served.wrong),
        "first_wrong": served.wrong[:3],
        "seconds": sum(seconds),
        "rss_after_warm_up": settled,
        "rss_growth": statistics.median(rss[-tenth:]) / settled - 1,
        "rss_largest_deviation": max(abs(each / settled - 1) for each in rss[warm:]),
        "latency": {
            "median": statistics.median(steady),
            "p99": steady[int(0.99 * (len(steady) - 1))],
            "largest": steady[-1],
            "median_of_first_tenth": statistics.median(seconds[warm : warm + tenth]),
            "median_of_last_tenth": statistics.median(seconds[-tenth:]),
        },
        "milliseconds": [1e3 * max(part) for part in parts(seconds)],
        "mebibytes": [max(part) / 2**20 for part in parts(rss)],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def parts(values: list[Any]) -> Iterator[list[Any]]:
    """The values in up to SAMPLES runs of equal length."""
    length = -(-len(values) // SAMPLES)
    return (values[start : start + length] for start in range(0, len(values), length))


def draw(seconds: list[float], rss: list[int], path: Path) -> None:
    """Memory and the time of requests over the run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, latency) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True)
    memory.plot([each / 2**20 for each in rss])
    memory.axvspan(0, WARM_UP * len(rss), color="0.92")
    memory.set_ylim(0, 1.2 * max(rss) / 2**20)
    memory.set_ylabel("resident memory, MiB")
    latency.plot([1e3 * each for each in seconds], ".", markersize=1)
    latency.set(yscale="log", ylabel="milliseconds of a request", xlabel="request (grey: warm-up)")
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
