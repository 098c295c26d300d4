from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from codegemm_runtime import inspect_folder


def test_numbers_add_up(make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint(
        "qwen2", dtype=torch.float16, shards=2, layers={"model.layers.1.mlp.up_proj": "m1v4g-1"}
    )
    found = inspect_folder(checkpoint.folder)
    assert found.problems == []
    assert [(row.name, row.scheme) for row in sorted(found.layers, key=lambda row: row.name)] == sorted(
        (name, scheme) for name, scheme in checkpoint.layers.items()
    )
    assert found.total_bytes == sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    row = next(row for row in found.layers if row.name.endswith("0.self_attn.k_proj"))
    assert (row.out_features, row.in_features) == (32, 64)
    parts = ("codes", "codebooks", "scales", "bias")
    assert row.nbytes == sum(checkpoint.tensors[f"{row.name}.{part}"].nbytes for part in parts)
    # 16/32 for scales, 2 for codes, and two books of 256 x 8 halves over 32 x 64 weights
    assert row.bits == pytest.approx(2 + 0.5 + 16 * 2 * 256 * 8 / (32 * 64))
    dense = sum(p.numel() for p in checkpoint.dense.parameters()) * 2
    biases = sum(t.nbytes for name, t in checkpoint.tensors.items() if name.endswith("bias"))
    assert found.dense_bytes == dense - biases
    table = found.table()
    assert all(row.name in table for row in found.layers)
    assert "m2v8g32" in table


def test_dense_folder(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    make_checkpoint().dense.save_pretrained(tmp_path / "dense")
    found = inspect_folder(tmp_path / "dense")
    assert (found.problems, found.layers, found.scheme, found.bits_per_weight) == ([], [], None, None)
    assert found.total_bytes == found.dense_bytes
    assert "dense model" in found.table()


def test_published_folder(make_checkpoint: Callable[..., Any]) -> None:
    found = inspect_folder(make_checkpoint(published=True).folder)
    assert (found.problems, found.scheme, found.published) == ([], "m2v8g32", True)


def test_every_fault_is_listed_once(make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint("qwen2")
    q = "model.layers.1.self_attn.q_proj"
    checkpoint.tensors[f"{q}.codes"] = checkpoint.tensors[f"{q}.codes"][:1].contiguous()
    del checkpoint.tensors["model.norm.weight"], checkpoint.tensors["model.layers.0.mlp.up_proj.scales"]
    checkpoint.write()
    problems = inspect_folder(checkpoint.folder).problems
    assert len(problems) == 3
    assert [sum(name in problem for problem in problems) for name in (q, "model.norm", "up_proj.scales")] == [1, 1, 1]


def test_nothing_and_nonsense_give_problems_not_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide", "architectures": 3}')
    for folder in ("empty", "list", "odd", "missing/a/b"):
        found = inspect_folder(tmp_path / folder)
        assert found.problems, folder
        assert found.problems[0] in found.table()


def test_random_damage_never_crashes(make_checkpoint: Callable[..., Any]) -> None:
    """Bytes of the header overwritten at random: a sentence or, where the damage hits a weight, nothing."""
    checkpoint = make_checkpoint()
    path = checkpoint.folder / "model.safetensors"
    sound = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        damaged = bytearray(sound)
        for position in torch.randint(0, 3000, (4,), generator=generator).tolist():
            damaged[position] = int(torch.randint(0, 256, (1,), generator=generator))
        path.write_bytes(damaged)
        assert isinstance(inspect_folder(checkpoint.folder).table(), str)
    os.truncate(path, 3)
    assert inspect_folder(checkpoint.folder).problems


def test_nan_and_inf_are_found_by_reading(make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint("qwen2", shards=2)
    sound = inspect_folder(checkpoint.folder, verify=True)
    assert (sound.problems, sound.verified) == ([], True)
    assert "every number in it is finite" in sound.table()
    name = "model.layers.1.mlp.up_proj"
    checkpoint.tensors[f"{name}.scales"][0, 5] = float("inf")
    checkpoint.tensors[f"{name}.codebooks"][0, :2, 3] = float("nan")
    checkpoint.write()
    assert inspect_folder(checkpoint.folder).problems == []
    damaged = inspect_folder(checkpoint.folder, verify=True)
    assert not damaged.verified
    assert sorted(problem.partition(" in ")[0] for problem in damaged.problems) == [
        f"{name}.codebooks",
        f"{name}.scales",
    ]
    assert any("holds 2 NaN or inf of 4096 numbers" in problem for problem in damaged.problems)


@pytest.mark.parametrize(
    ("scheme", "dtype", "gpu", "reason"),
    [
        ("m2v8g32", torch.float32, False, None),
        ("m2v8g32", torch.bfloat16, True, None),
        ("m2v8g32", torch.float32, True, "float32"),
        ("m1v4g8", torch.float16, False, None),
        ("m1v4g8", torch.float16, True, "a scale group is no whole number of code words"),
    ],
)
def test_layers_of_the_general_kernels_are_named(
    make_checkpoint: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
    dtype: torch.dtype,
    gpu: bool,
    reason: str | None,
) -> None:
    checkpoint = make_checkpoint("llama", scheme, dtype)
    monkeypatch.setattr("codegemm_runtime.inspection.kernel_path", lambda: "any")
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    found = inspect_folder(checkpoint.folder)
    assert found.problems == []
    assert {row.slow for row in found.layers} == {reason}
    assert found.table().count("general: ") == (14 if reason else 0)
    assert found.summary()["general_kernels"] == (dict.fromkeys(checkpoint.layers, reason) if reason else {})


def test_checksums_are_compared(make_checkpoint: Callable[..., Any]) -> None:
    """Kept ones, and only by --verify: a flipped bit of a code changes no shape and makes no NaN."""
    from codegemm_kernels.checksums import write_checksums

    checkpoint = make_checkpoint("qwen2", shards=2)
    write_checksums(checkpoint.folder)
    sound = inspect_folder(checkpoint.folder, verify=True)
    assert (sound.problems, sound.verified, sound.summary()["checksums"]) == ([], True, True)
    assert "its files are those of its checksums" in sound.table()
    checkpoint.tensors["model.layers.1.mlp.up_proj.codes"][0, 0, 0] ^= 1
    checkpoint.write(shards=2)
    assert inspect_folder(checkpoint.folder).problems == []
    damaged = inspect_folder(checkpoint.folder, verify=True)
    assert not damaged.verified
    assert ["is not the file whose checksum is in SHA256SUMS" in problem for problem in damaged.problems] == [True]
