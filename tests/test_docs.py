"""The documentation is executed: every fenced block of commands or Python, page by page, in one folder.

What a reader types in the root of a checkout runs here in a folder with the same `models` and `tools`. Blocks run in
order; a page that goes on with what another has made says `<!-- continues PAGE -->`, and that page is run before it.
The comment `<!-- not run: REASON -->` before a block is the only way to leave it out.
"""

from __future__ import annotations

import ast
import doctest
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md"))
EXECUTED = ("bash", "python", "pycon")
SHOWN = ("json", "text", "cpp", "toml")
"""Languages of blocks that hold no command."""
COMMAND = re.compile(
    r"\s*(\$ |uv |pip |python3? |torchrun |make |curl |hf |vllm |transformers |lm_eval "
    r"|codegemm-(quant|runtime|eval) [a-z]+ [\w/-])"
)
FENCE = re.compile(r" *```(\w*)\s*")
LEFT_OUT = re.compile(r" *<!-- not run: (\S.*\S) -->")
CONTINUES = re.compile(r"<!-- continues (\S+\.md) -->")
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"


@dataclass
class Block:
    """A fenced block and where it stands."""

    page: str
    line: int
    language: str
    left_out: str | None
    """Why it is not run."""
    lines: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Fenced blocks of a page, in order. A fence inside a list keeps its indentation out of the block."""
    inside: Block | None = None
    before = ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = FENCE.fullmatch(line)
        if inside is None and fence:
            reason = LEFT_OUT.fullmatch(before)
            inside = Block(page.name, number, fence[1], reason and reason[1])
            indent = len(line) - len(line.lstrip())
        elif inside is not None and fence:
            yield inside
            inside = None
        elif inside is not None:
            inside.lines.append(line[indent:])
        before = line


class Walk:
    """A reader who works through pages in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: set[str] = set()
        for name in ("models", "tools"):
            (folder / name).symlink_to(ROOT / name)

    def read(self, name: str) -> int:
        """Run a page, after the one that it continues; returns how many blocks were run now."""
        page = ROOT / "docs" / name
        if earlier := CONTINUES.search(page.read_text(encoding="utf-8")):
            self.read(earlier[1])
        if name in self.done:
            return 0
        self.done.add(name)
        names: dict[str, Any] = {"__name__": "__main__"}
        executed = [block for block in blocks(page) if block.language in EXECUTED and not block.left_out]
        for block in executed:
            getattr(self, f"_{block.language}")(block, names)
        return len(executed)

    def _bash(self, block: Block, _names: dict[str, Any]) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        # One thread: on a busy machine the threads of such small products wait for each other, 33 s become 220 s.
        environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{block.place} ended with status {done.returncode}:\n{done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr, f"{block.place}:\n{done.stderr[-3000:]}"

    def _python(self, block: Block, names: dict[str, Any]) -> None:
        exec(compile("\n" * block.line + block.text, f"docs/{block.page}", "exec"), names)

    def _pycon(self, block: Block, names: dict[str, Any]) -> None:
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        example = doctest.DocTestParser().get_doctest(block.text, names, block.place, block.page, block.line)
        assert example.examples, f"{block.place} has no >>> line"
        runner = doctest.DocTestRunner(optionflags=flags)
        told: list[str] = []
        runner.run(example, out=told.append, clear_globs=False)
        assert not runner.summarize(verbose=False).failed, f"{block.place}:\n{''.join(told)}"
        names.update(example.globs)


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    return Walk(tmp_path_factory.mktemp("reader"))


@pytest.mark.parametrize("name", [page.name for page in PAGES if any(b.language in EXECUTED for b in blocks(page))])
def test_blocks_run(name, walk, monkeypatch):
    monkeypatch.chdir(walk.folder)
    walk.read(name)
    assert name in walk.done


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_command_hides_from_execution(page):
    """Blocks say what they are, and nothing that looks like a command stands in a block that is not executed."""
    fenced: set[int] = set()
    for block in blocks(page):
        assert block.language in (*EXECUTED, *SHOWN), f"{block.place}: a block of {block.language or 'no language'}"
        fenced |= set(range(block.line, block.line + len(block.lines) + 2))
        if block.language in SHOWN:
            assert not any(COMMAND.match(line) for line in block.lines), f"{block.place} shows a command"
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        indented = line.startswith("    ") and number not in fenced
        assert not (indented and COMMAND.match(line)), f"{page.name}:{number} has a command outside of a fenced block"
        marker = "<!-- not run" in line and number not in fenced
        assert not marker or (LEFT_OUT.fullmatch(line) and number + 1 in fenced), f"{page.name}:{number}: marker astray"


def test_most_blocks_are_run():
    """Those on the results page say how something was measured, on other machines."""
    pages = [page for page in PAGES if page.name != "results.md"]
    every = [block for page in pages for block in blocks(page) if block.language in EXECUTED]
    assert sum(block.left_out is None for block in every) > 0.6 * len(every)


def messages(tree: ast.AST) -> Iterator[str]:
    """Strings of a source, with … for what is filled in at run time."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_in_troubleshooting_are_still_ours():
    text = TROUBLESHOOTING.read_text(encoding="utf-8").split("\n## Messages of others", maxsplit=1)
    assert len(text) == 2
    quoted = [quote for _, quote in re.findall(r"^### (`+) ?(.+?) ?\1$", text[0], re.MULTILINE)]
    assert len(quoted) == text[0].count("\n### ")
    assert len(quoted) > 20
    said = {m for path in ROOT.glob("packages/*/src/**/*.py") for m in messages(ast.parse(path.read_text()))}
    for path in [*ROOT.glob("packages/*/CMakeLists.txt"), *ROOT.glob("packages/*/cmake/*.cmake")]:
        said.add(re.sub(r'"\s*"', "", path.read_text()))
    astray = [quote for quote in quoted if not any(quote in each for each in said)]
    assert not astray, f"no source says {astray}"


def test_every_entry_says_why_and_what_to_do():
    entries = re.split(r"^### ", TROUBLESHOOTING.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    for entry in entries:
        title, _, body = entry.partition("\n")
        assert "**Why.**" in body, title
        assert "**Do.**" in body, title


def test_results_page_is_of_the_files_that_are_there(results_page):
    written = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert written == results_page.page(), f"docs/results has changed: {results_page.COMMAND}"
    charts = {f"{section.stem}.svg": section for section in results_page.sections() if section.chart}
    assert {path.name for path in (ROOT / "docs" / "results" / "plots").iterdir()} == set(charts)
    for name, section in charts.items():
        drawn = (ROOT / "docs" / "results" / "plots" / name).read_text(encoding="utf-8")
        assert section.digest in drawn, f"{name} is of another file: {results_page.COMMAND}"


def test_every_measurement_is_on_the_results_page(results_page):
    written = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs" / "results").glob("*.json"):
        assert f"(results/{path.name})" in written, f"{path.name} is missing: {results_page.COMMAND}"


def test_tables_show_what_the_rows_hold(results_page):
    pivot = {"column": "batch", "value": "time/us"}
    section = results_page.Section("s", "S", columns={"scheme": "scheme"}, pivot=pivot)
    rows = [
        {"scheme": "m1v4g128", "batch": 1, "time": {"us": 5.27537}},
        {"scheme": "m1v4g128", "batch": 8, "time": {"us": 1234.5}},
        {"scheme": "m2v8g128", "batch": 8},
    ]
    lines = results_page.table(section, rows).splitlines()
    assert lines[0] == "| scheme | 1 | 8 |"
    assert lines[2:] == ["| m1v4g128 | 5.275 | 1234 |", "| m2v8g128 |  |  |"]
    assert results_page.table(results_page.Section("s", "S"), rows).startswith("| scheme | batch |")
