"""Write docs/results.md and the charts in docs/results/plots from the measurements in docs/results/*.json.

The page holds no number that is typed by hand. A JSON file without a section of its own is listed at the end.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "docs" / "results", ROOT / "docs" / "results.md"
COMMAND = "uv run tools/results_page.py"
Row = dict[str, Any]
INTRODUCTION = f"""# Results

Every table and chart is made from a file of measurements by `{COMMAND}`; a test fails when page and files
differ. Each section names the file and the command that measured. What was expected, what failed and what was not
measured is in the [log](log.md).
"""


@dataclass(frozen=True)
class Section:
    """One file of measurements on the page, as page.toml describes it."""

    stem: str
    """Name of the file without .json."""
    title: str
    about: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    """Heading to key of a row; levels are separated by a slash."""
    pivot: dict[str, str] | None = None
    """One column for each value of the key `column`, with `value` in the cells."""
    command: str = ""
    """What measured, where the file itself does not say."""
    whole: bool = False
    """The file is one row, and no list of rows is looked for in it."""
    picture: str | None = None
    """A picture that the measuring command drew, in docs/results."""
    chart: str | None = None
    """Which of CHARTS is drawn here."""

    @property
    def source(self) -> Path:
        """The file."""
        return RESULTS / f"{self.stem}.json"

    @property
    def digest(self) -> str:
        """Tells whether a chart is of the file that is there."""
        return sha256(self.source.read_bytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Page:
    """Where the page is written; everything has a default."""

    debug: bool = False
    """Show the traceback of a failure."""


def main() -> None:
    """Entry point."""
    import tyro

    from codegemm_kernels.errors import run_command

    config = tyro.cli(Page, description=__doc__)
    sys.exit(run_command(write, debug=config.debug))


def write() -> dict[str, Any]:
    """Write page and charts; returns the JSON object."""
    plots = RESULTS / "plots"
    plots.mkdir(exist_ok=True)
    drawn = {plots / f"{section.stem}.svg": section for section in sections() if section.chart is not None}
    for path, section in drawn.items():
        draw_chart(section, path)
    for path in set(plots.iterdir()) - set(drawn):
        path.unlink()
    PAGE.write_text(page(), encoding="utf-8")
    return {"page": str(PAGE.relative_to(ROOT)), "charts": len(drawn)}


def sections() -> list[Section]:
    """Sections whose file is there, then one for every other file."""
    described = [Section(**entry) for entry in tomllib.loads((RESULTS / "page.toml").read_text())["section"]]
    known = {section.stem for section in described}
    rest = sorted(path.stem for path in RESULTS.glob("*.json") if path.stem not in known)
    return [*(each for each in described if each.source.is_file()), *(Section(stem, stem) for stem in rest)]


def page() -> str:
    """The whole page as Markdown."""
    return "\n".join([INTRODUCTION, *(part for section in sections() for part in render(section))])


def render(section: Section) -> Iterator[str]:
    """The parts of a section."""
    data = json.loads(section.source.read_text())
    rows, data = [data] if section.whole else rows_of(data), data if isinstance(data, dict) else {}
    yield f"## {section.title}\n"
    if section.about:
        yield f"{section.about}\n"
    if section.chart is not None:
        yield f"![{section.title}](results/plots/{section.stem}.svg)\n"
    elif section.picture is not None and (RESULTS / section.picture).is_file():
        yield f"![{section.title}](results/{section.picture})\n"
    yield table(section, rows) + "\n"
    told = {key: data.get(key) for key in ("device", "machine", "torch", "commit", "protocol", "note")}
    facts = [f"{key} {value}" for key, value in told.items() if isinstance(value, str)]
    own = [row["command"] for row in rows if isinstance(row.get("command"), str)]
    commands = data.get("commands") or [data.get("command") or section.command]
    commands = commands if any(commands) else list(dict.fromkeys(own))
    yield f"[{section.stem}.json](results/{section.stem}.json): {'; '.join(facts) or 'machine not noted'}.\n"
    if any(commands):
        yield "<!-- not run: it is what measured -->"
        yield "```bash\n" + "\n".join(commands) + "\n```\n"


def rows_of(data: Any) -> list[Row]:
    """The measurements in a file: its first list of objects, or its objects, called by their keys under `what`."""
    for value in [data] if isinstance(data, list) else data.values():
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            return value
    return [{"what": key, **value} for key, value in data.items() if isinstance(value, dict)] or [data]


def table(section: Section, rows: list[Row]) -> str:
    """A Markdown table of the rows: the section's columns, or those whose values differ."""
    columns = section.columns or differing(rows)
    heads, body = [*columns], [[shown(look_up(row, key)) for key in columns.values()] for row in rows]
    if section.pivot is not None:
        column, value = section.pivot["column"], section.pivot["value"]
        names = [name for name in dict.fromkeys(look_up(row, column) for row in rows) if name is not None]
        cells: dict[tuple[str, ...], dict[Any, str]] = {}
        for row, keys in zip(rows, map(tuple, body), strict=True):
            cells.setdefault(keys, {})[look_up(row, column)] = shown(look_up(row, value))
        heads += [shown(name) for name in names]
        full = {keys: values for keys, values in cells.items() if values.keys() & set(names)}
        body = [[*keys, *(values.get(name, "") for name in names)] for keys, values in full.items()]
    lines = [heads, ["---"] * len(heads), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def differing(rows: list[Row]) -> dict[str, str]:
    """Plain values that are not the same in all rows, eight of them at most."""
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict | list))
    wanted = [key for key in keys if len(rows) == 1 or len({str(row.get(key)) for row in rows}) > 1]
    return {key.replace("_", " "): key for key in wanted[:8]}


