"""The charts of bench_kernels: a roofline, and for a CPU the time over that of a plain read."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(rows: list[dict[str, Any]], read_rate: float, path: Path) -> None:
    """Roofline: operations a second over operations a byte of weights, both axes logarithmic.

    A product's bytes are those of its codes and scales, a dense one's its 16-bit weights. The roof is what the run
    measured: reading at `read_rate` bytes a second, and its fastest product.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    batches, schemes = sorted({row["batch"] for row in rows}), sorted({row["scheme"] for row in rows})
    colours = dict(
        zip(batches, pyplot.get_cmap("viridis")([i / len(batches) for i in range(len(batches))]), strict=True)
    )
    markers = dict(zip(schemes, "osv^Dx+*" * len(schemes), strict=False))
    points = []
    for row in rows:
        work, colour = 2e6 * row["batch"] * _elements(row["shape"]), colours[row["batch"]]
        points.append((work / (row["floor_us"] * read_rate), work / row["us"]))
        axes.plot(*points[-1], marker=markers[row["scheme"]], color=colour, markersize=5, linestyle="")
        if row["dense_us"]:
            points.append((row["batch"], work / row["dense_us"]))
            axes.plot(*points[-1], marker="_", color=colour, markersize=8, linestyle="")
    first, last, fastest = min(x for x, _ in points) / 2, 2 * max(x for x, _ in points), max(y for _, y in points)
    axes.plot([first, fastest / read_rate], [first * read_rate, fastest], color="grey", linewidth=1)
    axes.plot([fastest / read_rate, max(last, 2 * fastest / read_rate)], [fastest, fastest], color="grey", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte of weights")
    axes.set_ylabel("operations a second")
    for scheme in schemes:
        axes.plot([], [], marker=markers[scheme], color="k", linestyle="", label=scheme)
    if any(row["dense_us"] for row in rows):
        axes.plot([], [], marker="_", color="k", linestyle="", markersize=8, label="torch, dense")
    for batch in batches:
        axes.plot([], [], color=colours[batch], linewidth=4, label=f"rows of x: {batch}")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _elements(shape: str) -> int:
    """N K of a shape written N x K, or N+N+N x K."""
    rows, columns = shape.split("x")
    return sum(map(int, rows.split("+"))) * int(columns)


def draw_ratios(rows: list[dict[str, Any]], path: Path) -> None:
    """Time of one row of x over that of reading the codes and scales, by shape, scheme and threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = [row for row in rows if row["batch"] == min(row["batch"] for row in rows)]
    shapes = list(dict.fromkeys(row["shape"] for row in first))
    kinds = list(dict.fromkeys((row["scheme"], row["threads"]) for row in first))
    figure, axes = pyplot.subplots(figsize=(8, 4))
    width = 0.8 / len(kinds)
    for at, (scheme, threads) in enumerate(kinds):
        ratios = {
            row["shape"]: row["us"] / row["stream_us"]
            for row in first
            if (row["scheme"], row["threads"]) == (scheme, threads)
        }
        places = [i + (at - (len(kinds) - 1) / 2) * width for i in range(len(shapes))]
        axes.bar(places, [ratios[shape] for shape in shapes], width, label=f"{scheme}, threads: {threads}")
    axes.axhline(1, color="grey")
    axes.set_xticks(range(len(shapes)), shapes)
    axes.set_ylabel("time / time of a plain read")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150, bbox_inches="tight")
