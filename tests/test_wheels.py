"""What a release publishes: looked at file by file, and installed into empty environments as its users do.

By themselves these tests build source archives, pure wheels and the CPU wheel for this Python, and install them for
inference. With CODEGEMM_DIST, the folder that `make wheels` has filled, they take that instead and play every user
(`make wheels-check`). Installed are the versions of uv.lock, so that nothing is downloaded twice.
"""

from __future__ import annotations

import contextlib
import email
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
PACKAGES = ("codegemm-kernels", "codegemm-runtime", "codegemm-quant", "codegemm-eval")
RELEASE = Path(os.environ["CODEGEMM_DIST"]).resolve() if "CODEGEMM_DIST" in os.environ else None
THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
PYTHONS = ("3.11", "3.12", "3.13") if RELEASE else (THIS_PYTHON,)
VARIANTS = ("cuda", "cpu") if RELEASE else ("cpu",)
BUNDLED = ROOT / "models" / "pylm-4m"

MAX_BYTES = 64 << 20
SYSTEM_LIBRARIES = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"}
SYSTEM_LIBRARIES |= {"libc.so.6", "ld-linux-x86-64.so.2"}
"""All that manylinux allows a wheel to find on the machine, as far as C++ needs it. No libcuda, no libcudart."""
ARCHITECTURES = {"cpu": [], "cuda": ["sm_100", "sm_120", "sm_80", "sm_86", "sm_89", "sm_90", "sm_90a"]}
PTX = {"cpu": [], "cuda": ["sm_120"]}

