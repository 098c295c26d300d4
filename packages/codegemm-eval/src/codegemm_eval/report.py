"""Comparisons for people: a table for the terminal or Markdown, and charts of quality and speed against size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codegemm_eval.score import FolderScore

_FIXED = ("model", "scheme", "bits/weight", "size (MB)")
_ROW_OF_PANELS = 3
_MOST_PANELS = 6
_MARKERS = "osD^vP*X<>"


def terminal_table(scores: Sequence[FolderScore]) -> str:
    """One line a model, columns aligned, numbers to the right."""
    cells = _cells(scores)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(_align(cell, widths[i], i) for i, cell in enumerate(row)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown_table(scores: Sequence[FolderScore]) -> str:
    """The same table in Markdown."""
    cells = _cells(scores)
    rows = ["| " + " | ".join(row) + " |" for row in cells]
    rule = "|" + "|".join("---:" if i > 1 else "---" for i in range(len(cells[0]))) + "|"
    return "\n".join([rows[0], rule, *rows[1:]])


def save_chart(scores: Sequence[FolderScore], path: Path, title: str) -> None:
    """Write a picture with a panel for each of the columns (six at most) against size, one point a model."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = _panels(scores)
    across = min(len(columns), _ROW_OF_PANELS)
    down = -(-len(columns) // _ROW_OF_PANELS)
    figure = Figure(figsize=(max(6.0, 4.2 * across), 3.4 * down + 0.8 + 0.22 * len(scores)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for column, axes in zip(columns, panels, strict=False):
        for number, score in enumerate(scores):
            if column in score.measured:
                colour = colormaps["tab10"](number % 10)
                axes.plot(score.bytes / 1e6, score.measured[column], _MARKERS[number % 10], color=colour, ms=8)
        _dress(axes, column, max(score.bytes for score in scores))
    for axes in panels[len(columns) :]:
        axes.axis("off")
    _add_legend(figure, scores)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _columns(scores: Sequence[FolderScore]) -> list[str]:
    """Titles of what was measured, in the order of the fullest row: a teacher has no divergence from itself."""
    fullest_first = sorted(scores, key=lambda score: -len(score.measured))
    return list(dict.fromkeys(title for score in fullest_first for title in score.measured))


def _panels(scores: Sequence[FolderScore]) -> list[str]:
    """Columns worth a panel: all if they fit, else without tasks of which there is a mean, and the first ones."""
    columns = _columns(scores)
    if len(columns) > _MOST_PANELS:
        has_mean = any(column.endswith(" mean") for column in columns)
        columns = [column for column in columns if not (has_mean and column.endswith(")"))]
        columns = [column for column in columns if not column.startswith("top-1")]
    speed = [column for column in columns if column == "tokens/s"]
    return [column for column in columns if column not in speed][: _MOST_PANELS - len(speed)] + speed


def _cells(scores: Sequence[FolderScore]) -> list[tuple[str, ...]]:
    columns = _columns(scores)
    rows = [
        (
            *(s.name, s.scheme, f"{s.bits_per_weight:.2f}", f"{s.bytes / 1e6:.2f}"),
            *(_number(s.measured.get(column)) for column in columns),
        )
        for s in scores
    ]
    return [(*_FIXED, *columns), *rows]


def _number(value: float | None) -> str:
    """Four digits or so; a dash for what was not measured."""
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def _align(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column > 1 else cell.ljust(width)


def _dress(axes: Any, column: str, largest: int) -> None:
    lower = column.startswith(("perplexity", "KL"))
    unit = ", nats a token" if column.startswith("KL") else ""
    axes.set_title(column + unit + (" (lower is better)" if lower else ""), fontsize=10)
    axes.set_xlabel("size, MB", fontsize=9)
    axes.set_xlim(0, 1.1 * largest / 1e6)
    axes.margins(y=0.2)
    axes.grid(True, color="#e3e6ea")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _add_legend(figure: Any, scores: Sequence[FolderScore]) -> None:
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            marker=_MARKERS[number % 10],
            color=colormaps["tab10"](number % 10),
            linestyle="none",
            label=f"{s.name}: {s.scheme}, {s.bits_per_weight:.2f} bits a weight, {s.bytes / 1e6:.1f} MB",
        )
        for number, s in enumerate(scores)
    ]
    figure.legend(handles=handles, loc="outside lower center", fontsize=9, frameon=False)
