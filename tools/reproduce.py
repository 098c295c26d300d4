"""Quantise a model, tune it, and compare dense, quantised, tuned and published checkpoints: perplexity, tasks, speed.

The default recipe is the published one, Llama-3.1-8B-Instruct with m2v8g128, with and without PV-tuning; it needs the
hub and a large GPU. Recipe pylm-4m does the same with the bundled model in minutes on a CPU, --smoke in seconds.
A step whose output is there is not done again, and an interrupted one goes on.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "models" / "pylm-4m"
PUBLISHED = "gunho1123/Llama-3.1-8B-Instruct-Codegemm-m2v8g128"
QUESTIONS, CHOICES, CONTEXT_LINES = 200, 4, 8


@dataclass(frozen=True)
class Reproduce:
    """Which recipe to follow, and where."""

    recipe: Literal["llama-3.1-8b", "pylm-4m", "smoke"] = "llama-3.1-8b"
    """What to do it on, and how thoroughly."""
    smoke: bool = False
    """The same as --recipe smoke: every step, on the bundled model and local data."""
    out: Path = Path("runs/reproduce")
    """Folder for checkpoints and results; each recipe has its own in it."""
    report: Path | None = None
    """The chart to write, with .md and .json beside it; default: report.png in the recipe's folder."""
    device: str | None = None
    """cpu or cuda; the GPU if there is one."""
    processes: int = 1
    """GPUs to tune on."""
    dry_run: bool = False
    """Print the commands and do nothing."""
    debug: bool = False
    """Show the traceback of a failure."""


@dataclass(frozen=True)
class Recipe:
    """The arguments of every step."""

    model: str
    schemes: tuple[str, ...]
    """The last one is tuned."""
    calibration: str
    quantize: str
    """Further options of `codegemm-quant quantize`."""
    tokenize: str
    tune: str
    compare: str
    published: tuple[str, ...] = ()
    """None: the last quantised folder, stripped to the published metadata, stands for them."""


RECIPES = {
    # The options are those of the published README. 5700 steps of 128 x 8192 tokens are one pass over SlimPajama-6B.
    "llama-3.1-8b": Recipe(
        model="meta-llama/Llama-3.1-8B-Instruct",
        schemes=("m2v8g128",),
        calibration="slimpajama",
        quantize="--samples 2048 --sequence-length 8192",
        tokenize="",
        tune="--steps 5700 --batch-size 128 --micro-batch 1 --sequence-length 8192 --gradient-checkpointing",
        compare="--data wikitext2 c4 --suite mmlu csr --speed",
        published=(PUBLISHED, f"{PUBLISHED}-PVtuning"),
    ),
    "pylm-4m": Recipe(
        model=str(BUNDLED),
        schemes=("m1v4g128", "m2v8g128"),
        calibration=str(BUNDLED / "calibration.txt"),
        quantize="--samples 64 --sequence-length 512",
        tokenize="",
        tune="--steps 60 --batch-size 8 --sequence-length 512 --eval-every 20 --eval-windows 8",
        compare=(
            f"--data {BUNDLED / 'validation.txt'} --window 1024 --windows 20 --spread --tasks next_line.yaml "
            "--speed --runs 20"
        ),
    ),
    "smoke": Recipe(
        model=str(BUNDLED),
        schemes=("m1v4g128",),
        calibration=str(BUNDLED / "calibration.txt"),
        quantize="--samples 4 --sequence-length 64 --rounds 0 --model-epochs 0",
        tokenize="--max-tokens 4000",
        tune="--steps 2 --batch-size 2 --sequence-length 64 --eval-windows 2 --beam-size 1",
        compare=(
            f"--data {BUNDLED / 'validation.txt'} --window 128 --windows 4 --tasks next_line.yaml --limit 8 "
            "--speed --prompt-tokens 8 --new-tokens 8 --runs 1"
        ),
    ),
}


@dataclass(frozen=True)
class Step:
    """A command, or something done here, that makes `made`."""

    made: Path
    action: list[str] | Callable[[], None]
    always: bool = False
    """Do it even if `made` is there."""


def main() -> None:
    """Entry point."""
    import tyro

    config = tyro.cli(Reproduce, description=__doc__)
    from codegemm_kernels.errors import run_command

    sys.exit(run_command(lambda: run(config), debug=config.debug))


