"""Do what the documentation says: every fenced block of commands or Python of its pages, in one folder.

What a reader types in the root of a checkout runs here in a folder with the same `models` and `tools`. Blocks of a page
run in order. A page that goes on with what another has made says `<!-- continues PAGE -->` and is read after it. Two
pages are read at a time. The comment `<!-- not run: REASON -->` before a block is the only way to leave it out.
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
EXECUTED = ("bash", "python", "pycon")
SHOWN = ("json", "text", "cpp", "toml")
"""Languages of blocks that hold no command."""
FENCE = re.compile(r" *```(\w*)\s*")
LEFT_OUT = re.compile(r" *<!-- not run: (\S.*\S) -->")
CONTINUES = re.compile(r"<!-- continues (\S+\.md) -->")
READ = "read to the end:"


@dataclass(frozen=True)
class Read:
    """What to read, and where."""

    pages: tuple[str, ...] = ()
    """Names of pages in docs, such as index.md; all of them if not given. Those that they continue are read too."""
    jobs: int = 2
    """Pages read at the same time."""
    here: Path | None = None
    """Read the pages in this folder, in this process, and nothing before them."""
    debug: bool = False
    """Show the traceback of a failure."""


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
        """What is in it."""
        return "".join(f"{line}\n" for line in self.lines)

    @property
    def executed(self) -> bool:
        """Whether it is run."""
        return self.language in EXECUTED and self.left_out is None


def main() -> None:
    """Entry point."""
    import tyro

    config = tyro.cli(Read, description=__doc__)
    if config.here is not None:
        for page in config.pages:
            read_page(page, config.here)
            print(READ, page, flush=True)
        return
    from codegemm_kernels.errors import run_command  # imports torch, which a page of commands has no use for

    sys.exit(run_command(lambda: report(config), debug=config.debug))


def report(config: Read) -> dict[str, Any]:
    """Read pages in a temporary folder; returns the JSON object. Raises RuntimeError for a block that failed."""
    pages = config.pages or tuple(page.name for page in executed_pages())
    with tempfile.TemporaryDirectory() as folder:
        outcome = read_pages(pages, Path(folder), config.jobs)
    for page, error in outcome.items():
        if error:
            print(error, file=sys.stderr)
            raise RuntimeError(f"docs/{page} does not do what it says")
    return {"pages": list(outcome)}


def executed_pages() -> list[Path]:
    """Pages with something to run."""
    return [page for page in sorted(DOCS.glob("*.md")) if any(block.executed for block in blocks(page))]


def blocks(page: Path) -> Iterator[Block]:
    """Fenced blocks of a page, in order. A fence inside a list keeps its indentation out of the block."""
    inside: Block | None = None
    before, indent = "", 0
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


def read_pages(pages: tuple[str, ...], folder: Path, jobs: int) -> dict[str, str]:
    """Read the pages, and those that they continue before them; for each what went wrong, if anything.

    The pages that continue others are shared by `jobs` processes, since every process takes seconds to import torch.
    One thread a process: on a busy machine the threads of such small products wait for each other, and a command of 33
    seconds takes 220.
    """
    for name in ("models", "tools"):
        (folder / name).symlink_to(ROOT / name)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def read(group: list[str]) -> dict[str, str]:
        command = [sys.executable, Path(__file__), "--here", folder, "--pages", *group]
        done = subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        return {page: "" if f"{READ} {page}\n" in done.stdout else done.stderr for page in group}

    earlier = {page: CONTINUES.search((DOCS / page).read_text(encoding="utf-8")) for page in pages}
    first = {match[1] if match else page for page, match in earlier.items()}
    rest = sorted(set(pages) - first, key=lambda page: len(list(blocks(DOCS / page))))
    outcome: dict[str, str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for stage in ([[page] for page in sorted(first)], [rest[start::jobs] for start in range(jobs)]):
            for found in pool.map(read, filter(None, stage)):
                outcome |= found
    return outcome


def read_page(page: str, folder: Path) -> None:
    """Run the blocks of one page in `folder`; Python blocks of a page share their names."""
    os.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(DOCS / page):
        if not block.executed:
            continue
        if block.language == "bash":
            subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], check=True)
        elif block.language == "python":
            exec(compile("\n" * block.line + block.text, f"docs/{page}", "exec"), names)
        else:
            run_session(block, names)


def run_session(block: Block, names: dict[str, Any]) -> None:
    """Run a block of >>> lines and compare what they show. Raises AssertionError where they differ."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    place = f"docs/{block.page}"
    session = doctest.DocTestParser().get_doctest(block.text, names, place, place, block.line)
    assert session.examples, f"{place}:{block.line} has no >>> line"
    told: list[str] = []
    failed = doctest.DocTestRunner(optionflags=flags).run(session, out=told.append, clear_globs=False).failed
    assert not failed, "".join(told)
    names.update(session.globs)


if __name__ == "__main__":
    main()
