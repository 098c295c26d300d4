"""The documentation does what it says: tools/read_docs.py runs its blocks, and what it quotes is still there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(page.name for page in DOCS.glob("*.md"))
COMMAND = re.compile(
    r"\s*(\$ |uv |pip |python3? |torchrun |make |curl |hf |vllm |transformers |lm_eval "
    r"|codegemm-(quant|runtime|eval) [a-z]+ [\w/-])"
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
TROUBLESHOOTING = DOCS / "troubleshooting.md"


@pytest.fixture(scope="module")
def outcome(read_docs, request, tmp_path_factory):
    """For each page that is asked for what went wrong; two pages at a time."""
    asked = [item.callspec.params["name"] for item in request.session.items if item.originalname == "test_blocks_run"]
    runnable = {page.name for page in read_docs.executed_pages()}
    pages = tuple(name for name in asked if name in runnable)
    return dict.fromkeys(asked, "") | read_docs.read_pages(pages, tmp_path_factory.mktemp("reader"), jobs=2)


@pytest.mark.timeout(1800)  # the first one waits for all pages: 90 s on two quiet cores, several minutes on busy ones
@pytest.mark.parametrize("name", PAGES)
def test_blocks_run(name, outcome):
    assert not outcome[name], outcome[name][-4000:]


def test_a_failure_is_seen(read_docs, tmp_path, monkeypatch):
    monkeypatch.setattr(read_docs, "DOCS", tmp_path)
    (tmp_path / "page.md").write_text("```python\nx = 1\n```\n\n```pycon\n>>> x\n2\n```\n")
    with pytest.raises(AssertionError, match="Expected:\n    2\nGot:\n    1"):
        read_docs.read_page("page.md", tmp_path)
    (tmp_path / "page.md").write_text("<!-- not run: it fails -->\n```bash\nfalse\n```\n\n```bash\nfalse | cat\n```\n")
    with pytest.raises(read_docs.subprocess.CalledProcessError):
        read_docs.read_page("page.md", tmp_path)
    (tmp_path / "page.md").write_text("\n\n```python\nnothing\n```\n")
    with pytest.raises(NameError) as caught:
        read_docs.read_page("page.md", tmp_path)
    assert caught.traceback[-1].lineno == 3


@pytest.mark.parametrize("name", PAGES)
def test_no_command_hides_from_execution(name, read_docs):
    """Blocks say what they are, and nothing that looks like a command stands in a block that is not executed."""
    fenced: set[int] = set()
    for block in read_docs.blocks(DOCS / name):
        place = f"{name}:{block.line}"
        assert block.language in (*read_docs.EXECUTED, *read_docs.SHOWN), f"{place}: {block.language or 'no language'}"
        fenced |= set(range(block.line, block.line + len(block.lines) + 2))
        if block.language in read_docs.SHOWN:
            assert not any(COMMAND.match(line) for line in block.lines), f"{place} shows a command"
    for number, line in enumerate((DOCS / name).read_text(encoding="utf-8").splitlines(), 1):
        if number not in fenced:
            hidden = line.startswith("    ") and COMMAND.match(line)
            assert not hidden, f"{name}:{number} has a command outside of a fenced block"
            marked = read_docs.LEFT_OUT.fullmatch(line) and number + 1 in fenced
            assert marked or "<!-- not run" not in line, f"{name}:{number}: a marker before no block"


def test_most_blocks_are_run(read_docs):
    """Those on the results page say how something was measured, on other machines."""
    pages = [DOCS / name for name in PAGES if name != "results.md"]
    every = [block for page in pages for block in read_docs.blocks(page) if block.language in read_docs.EXECUTED]
    assert sum(block.executed for block in every) > 0.6 * len(every)


def messages(tree: ast.AST) -> Iterator[str]:
    """Strings of a source, with … for what is filled in at run time."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.fixture(scope="module")
def sources():
    """Everything that our packages and their builds can say."""
    said = {m for path in ROOT.glob("packages/*/src/**/*.py") for m in messages(ast.parse(path.read_text()))}
    for path in [*ROOT.glob("packages/*/CMakeLists.txt"), *ROOT.glob("packages/*/cmake/*.cmake")]:
        said.add(re.sub(r'"\s*"', "", path.read_text()))
    return said


def test_messages_in_troubleshooting_are_still_ours(sources):
    text = TROUBLESHOOTING.read_text(encoding="utf-8").split("\n## Messages of others", maxsplit=1)
    assert len(text) == 2
    quoted = [quote for _, quote in re.findall(r"^### (`+) ?(.+?) ?\1$", text[0], re.MULTILINE)]
    assert len(quoted) == text[0].count("\n### ")
    assert len(quoted) > 20
    astray = [quote for quote in quoted if not any(quote in each for each in sources)]
    assert not astray, f"no source says {astray}"


def test_messages_in_tables_are_still_ours(sources):
    """Those that stand in the first column; … makes them recognisable."""
    quoted = [
        (name, quote)
        for name in PAGES
        for quote in re.findall(r"^\| `([^`]*…[^`]*)` \|", (DOCS / name).read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert quoted
    astray = [each for each in quoted if not any(each[1] in said for said in sources)]
    assert not astray, f"no source says {astray}"


@pytest.mark.parametrize("path", ROOT.glob("packages/*/README.md"), ids=lambda path: path.parent.name)
def test_package_readmes_stand_alone(path):
    """PyPI shows them without the repository."""
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        assert target.startswith("https://"), f"{path.parent.name}: {target}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_of_the_repository_lead_somewhere(name):
    targets = LINK.findall((ROOT / name).read_text(encoding="utf-8"))
    broken = [each for each in targets if "://" not in each and not (ROOT / each.partition("#")[0]).exists()]
    assert not broken


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


def test_the_design_page_has_every_module():
    modules = [path for path in ROOT.glob("packages/*/src/**/*.py") if path.name not in ("__init__.py", "cli.py")]
    text = (DOCS / "design.md").read_text(encoding="utf-8")
    named = {each.rpartition("/")[2] for each in re.findall(r"`([\w/]+\.py)`", text)}
    assert {path.name for path in modules} ^ (named - {"cli.py"}) == set()


def test_every_section_says_a_command_that_there_is(results_page, read_docs):
    """Its script or subcommand is there, and its options are fields of dataclasses, of which command lines are made."""
    sources = [*ROOT.glob("tools/**/*.py"), *ROOT.glob("packages/*/src/**/*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    options = set(re.findall(r"^    (\w+): ", text, flags=re.MULTILINE))
    options |= {"with", "script", "standalone", "no_python", "nproc_per_node"}  # of uv and torchrun
    blocks = list(read_docs.blocks(DOCS / "results.md"))
    assert len(blocks) == len(results_page.sections())
    for line in (line for block in blocks for line in block.lines):
        scripts, commands = re.findall(r"tools/\w+\.py", line), re.findall(r"codegemm-\w+ ([a-z]+)", line)
        assert scripts or commands or line.startswith("make "), line
        assert all((ROOT / script).is_file() for script in scripts), line
        assert all(f'"{command}"' in text for command in commands), line
        assert {each.replace("-", "_") for each in re.findall(r"--([a-z][\w-]*)", line)} <= options, line


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