def run(config: Reproduce) -> dict[str, Any]:
    """All steps. Returns the JSON object of the comparison, of which only the commands with `dry_run`."""
    name = "smoke" if config.smoke else config.recipe
    folder = (config.out / name).absolute()
    planned = list(steps(config, RECIPES[name], folder))
    if config.dry_run:
        return {"commands": [shlex.join(step.action) for step in planned if isinstance(step.action, list)]}
    folder.mkdir(parents=True, exist_ok=True)
    output = ""
    for step in planned:
        if step.made.exists() and not step.always:
            print(f"{step.made} is there", file=sys.stderr)
        elif isinstance(step.action, list):
            output = execute(step.action, folder)
        else:
            step.action()
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def steps(config: Reproduce, recipe: Recipe, folder: Path) -> Iterator[Step]:
    """The whole road, in order."""
    device = [] if config.device is None else ["--device", config.device]
    quantized = [folder / scheme for scheme in recipe.schemes]
    for scheme, made in zip(recipe.schemes, quantized, strict=True):
        command = ["codegemm-quant", "quantize", recipe.model, "--scheme", scheme, "--data", recipe.calibration]
        yield Step(made, [*command, *recipe.quantize.split(), "--out", str(made), "--resume", *device])
    tokens, tuned = folder / "tokens", folder / f"{recipe.schemes[-1]}-tuned"
    command = ["codegemm-quant", "tokenize", recipe.calibration, "--tokenizer", recipe.model, "--out", str(tokens)]
    yield Step(tokens, [*command, *recipe.tokenize.split()])
    several = ["torchrun", "--nproc-per-node", str(config.processes), "--no-python"] * (config.processes > 1)
    command = [*several, "codegemm-quant", "tune", str(quantized[-1]), "--teacher", recipe.model, "--data", str(tokens)]
    yield Step(tuned, [*command, *recipe.tune.split(), "--out", str(tuned), "--resume", *device])
    published = list(recipe.published)
    if not published:
        stripped = folder / f"{recipe.schemes[-1]}-published"
        published = [str(stripped)]
        yield Step(stripped, lambda: strip_metadata(quantized[-1], stripped))
    if "next_line.yaml" in recipe.compare:
        yield Step(folder / "next_line.yaml", lambda: write_task(BUNDLED / "validation.txt", folder))
    report = (config.report or folder / "report.png").absolute()
    command = ["codegemm-eval", "compare", recipe.model, *map(str, quantized), str(tuned), *published]
    options = ["--teacher", recipe.model, "--results", str(folder / "results.jsonl"), "--chart", str(report), *device]
    yield Step(report, [*command, *options, *recipe.compare.split()], always=True)


def execute(command: list[str], folder: Path) -> str:
    """Run a command of this environment in `folder` and return its stdout. Raises RuntimeError when it fails."""
    print(f"\n$ {shlex.join(command)}", file=sys.stderr, flush=True)
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PATH": search}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"`{shlex.join(command[:3])} ...` ended with status {done.returncode}; see above")
    return done.stdout


def strip_metadata(quantized: Path, out: Path) -> None:
    """A copy of a checkpoint with the metadata of a published one: the `codegemm` block alone."""
    building = out.with_name(f".{out.name}")
    shutil.rmtree(building, ignore_errors=True)
    shutil.copytree(quantized, building)
    config = json.loads((building / "config.json").read_text())
    del config["quantization_config"]
    (building / "config.json").write_text(json.dumps(config, indent=2))
    building.rename(out)


def write_task(text: Path, folder: Path) -> None:
    """A task of lm-eval: which of four lines of a text comes next? Lines of 20 characters or more are asked for."""
    chooser = random.Random(0)
    lines = text.read_text(encoding="utf-8").splitlines()
    long = [at for at in range(CONTEXT_LINES, len(lines)) if len(lines[at].strip()) >= 20]
    questions = []
    for at in sorted(chooser.sample(long, QUESTIONS)):
        wrong = [lines[other] for other in chooser.sample(long, CHOICES) if lines[other] != lines[at]][: CHOICES - 1]
        choices = chooser.sample([lines[at], *wrong], len(wrong) + 1)
        context = "\n".join(lines[at - CONTEXT_LINES : at]) + "\n"
        questions.append({"context": context, "choices": choices, "answer": choices.index(lines[at])})
    (folder / "next_line.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / "next_line.yaml").write_text(
        "task: next_line\n"
        "dataset_path: json\n"
        "dataset_kwargs: {data_files: {test: next_line.jsonl}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{context}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{answer}}"\n'
        'target_delimiter: ""\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
        "metadata: {version: 1.0}\n"
    )


if __name__ == "__main__":
    main()
