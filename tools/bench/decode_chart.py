"""The chart of bench_decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens a second of each backend, scheme and context: over the batch, or as bars where there is one batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    lines: dict[str, list[tuple[float, ...]]] = {}
    for row in rows:
        if "batch" in row:
            name = row["backend"] if row["scheme"] == row["backend"] else f"{row['backend']} {row['scheme']}"
            line = lines.setdefault(f"{name}, context {row['context']}", [])
            line.append((row["batch"], row["tokens_per_second"], row["tokens_per_second_std"]))
    if all(len(line) == 1 for line in lines.values()):
        _, speeds, errors = zip(*(line[0] for line in lines.values()), strict=True)
        bars = axes.barh(list(lines), speeds, xerr=errors, height=0.6)
        axes.bar_label(bars, fmt="%.3g", padding=4)
        axes.margins(x=0.12)
        axes.invert_yaxis()
        axes.set_xlabel("tokens a second")
    else:
        for label, line in lines.items():
            axes.errorbar(*zip(*sorted(line), strict=True), marker="o", label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("sequences at a time")
        axes.set_ylabel("tokens a second")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=150, bbox_inches="tight")