USERS = {  # what is installed, whose quick start is followed, what must not come along
    "inference": (
        "codegemm-runtime",
        ("codegemm-kernels", "codegemm-runtime"),
        {"codegemm-quant", "codegemm-eval", "datasets", "lm-eval", "matplotlib", "pandas", "pyarrow", "tensorboard"},
    ),
    "compression": ("codegemm-quant", ("codegemm-quant",), {"codegemm-runtime", "codegemm-eval", "lm-eval"}),
    "evaluation": ("codegemm-eval", ("codegemm-eval",), {"codegemm-quant", "tensorboard"}),
}
INSTALLED = [("inference", python, VARIANTS[0]) for python in PYTHONS]
if RELEASE:
    INSTALLED += [("inference", "3.12", "cpu"), ("compression", "3.12", "cuda"), ("evaluation", "3.13", "cuda")]


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder of a release."""
    if RELEASE is not None:
        return RELEASE
    folder = tmp_path_factory.mktemp("dist")
    uv("run", "--script", "tools/build_wheels.py", "--out", folder, "--python", sys.executable, "--variants", "cpu")
    return folder


@pytest.fixture(params=INSTALLED, ids="-".join)
def installed(request, dist, tmp_path):
    """(user, variant, python of an environment that has what this user installs)."""
    user, version, variant = request.param
    package = USERS[user][0]
    uv("venv", "--python", sys.executable if version == THIS_PYTHON else version, tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    locked = tmp_path / "locked.txt"
    uv("export", "--frozen", "--package", package, "--no-emit-workspace", "--no-hashes", "--output-file", locked)
    places = [dist] if variant == "cuda" else [dist, dist / "cpu"]
    links = [argument for place in places for argument in ("--find-links", place)]
    uv("pip", "install", "--python", python, "--constraints", locked, *links, f"{package}=={VERSION}")
    return user, variant, python


@pytest.fixture
def reader(road, tmp_path, monkeypatch):
    """The folder of somebody who follows a quick start: the files that it names."""
    folder = tmp_path / "reader"
    folder.mkdir()
    (folder / "MODEL").symlink_to(BUNDLED)
    (folder / "calibration.txt").write_bytes((BUNDLED / "calibration.txt").read_bytes()[:300_000])
    (folder / "validation.txt").symlink_to(BUNDLED / "validation.txt")
    (folder / "my-model").symlink_to(road["checkpoint"])
    monkeypatch.chdir(folder)
    return folder


def uv(*command: str | Path) -> str:
    """What uv says on stdout. Its own environment and ours play no part."""
    program = shutil.which("uv")
    assert program is not None, "the tests are run by uv"
    environment = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    done = subprocess.run(
        [program, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"uv {' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def wheels(dist: Path) -> list[Path]:
    found = sorted(dist.rglob("*.whl"))
    assert found
    return found


def kernels(dist: Path) -> list[tuple[str, Path]]:
    """Wheels of the kernels with their variant."""
    found = [wheel for wheel in wheels(dist) if wheel.name.startswith("codegemm_kernels-")]
    assert len(found) == len(PYTHONS) * len(VARIANTS)
    return [("cpu" if wheel.parent.name == "cpu" else "cuda", wheel) for wheel in found]


def read(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (inside,) = [entry for entry in archive.namelist() if entry.endswith(f".dist-info/{name}")]
        return archive.read(inside).decode()


def metadata(wheel: Path) -> Message:
    return email.message_from_string(read(wheel, "METADATA"))


def test_a_release_is_complete(dist):
    archives = {f"{package.replace('-', '_')}-{VERSION}.tar.gz" for package in PACKAGES}
    pure = {f"{package.replace('-', '_')}-{VERSION}-py3-none-any.whl" for package in PACKAGES[1:]}
    tags = [f"cp{python.replace('.', '')}" for python in PYTHONS]
    compiled = {
        {"cuda": "", "cpu": "cpu/"}[variant] + f"codegemm_kernels-{VERSION}{label}-{tag}-{tag}-manylinux"
        for variant, label in (("cuda", ""), ("cpu", "+cpu"))
        if variant in VARIANTS
        for tag in tags
    }
    files = {path.relative_to(dist).as_posix() for path in dist.rglob("*") if path.suffix in (".whl", ".gz")}
    assert {re.sub(r"(manylinux)_2_\d+_x86_64\.whl", r"\1", name) for name in files} == archives | pure | compiled


def test_versions_are_in_lockstep(dist):
    for wheel in wheels(dist):
        told = metadata(wheel)
        assert told["Version"] == VERSION + ("+cpu" if wheel.parent.name == "cpu" else ""), wheel.name
        ours = [line for line in told.get_all("Requires-Dist") if line.startswith("codegemm")]
        assert all(line.endswith(f"=={VERSION}") for line in ours), wheel.name
        assert bool(ours) == (told["Name"] != "codegemm-kernels")


def test_what_the_index_shows(dist):
    for wheel in wheels(dist):
        told = metadata(wheel)
        assert told["License-Expression"] == "Apache-2.0"
        assert told["Requires-Python"] == ">=3.11"
        assert told["Description-Content-Type"] == "text/markdown"
        assert told.get_payload().startswith(f"# {told['Name']}\n")
        assert not re.search(r"\]\((?!https?://|#)", told.get_payload()), f"{wheel.name}: a link that no index resolves"
        assert {"Typing :: Typed", "Programming Language :: Python :: 3.13"} <= set(told.get_all("Classifier"))


def test_a_wheel_holds_its_package_and_the_licence(dist):
    for wheel in wheels(dist):
        names = [name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")]
        package = wheel.name.split("-")[0]
        tops = {name.split("/")[0] for name in names}
        assert {top.split("-")[0] for top in tops} == {package}, f"{wheel.name} holds {tops}"
        licences = {name.rpartition("/")[2] for name in names if ".dist-info/licenses/" in name}
        assert licences == {"LICENSE", "NOTICE"}, wheel.name
        assert f"{package}/py.typed" in names
        kinds = {Path(name).suffix for name in names if name.startswith(f"{package}/")}
        assert kinds <= {".py", ".pyi", ".typed", ".so"}, f"{wheel.name} holds {kinds}"
        assert wheel.stat().st_size <= MAX_BYTES


def test_archives_hold_what_their_wheels_are_built_from(dist):
    """The wheels above were built from them; here, that they brought no more than they should."""
    for package in PACKAGES:
        with tarfile.open(dist / f"{package.replace('-', '_')}-{VERSION}.tar.gz") as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        assert {"pyproject.toml", "README.md", "LICENSE", "NOTICE"} <= names
        assert not {name for name in names if name.startswith(("build/", "dist/")) or name.endswith((".so", ".pyc"))}
        assert ("csrc/codegemm.h" in names) == (package == "codegemm-kernels")


def test_compiled_modules_need_nothing_of_cuda(dist, tmp_path):
    for variant, wheel in kernels(dist):
        module = compiled_module(wheel, tmp_path)
        dynamic = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
        needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
        assert "libc.so.6" in needed
        assert needed <= SYSTEM_LIBRARIES, wheel.name
        assert "RUNPATH" not in dynamic
        sections = subprocess.run(["readelf", "-SW", module], capture_output=True, text=True, check=True).stdout
        assert (".nv_fatbin" in sections) == (variant == "cuda"), wheel.name
        if variant == "cuda":
            assert gpu_code(module, "--list-elf") == ARCHITECTURES[variant], wheel.name
            assert gpu_code(module, "--list-ptx") == PTX[variant], wheel.name


def compiled_module(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".so")]
        return Path(archive.extract(name, folder / wheel.stem))


def gpu_code(module: Path, what: str) -> list[str]:
    """Architectures of a kind of GPU code in a module."""
    dump = (
        "import subprocess, sys, nvidia.cu13 as cu; subprocess.run([cu.__path__[0] + '/bin/cuobjdump', *sys.argv[1:]])"
    )
    listed = uv("run", "--no-project", "--with", "nvidia-cuda-cuobjdump==13.4.*", "python", "-c", dump, what, module)
    return sorted(set(re.findall(r"\bsm_\d+a?", listed)))


def quick_start(python: Path, package: str) -> list[tuple[str, str]]:
    """(language, text) of the blocks in the quick start that the package has brought along."""
    site = next((python.parent.parent / "lib").glob("python3*/site-packages"))
    (info,) = site.glob(f"{package.replace('-', '_')}-*.dist-info")
    text = (info / "METADATA").read_text(encoding="utf-8")
    section = re.search(r"^## Quick start\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None, f"the README of {package} has no quick start"
    found = re.findall(r"^```(bash|python)\n(.*?)^```$", section[1], re.MULTILINE | re.DOTALL)
    assert found, f"the quick start of {package} has nothing to run"
    return found


def follow(python: Path, language: str, text: str) -> str:
    """Run a block in an environment, in the current folder; returns its stdout."""
    command = {"bash": ["bash", "-euo", "pipefail", "-c", text], "python": [python, "-I", "-c", text]}[language]
    environment = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    environment |= {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{text}\n{done.stderr[-3000:]}"
    return done.stdout


def followed_here(text: str) -> str:
    """What a Python block prints in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(text, "quick start", "exec"), {"__name__": "__main__"})
    return printed.getvalue()