def look_up(row: Row, key: str) -> Any:
    """The value under a key; None where there is none."""
    value: Any = row
    for part in key.split("/"):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def shown(value: Any) -> str:
    """A value as a cell: numbers with four digits that count."""
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "/")


def draw_chart(section: Section, path: Path) -> None:
    """One chart as SVG, with text as text and no date, so that the same numbers make the same file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "codegemm", "axes.spines.top": False}):
        figure = Figure(figsize=(7.5, 4), layout="constrained", facecolor="white")
        axes = figure.subplots()
        axes.spines["right"].set_visible(False)
        axes.set_title(section.title)
        CHARTS[str(section.chart)](axes, rows_of(json.loads(section.source.read_text())))
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small", frameon=False)
        figure.savefig(path, metadata={"Date": None, "Description": f"{section.stem}.json {section.digest}"})


def groups(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of some keys, in their order."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return found


def line(axes: Axes, rows: list[Row], x: str, y: str, label: str, style: str = "o-") -> None:
    """One line of a chart; rows without a value are left out."""
    points = [(look_up(row, x), look_up(row, y)) for row in rows if look_up(row, y) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)


def log_axes(axes: Axes, x: str, y: str) -> None:
    """Both axes logarithmic, with plain numbers."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter("")


def draw_product(axes: Axes, rows: list[Row]) -> None:
    """Time of one product against rows of x, for the shape that README shows."""
    chosen = groups([row for row in rows if row.get("shape") == "28672x4096"], "scheme")
    for (scheme,), mine in chosen.items():
        line(axes, mine, "batch", "us", scheme)
    first = next(iter(chosen.values()), [])
    line(axes, first, "batch", "dense_us", "torch fp16", "k--")
    line(axes, [row for mine in chosen.values() for row in mine], "batch", "aqlm_us", "AQLM 2x8", "r:")
    log_axes(axes, "rows of x (28672 x 4096)", "microseconds")


def draw_prefill(axes: Axes, rows: list[Row]) -> None:
    """Time of a product with many rows relative to torch's dense one."""
    for (shape, scheme), mine in groups(rows, "shape", "scheme").items():
        ratio = [{"batch": row["batch"], "ratio": row["us"] / row["dense_us"]} for row in mine if row.get("dense_us")]
        line(axes, ratio, "batch", "ratio", f"{shape} {scheme}")
    log_axes(axes, "rows of x", "time, torch fp16 = 1")
    axes.axhline(1, color="black", linewidth=0.8)


def draw_decode(axes: Axes, rows: list[Row]) -> None:
    """Tokens a second against sequences, context 128."""
    shown_rows = [row for row in rows if row.get("context") == 128]
    for (shape, backend, scheme, bits), mine in groups(shown_rows, "shape", "backend", "scheme", "head_bits").items():
        what = "dense" if scheme == "dense" else f"{scheme}{', transformers' if backend == 'transformers' else ''}"
        what += "" if bits is None else f", head of {bits} bits"
        line(axes, mine, "batch", "tokens_per_second", f"{shape.rpartition('-')[2].upper()} {what}")
    log_axes(axes, "sequences at a time", "tokens a second")


def draw_gap_by_bits(axes: Axes, rows: list[Row]) -> None:
    """Accuracy lost against size."""
    for row in rows:
        axes.annotate(row["scheme"], (row["bits_per_weight"], row["gap"]), fontsize="small")
    line(axes, rows, "bits_per_weight", "gap", "", "o")
    axes.set_xlabel("bits a weight")
    axes.set_ylabel("ln(perplexity / dense)")


def draw_tuning(axes: Axes, rows: list[Row]) -> None:
    """Held-out divergence against steps."""
    for row in rows:
        rate = "" if row.get("code_learning_rate") is None else f", rate of U {row['code_learning_rate']:g}"
        line(axes, row.get("held_out") or [], "step", "divergence", f"{row['what']}{rate}")
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter("{x:.2g}")
    axes.set_xlabel("steps")
    axes.set_ylabel("KL from the dense model, held-out text")


CHARTS: dict[str, Callable[[Axes, list[Row]], None]] = {
    "product": draw_product,
    "prefill": draw_prefill,
    "decode": draw_decode,
    "gap_by_bits": draw_gap_by_bits,
    "tuning": draw_tuning,
}
"""By the name that page.toml calls them."""

if __name__ == "__main__":
    main()
