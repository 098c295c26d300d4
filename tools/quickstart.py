"""Evaluate a model, quantise it, load the result, generate, evaluate again: table, chart and one JSON line.

Without arguments it uses the bundled model. With --model give --data, a text the model should be good at: the last
tenth of a file measures, the rest calibrates; of wikitext2 and c4 the training part calibrates, the test part measures.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "models" / "pylm-4m"
MEASURED_SHARE = 0.1


@dataclass(frozen=True)
class Quickstart:
    """What to do the main job on; everything has a default."""

    model: str | None = None
    """Folder or hub name of a dense transformers model; the bundled pylm-4m if not given."""
    data: str | None = None
    """Text to calibrate and measure on: a .txt, .jsonl or .parquet file, wikitext2 or c4."""
    scheme: str = "m1v4g128"
    """Codebooks, vector length and scale group size, such as m2v8g128."""
    device: str | None = None
    """cpu or cuda; the GPU if there is one."""
    out: Path = Path("runs/quickstart")
    """Folder for the checkpoint, the chart and the table."""
    samples: int = 64
    """Calibration windows."""
    sequence_length: int = 512
    """Tokens of a calibration window."""
    epochs: int = 2
    """Passes of the tuning over the calibration windows."""
    window: int = 1024
    """Tokens of a perplexity window."""
    windows: int = 20
    """At most this many perplexity windows."""
    prompt: str = "import unittest\n\n\nclass TestList(unittest.TestCase):\n    def test_"
    """What the quantised model continues."""
    max_new_tokens: int = 64
    """Tokens to generate."""
    seed: int = 0
    """Seed of every random choice."""
    debug: bool = False
    """Show the traceback of a failure."""


def main() -> None:
    """Entry point."""
    import tyro

    config = tyro.cli(Quickstart, description=__doc__)
    say("importing torch and transformers")
    from codegemm_kernels.errors import run_command

    sys.exit(run_command(lambda: run(config), debug=config.debug))


def run(config: Quickstart) -> dict[str, Any]:
    """The whole road. Returns the JSON object of the last line."""
    from codegemm_eval.report import markdown_table, save_chart, terminal_table
    from codegemm_eval.score import evaluate_folder, score_folder
    from codegemm_kernels import CodebookScheme
    from codegemm_quant import QuantizeConfig, quantize
    from codegemm_runtime.loading import choose_device, resolve_folder

    CodebookScheme.parse(config.scheme)  # a typing mistake should not cost the first evaluation
    model, calibration, validation = inputs(config)
    dense = resolve_folder(model)
    checkpoint = config.out / f"{dense.resolve().name}-{config.scheme}"
    device = str(choose_device(config.device))
    check_writable(config.out)
    measure = {"window": config.window, "windows": config.windows, "device": device}

    say(f"1/4 perplexity of {dense} on {device}")
    dense_ppl = evaluate_folder(dense, validation, **measure).perplexity
    say(f"2/4 quantising to {config.scheme}")
    remove_previous(checkpoint)
    quantized = quantize(
        QuantizeConfig(
            model=str(dense),
            scheme=config.scheme,
            data=calibration,
            samples=config.samples,
            sequence_length=config.sequence_length,
            out=str(checkpoint),
            device=device,
            seed=config.seed,
            resume=True,
            tune_epochs=config.epochs,
            model_epochs=config.epochs,
        )
    )
    say("3/4 generating with AutoModelForCausalLM.from_pretrained")
    generated = generate(config, checkpoint, device)
    say("4/4 perplexity of the quantised model")
    quantized_ppl = evaluate_folder(checkpoint, validation, **measure).perplexity
    scores = [score_folder(dense, {"perplexity": dense_ppl}), score_folder(checkpoint, {"perplexity": quantized_ppl})]
    chart, table = config.out / "quickstart.png", config.out / "quickstart.md"
    save_chart(scores, chart, f"{dense.name}: dense and {config.scheme}, on {Path(validation).name}")
    table.write_text(markdown_table(scores) + "\n")
    say(f"\n{terminal_table(scores)}\n\ncheckpoint: {checkpoint}\nchart: {chart}\ntable: {table}\n")
    return {
        "model": config.model or str(BUNDLED.relative_to(ROOT)),
        "scheme": config.scheme,
        "device": device,
        "bits_per_weight": quantized["bits_per_weight"],
        "ppl_dense": dense_ppl,
        "ppl_quantized": quantized_ppl,
        "bytes_dense": scores[0].bytes,
        "bytes_quantized": scores[1].bytes,
        "quantize_seconds": quantized["seconds"],
        "tokens_per_second": generated.tokens / generated.seconds,
        "sample": config.prompt + generated.text,
        "checkpoint": str(checkpoint),
    }


def inputs(config: Quickstart) -> tuple[str, str, str]:
    """Model, calibration text and validation text; the two texts have no part in common."""
    from codegemm_eval.text import NAMED, read_text
    from codegemm_kernels import BadInput

    if config.data is None:
        if config.model is not None:
            raise BadInput(
                f"--model {config.model} needs --data: a .txt, .jsonl or .parquet file of text, wikitext2 or c4"
            )
        return str(BUNDLED), str(BUNDLED / "calibration.txt"), str(BUNDLED / "validation.txt")
    model = config.model or str(BUNDLED)
    if config.data in NAMED and not Path(config.data).is_file():
        return model, config.data, config.data
    text = read_text(config.data)
    cut = text.find("\n", int(len(text) * (1 - MEASURED_SHARE))) + 1 or len(text)
    check_writable(config.out)
    parts = (config.out / "calibration.txt", text[:cut]), (config.out / "validation.txt", text[cut:])
    for path, part in parts:
        path.write_text(part, encoding="utf-8")
    return model, str(parts[0][0]), str(parts[1][0])


def check_writable(out: Path) -> None:
    """Make the output folder, before any time is spent."""
    from codegemm_kernels import BadInput

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the folder {out} ({error.strerror}): choose another --out") from error


def remove_previous(checkpoint: Path) -> None:
    """Make room for a new checkpoint; only one of ours is ever deleted."""
    from codegemm_kernels import BadInput, CheckpointMetadata
    from codegemm_kernels.checkpoint import read_config

    if not checkpoint.exists():
        return
    if CheckpointMetadata.from_config(read_config(checkpoint)) is None:
        raise BadInput(f"{checkpoint} is there and is no CodeGEMM checkpoint: choose another --out")
    say(f"replacing the checkpoint of an earlier run in {checkpoint}")
    shutil.rmtree(checkpoint)


def generate(config: Quickstart, checkpoint: Path, device: str) -> Any:
    """Load the way any transformers program does and continue the prompt, showing the text as it comes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from codegemm_runtime.generation import Sampling, generate_text

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", device_map=device)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    sampling = Sampling(temperature=0.7, top_p=0.9, seed=config.seed)
    generate_text(model, tokenizer, config.prompt, 4)  # the first call sets kernels up; the next one is timed
    print(config.prompt, end="", file=sys.stderr)
    result = generate_text(model, tokenizer, config.prompt, config.max_new_tokens, sampling, write=show)
    print(file=sys.stderr)
    return result


def show(text: str) -> None:
    """Text as it is produced."""
    print(text, end="", flush=True, file=sys.stderr)


def say(text: str) -> None:
    """A line for the person at the terminal."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
