"""Killed at any moment, or on a full disk: what was there stays, no half folder has a name, and --resume ends the same.

(Quantising under kill -9 is in packages/codegemm-quant/tests/test_resume.py.) The full disk is a small tmpfs in a mount
namespace of the test's own; where that is not allowed, a limit on the size of files.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from codegemm_quant import QuantizeConfig, quantize
from codegemm_quant.pv.config import TuneConfig
from codegemm_quant.pv.tune import tune
from codegemm_runtime import inspect_folder
from codegemm_runtime.convert.conversion import convert_folder

TEXT = "\n".join(f"def function_{i}(x, y={i}): return x * {i % 7} + y  # line {i}" for i in range(300))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `dense`, `quantised` and text.txt."""
    folder = tmp_path_factory.mktemp("kill")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"</s>": 0, **{a: i + 1 for i, a in enumerate(alphabet)}}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=257, max_position_embeddings=128, tie_word_embeddings=True, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "dense")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    run("quantize", folder, folder / "quantised")
    return folder


def run(what: str, source: Path, out: Path) -> Any:
    """The long work of each kind, on one thread and continuing what was begun."""
    torch.set_num_threads(1)
    text, quantised = str(source / "text.txt"), str(source / "quantised")
    if what == "quantize":
        effort = {"samples": 8, "sequence_length": 32, "rounds": 1, "tune_epochs": 1, "model_epochs": 1}
        names = {"model": str(source / "dense"), "data": text, "out": str(out), "scheme": "m2v8g32"}
        return quantize(QuantizeConfig(**names, **effort, device="cpu", resume=True))
    if what == "tune":
        effort = {"steps": 12, "batch_size": 4, "sequence_length": 32, "eval_windows": 2, "save_every": 2}
        names = {"student": quantised, "teacher": str(source / "dense"), "data": text, "out": str(out)}
        return tune(TuneConfig(**names, **effort, device="cpu", resume=True))
    return convert_folder(quantised, out, to="dense")


def digest(folder: Path) -> dict[str, str]:
    """What is in a folder; without the report, which holds times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if not path.name.startswith("quantization_") and path.name != "README.md"
    }


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., ForkServerProcess]]:
    """Begin a function in a process of its own, from a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [__name__, "transformers.models.llama.modeling_llama", "tensorboard", "matplotlib.pyplot"]
    )

    def start_process(function: Callable[..., Any], *arguments: Any) -> ForkServerProcess:
        process = context.Process(target=function, args=arguments)
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent.parent)  # where the process finds this module by its name
        yield start_process


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """What each kind of work writes when it is left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")

    @functools.cache
    def digest_of(what: str) -> dict[str, str]:
        run(what, source, folder / what)
        return digest(folder / what)

    return digest_of


@pytest.mark.parametrize("what", ["tune", "convert"])
def test_killed_while_it_writes(
    what: str,
    source: Path,
    tmp_path: Path,
    start: Callable[..., ForkServerProcess],
    undisturbed: Callable[[str], dict[str, str]],
) -> None:
    """kill -9 right after the first change on disk, then after the second of the next try, and so on."""
    wanted, before, out = undisturbed(what), digest(source), tmp_path / "out"
    exits = []
    for changes in (1, 3, 7):
        if out.exists():
            break
        seen, process = state_of(tmp_path), start(run, what, source, out)
        while changes and process.is_alive():
            now = state_of(tmp_path)
            changes, seen = changes - (now != seen), now
            time.sleep(0.001)
        process.kill()  # SIGKILL
        process.join()
        exits.append(process.exitcode)
        assert not out.exists() or digest(out) == wanted
    assert exits[0] == -9
    if not out.exists():
        run(what, source, out)
    assert digest(out) == wanted
    assert inspect_folder(out).problems == []
    assert digest(source) == before


def state_of(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of all files below a folder that others are writing to."""
    found = []
    for where, _, names in os.walk(folder):  # rglob raises when a folder vanishes meanwhile
        for path in (Path(where, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                found.append((str(path), path.stat().st_size, path.stat().st_mtime_ns))
    return found


def small_disk(folder: Path) -> Callable[[int, int], None]:
    """A function that sets how many KiB fit on a tmpfs in `folder`, or, where none can be mounted, into one file.

    The tmpfs is in a mount namespace of this process, which must have one thread.
    """
    maps = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
    isolated = ctypes.CDLL(None).unshare(0x10000000 | 0x00020000) == 0  # CLONE_NEWUSER, CLONE_NEWNS
    for name, text in maps.items() if isolated else ():
        Path(f"/proc/self/{name}").write_text(text)

    def mount(size: int, options: str = "") -> bool:
        command = ["mount", "-t", "tmpfs", "-o", f"{options}size={size}k", "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if isolated and mount(4):
        return lambda disk, file: None if mount(disk, "remount,") else sys.exit("cannot change the size of the tmpfs")
    return lambda disk, file: resource.setrlimit(resource.RLIMIT_FSIZE, (file << 10, resource.RLIM_INFINITY))


def fill_up(what: str, source: Path, folder: Path, sizes: tuple[int, int]) -> None:
    """Work on a disk that is too small, then on a larger one; what was seen goes to `folder`/seen.json."""
    disk = folder / "disk"
    disk.mkdir()
    room = small_disk(disk)
    room(*sizes)
    (disk / "older").write_text("mine")
    seen: dict[str, Any] = {"told": None}
    try:
        run(what, source, disk / "out")
    except OSError as error:
        seen["told"] = str(error)
    seen["half"] = (disk / "out").exists()
    seen["partial"] = [path.name for path in disk.rglob(".*.partial")]
    room(1 << 20, 1 << 20)
    run(what, source, disk / "out")
    seen |= {"older": (disk / "older").read_text(), "out": digest(disk / "out")}
    (folder / "seen.json").write_text(json.dumps(seen))


@pytest.mark.parametrize(
    ("what", "sizes"),
    [("quantize", (32, 10)), ("quantize", (130, 60)), ("tune", (200, 90)), ("convert", (100, 100))],
    ids=["block", "export", "state", "shard"],
)
def test_a_full_disk(
    what: str,
    sizes: tuple[int, int],
    source: Path,
    tmp_path: Path,
    start: Callable[..., ForkServerProcess],
    undisturbed: Callable[[str], dict[str, str]],
) -> None:
    """In the middle of a block, of the export, of a state and of a shard; then with room, from where it was."""
    wanted = undisturbed(what)
    process = start(fill_up, what, source, tmp_path, sizes)
    process.join(300)
    assert process.exitcode == 0
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["told"] is not None, "the disk was not full"
    assert seen["told"].startswith("cannot write")
    assert "make room" in seen["told"]
    assert "\n" not in seen["told"]
    assert not seen["half"], "a folder has a name and is not whole"
    assert seen["partial"] == [], "what is of no use takes the room"
    assert seen["older"] == "mine"
    assert seen["out"] == wanted
