"""The command `codegemm-eval`: ppl, compare, tasks."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from codegemm_kernels.errors import BadInput, run_command

if TYPE_CHECKING:
    from codegemm_eval.perplexity import Perplexity

CHART_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a checkpoint folder is loaded."""

    device: str | None = None
    """cpu, cuda or cuda:N; the first GPU if there is one, or else cpu."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto is the dtype of the checkpoint."""
    debug: bool = False
    """Show the traceback of a failure."""


@dataclass(frozen=True, kw_only=True)
class TextOptions(LoadOptions):
    """What a perplexity is measured on."""

    data: str
    """Text: a .txt, .jsonl or .parquet file, or wikitext2 or c4 (downloaded)."""
    window: int = 2048
    """Tokens of a window; windows do not overlap. Published numbers use 2048."""
    windows: int | None = None
    """At most this many windows; all of the text if not given."""
    batch_size: int = 1
    """Windows in one forward pass."""


@dataclass(frozen=True, kw_only=True)
class Ppl(TextOptions):
    """Perplexity of a checkpoint folder, dense or quantised, on a text."""

    folder: tyro.conf.Positional[Path]
    """Checkpoint folder."""


@dataclass(frozen=True, kw_only=True)
class Compare(TextOptions):
    """Table and chart of the size and perplexity of several checkpoint folders."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Checkpoint folders, dense or quantised."""
    chart: Path = Path("comparison.png")
    """The chart to write; the table goes beside it as .md."""


@dataclass(frozen=True, kw_only=True)
class Tasks(LoadOptions):
    """Run lm-eval tasks on a checkpoint folder, dense or quantised."""

    folder: tyro.conf.Positional[Path]
    """Checkpoint folder."""
    tasks: tuple[str, ...]
    """Names of lm-eval tasks."""
    limit: int | None = None
    """Examples of each task; all of them if not given."""
    num_fewshot: int | None = None
    """Worked examples before each question; what the task says if not given."""
    batch_size: int = 8
    """Requests in one forward pass."""
    out: Path | None = None
    """JSON file of results by model, which the results are merged into."""


def main() -> None:
    """Entry point of the console script."""
    commands = (
        Annotated[Ppl, tyro.conf.subcommand("ppl")]
        | Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Tasks, tyro.conf.subcommand("tasks")]
    )
    chosen: Ppl | Compare | Tasks = tyro.cli(commands, prog="codegemm-eval", description=__doc__)
    sys.exit(run_command(lambda: run(chosen), debug=chosen.debug))


def run(command: Ppl | Compare | Tasks) -> dict[str, Any]:
    """Do what `command` says; the result is the JSON of the last line."""
    if isinstance(command, Ppl):
        return run_ppl(command)
    return run_compare(command) if isinstance(command, Compare) else run_tasks(command)


def run_ppl(command: Ppl) -> dict[str, Any]:
    """{"perplexity", "nll", "tokens", "seconds"}."""
    return asdict(_measure(command, command.folder))


def run_compare(command: Compare) -> dict[str, Any]:
    """{"models": [one row each], "chart", "table"}."""
    from codegemm_eval.report import markdown_table, save_chart, terminal_table
    from codegemm_eval.score import score_folder

    if not command.folders:
        raise BadInput("nothing to compare: give one or more checkpoint folders")
    if command.chart.suffix not in CHART_SUFFIXES:
        raise BadInput(f"the chart {command.chart} must end in one of {', '.join(CHART_SUFFIXES)}")
    scores = []
    for folder in command.folders:
        print(f"evaluating {folder}", file=sys.stderr)
        scores.append(score_folder(folder, _measure(command, folder)))
    table = command.chart.with_suffix(".md")
    save_chart(scores, command.chart, f"Size and perplexity on {Path(command.data).name}")
    table.write_text(markdown_table(scores) + "\n")
    print(terminal_table(scores), f"chart: {command.chart}", f"table: {table}", sep="\n", file=sys.stderr)
    return {"models": [asdict(score) for score in scores], "chart": str(command.chart), "table": str(table)}


def run_tasks(command: Tasks) -> dict[str, Any]:
    """{"model", "tasks": {task: {metric: value}}}."""
    from codegemm_eval import harness
    from codegemm_runtime.loading import load_model, load_tokenizer

    model = load_model(command.folder, device=command.device, dtype=command.dtype)
    results = harness.run_tasks(
        model,
        load_tokenizer(command.folder),
        command.tasks,
        limit=command.limit,
        num_fewshot=command.num_fewshot,
        batch_size=command.batch_size,
    )
    if command.out is not None:
        harness.store_results(command.out, str(command.folder), results)
        print(f"results: {command.out}", file=sys.stderr)
    return {"model": str(command.folder), "tasks": results}


def _measure(command: TextOptions, folder: Path) -> Perplexity:
    from codegemm_eval.score import evaluate_folder

    return evaluate_folder(
        folder,
        command.data,
        window=command.window,
        windows=command.windows,
        batch_size=command.batch_size,
        device=command.device,
        dtype=command.dtype,
    )