def test_a_user_gets_what_was_asked_for(installed, reader):
    user, variant, python = installed
    _, guides, unwanted = USERS[user]
    uv("pip", "check", "--python", python)
    listed = json.loads(uv("pip", "list", "--python", python, "--format", "json"))
    versions = {entry["name"]: entry["version"] for entry in listed}
    assert not unwanted & set(versions)
    assert versions["codegemm-kernels"] == VERSION + ("+cpu" if variant == "cpu" else "")

    script = "import codegemm_kernels as k; print(k.__file__, k.ops.available_kernels()[1])"
    module, has_cuda = follow(python, "python", script).split()
    assert Path(module).is_relative_to(python.parent.parent)
    assert has_cuda == str(variant == "cuda")

    if user == "compression":
        (reader / "my-model").unlink()  # it is what this user makes
    for package in guides:
        for language, text in quick_start(python, package):
            said = follow(python, language, text)
            if package == "codegemm-runtime" and language == "python":
                assert said == followed_here(text)
                assert "import os" in said
    if user == "compression":
        report = json.loads((reader / "my-tuned-model" / "config.json").read_text())
        assert report["quantization_config"]["scheme"] == "m2v8g128"
    if user == "evaluation":
        assert (reader / "report.png").read_bytes().startswith(b"\x89PNG")
