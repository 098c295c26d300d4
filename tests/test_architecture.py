"""The house rules that a machine can check, read from the sources alone: nothing of the project is imported here."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ROOT / "packages"

ARROWS = {
    "codegemm_kernels": set(),
    "codegemm_runtime": {"codegemm_kernels"},
    "codegemm_eval": {"codegemm_kernels", "codegemm_runtime"},
    "codegemm_quant": {"codegemm_kernels"},
}
"""Who may import whom."""

FOREIGN_NAMES = re.compile(
    r"\b(n_codebooks|in_group_size|vec_len|nbits_per_codebook|scale_group_size|q_weight|lut|LUT)\b"
)
"""Names that other systems give to our ideas (CONTRIBUTING.md has ours)."""
MAY_NAME_FOREIGN = {
    "packages/codegemm-kernels/src/codegemm_kernels/checkpoint.py": "reads and writes the published block",
    "packages/codegemm-runtime/src/codegemm_runtime/convert/aqlm.py": "reads and writes the config of AQLM",
    "CONTRIBUTING.md": "the vocabulary lists what not to say",
}

VAGUE_FILES = re.compile(r"(utils?|helpers?|common|misc|base)|.*_(utils?|helpers?|v2)")

MAX_LINES, MAX_FUNCTION, MAX_PARAMETERS = 350, 60, 8
"""House rule: about 300, 50 and 7."""
ENGINE = "packages/codegemm-runtime/src/codegemm_runtime/engine"
TOO_LARGE: dict[str, str] = {
    "packages/codegemm-quant/src/codegemm_quant/search_triton.py:_sweep_kernel": "launch arguments, one flat list",
    "packages/codegemm-quant/src/codegemm_quant/search_triton.py:_feedback_kernel": "launch arguments, one flat list",
    f"{ENGINE}/attention_triton.py:_decode_attention": "launch arguments, one flat list",
    f"{ENGINE}/attention_triton.py:turned": "part of a kernel",
    f"{ENGINE}/attention_triton.py:_place_prompt": "launch arguments, one flat list",
    f"{ENGINE}/attention_triton.py:_tile": "part of a kernel",
    f"{ENGINE}/attention_triton.py:_absorb": "part of a kernel",
    f"{ENGINE}/fused_triton.py:_add_norm": "launch arguments, one flat list",
    f"{ENGINE}/fused_triton.py:_gated": "launch arguments, one flat list",
}
"""`file` or `file:function`, and why. The list only shrinks."""


def tracked(*patterns: str) -> list[Path]:
    """Files of the project that match; without git (a source archive), what lies in the tree."""
    found = [path for pattern in patterns for path in ROOT.glob(pattern)]
    return sorted(path for path in found if not {"build", ".venv"} & set(path.relative_to(ROOT).parts))


SOURCES = tracked("packages/*/src/**/*.py", "tools/**/*.py")
PYTHON = [*SOURCES, *tracked("packages/*/tests/**/*.py", "packages/*/benchmarks/**/*.py", "tests/**/*.py")]
COMPILED = [
    path for suffix in ("h", "cpp", "cu", "cuh") for path in tracked(f"packages/codegemm-kernels/**/*.{suffix}")
]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of everything imported, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_tree_is_found():
    assert len(SOURCES) > 25
    assert len(COMPILED) > 8
    assert {path.name for path in PACKAGES.iterdir()} == {package.replace("_", "-") for package in ARROWS}


@pytest.mark.parametrize("package", ARROWS)
def test_arrows(package):
    allowed = ARROWS[package] | {package}
    for path in tracked(f"packages/{package.replace('_', '-')}/src/**/*.py"):
        roots = {full.split(".")[0] for full in imported(ast.parse(path.read_text()))}
        wrong = {root for root in roots if root.startswith("codegemm_")} - allowed
        assert not wrong, f"{name(path)} imports {wrong}: arrows point down"


@pytest.mark.parametrize("package", ARROWS)
def test_declared_dependencies_are_the_arrows(package):
    project = tomllib.loads((PACKAGES / package.replace("_", "-") / "pyproject.toml").read_text())["project"]
    ours = {d.split("==")[0].replace("-", "_") for d in project["dependencies"] if d.startswith("codegemm")}
    assert ours <= ARROWS[package]
    if package == "codegemm_runtime":
        heavy = {"datasets", "lm-eval", "matplotlib"}
        assert not heavy & {re.split(r"[<>=\[ ]", dependency)[0] for dependency in project["dependencies"]}


def test_relative_imports_are_not_used():
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{name(path)} line {node.lineno}"


def test_two_files_import_the_compiled_module():
    importers = [name(path) for path in SOURCES if "codegemm_kernels._C" in set(imported(ast.parse(path.read_text())))]
    assert importers == [f"packages/codegemm-kernels/src/codegemm_kernels/{face}.py" for face in ("ops", "step")]


def test_torch_stops_at_the_python_files():
    for path in COMPILED:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), name(path)
    for path in tracked("packages/codegemm-kernels/csrc/**/*"):
        if path.is_file() and path.name != "bindings.cpp":
            assert "pybind11" not in path.read_text(), name(path)


def test_one_idea_has_one_name():
    files = [*SOURCES, *COMPILED, *tracked("docs/**/*.md", "docs/**/*.json", "*.md", "packages/*/README.md")]
    found = {name(path) for path in files if FOREIGN_NAMES.search(path.read_text())}
    assert found <= set(MAY_NAME_FOREIGN), f"foreign names in {sorted(found - set(MAY_NAME_FOREIGN))}"
    assert found == set(MAY_NAME_FOREIGN), f"no longer exceptions: {sorted(set(MAY_NAME_FOREIGN) - found)}"


def test_no_file_has_a_vague_name():
    vague = [name(path) for path in [*PYTHON, *COMPILED] if VAGUE_FILES.fullmatch(path.stem)]
    assert not vague


def too_large(path: Path) -> Iterator[str]:
    """What breaks the size rule in a file: `file`, `file:function`."""
    text = path.read_text()
    if text.count("\n") > MAX_LINES:
        yield name(path)
    if path.suffix != ".py":
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            parameters = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION or parameters > MAX_PARAMETERS:
                yield f"{name(path)}:{node.name}"


def test_everything_fits_in_a_head():
    large = {item for path in [*PYTHON, *COMPILED] for item in too_large(path)}
    assert large <= set(TOO_LARGE), f"too large: {sorted(large - set(TOO_LARGE))}"
    assert large == set(TOO_LARGE), f"no longer exceptions: {sorted(set(TOO_LARGE) - large)}"


def test_importing_is_silent():
    for path in tracked("packages/*/src/**/*.py"):
        for node in ast.parse(path.read_text()).body:
            call = node.value if isinstance(node, ast.Expr) else None
            prints = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print"
            assert not prints, f"{name(path)} line {node.lineno} prints when it is imported"


def test_versions_are_in_lockstep():
    versions, pins = set(), set()
    for path in [ROOT / "pyproject.toml", *tracked("packages/*/pyproject.toml")]:
        project = tomllib.loads(path.read_text())["project"]
        versions.add(project["version"])
        pins |= {d.split("==")[1] for d in project["dependencies"] if d.startswith("codegemm-") and "==" in d}
    assert len(versions) == 1
    assert pins == versions


def test_every_package_carries_the_licence():
    """As a copy: a build sees only the package's folder, and archives drop links."""
    for path in tracked("packages/*/pyproject.toml"):
        project = tomllib.loads(path.read_text())["project"]
        assert project["license-files"] == ["LICENSE", "NOTICE"]
        for file in project["license-files"]:
            assert (path.parent / file).read_bytes() == (ROOT / file).read_bytes(), f"{name(path)}: {file}"


def console_scripts() -> list[str]:
    projects = [tomllib.loads(path.read_text())["project"] for path in tracked("packages/*/pyproject.toml")]
    return sorted(script for project in projects for script in project.get("scripts", {}))


def test_every_package_with_commands_is_listed():
    assert console_scripts() == ["codegemm-eval", "codegemm-quant", "codegemm-runtime"]


@pytest.mark.parametrize("script", console_scripts())
def test_help_of_console_scripts(script):
    executable = Path(sys.executable).parent / script
    done = subprocess.run([executable, "--help"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert script in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("tool", tracked("tools/*.py"), ids=lambda path: path.stem)
def test_help_of_tools(tool):
    done = subprocess.run([sys.executable, tool, "--help"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
