"""Comparisons for people: a table for the terminal or Markdown, and a chart of size and perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from codegemm_eval.score import DENSE, FolderScore

_COLUMNS = ("model", "scheme", "bits/weight", "size (MB)", "perplexity")
_DENSE_COLOUR, _QUANTIZED_COLOUR = "#8a93a0", "#2166ac"


def terminal_table(scores: Sequence[FolderScore]) -> str:
    """One line a model, columns aligned, numbers to the right."""
    cells = _cells(scores)
    widths = [max(len(row[i]) for row in cells) for i in range(len(_COLUMNS))]
    lines = ["  ".join(_align(cell, widths[i], i) for i, cell in enumerate(row)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown_table(scores: Sequence[FolderScore]) -> str:
    """The same table in Markdown."""
    rows = ["| " + " | ".join(row) + " |" for row in _cells(scores)]
    rule = "|" + "|".join("---:" if i > 1 else "---" for i in range(len(_COLUMNS))) + "|"
    return "\n".join([rows[0], rule, *rows[1:]])


def save_chart(scores: Sequence[FolderScore], path: Path, title: str) -> None:
    """Write a PNG of two bar charts, size in MB and perplexity, one bar a model in both."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.5 + 2.6 * len(scores), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    size, quality = figure.subplots(1, 2)
    _draw_bars(size, scores, [score.bytes / 1e6 for score in scores], "Checkpoint size", "megabytes", "{:.1f} MB")
    _draw_bars(quality, scores, [s.perplexity for s in scores], "Perplexity", "perplexity (lower is better)", "{:.2f}")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _cells(scores: Sequence[FolderScore]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (s.name, s.scheme, f"{s.bits_per_weight:.2f}", f"{s.bytes / 1e6:.2f}", f"{s.perplexity:.3f}") for s in scores
    ]
    return [_COLUMNS, *rows]


def _align(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column > 1 else cell.ljust(width)


def _draw_bars(axes: Any, scores: Sequence[FolderScore], values: list[float], title: str, unit: str, form: str) -> None:
    labels = [f"{fill(s.name, 18)}\n{s.scheme}\n{s.bits_per_weight:.2f} bits/weight" for s in scores]
    colours = [_DENSE_COLOUR if s.scheme == DENSE else _QUANTIZED_COLOUR for s in scores]
    bars = axes.bar(range(len(values)), values, width=0.6, color=colours)
    axes.bar_label(bars, labels=[form.format(value) for value in values], padding=3, fontsize=10)
    axes.set_xticks(range(len(values)), labels, fontsize=8.5)
    axes.set_title(title, fontsize=11)
    axes.set_ylabel(unit, fontsize=9)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.grid(True, color="#e3e6ea")
    axes.set_axisbelow(True)
