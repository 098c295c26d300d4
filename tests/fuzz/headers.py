"""Coverage-guided fuzzing of safetensors files, configs and indexes with atheris, which `make fuzz` brings.

The first byte of an input says what the rest is. It starts from sound files of every kind, made here, and changes
values and names in their JSON as often as bytes. A crash, a hang or any exception but ours for a bad file ends it with
the input that did it. Give libFuzzer's options on the command line, such as -max_total_time=60.
"""

import gc
import json
import math
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import atheris
from safetensors import safe_open

from codegemm_kernels.checkpoint import (
    CheckpointMetadata,
    check_layer,
    checkpoint_files,
    quantized_names,
    read_config,
    read_headers,
)
from codegemm_kernels.errors import BadInput
from codegemm_kernels.scheme import CodebookScheme
from codegemm_kernels.untrusted import DTYPE_BITS

READERS = ("codegemm_kernels.checkpoint", "codegemm_kernels.scheme", "codegemm_kernels.untrusted")
"""What is fuzzed. Not by atheris.instrument_imports, which sees nothing of a package that was installed as editable."""
KINDS = ("config.json", "model.safetensors.index.json", "header", "model.safetensors")
"""What an input may be: a file, or the header of one, behind two bytes that say how many bytes of data follow it."""
HEADER = bytes([KINDS.index("header")])
SCHEMES = ("m1v4g128", "m2v8g32", "m4v16g-1")
ODD = (None, True, -1, 0, 1.5, 8, 2**31, 2**63, 10**30, "", "F32", "m2v8g128", "../x", "é", [], [[]], {}, [0, 8])
"""What stands in the place of something else."""


def one_input(data: bytes) -> None:
    """One file in a folder of its own, read as a checkpoint is."""
    kind, rest = KINDS[data[0] % len(KINDS)] if data else KINDS[0], data[1:]
    try:
        if kind == "config.json":
            read_metadata(rest)
        elif kind == "model.safetensors.index.json":
            (folder(kind) / kind).write_bytes(rest)
            checkpoint_files(folder(kind))
        elif kind == "header":
            size, header = int.from_bytes(rest[:2], "little"), rest[2:]
            read_tensors(len(header).to_bytes(8, "little") + header + bytes(size))
        else:
            read_tensors(rest)
    except BadInput as error:
        assert str(error).isprintable(), str(error)


def read_metadata(text: bytes) -> None:
    """A config; what is understood of it says the same when it has been written and is read again."""
    (folder("config.json") / "config.json").write_bytes(text)
    metadata = CheckpointMetadata.from_config(read_config(folder("config.json")))
    if metadata is not None:
        again = CheckpointMetadata.from_config({"quantization_config": metadata.to_quantization_config()})
        assert again == metadata


def read_tensors(text: bytes) -> None:
    """A file of tensors; what we accept, the safetensors library accepts and sees the same in it."""
    file = folder("model.safetensors") / "model.safetensors"
    file.write_bytes(text)
    headers = read_headers([file])
    with safe_open(file, framework="np") as opened:
        assert set(opened.keys()) == headers.keys()
        assert all(tuple(opened.get_slice(name).get_shape()) == headers[name].shape for name in headers)
    for name in quantized_names(headers):
        for scheme in SCHEMES:
            check_layer(name, CodebookScheme.parse(scheme), 8, 128, headers)


def mutate(data: bytes, most: int, number: int) -> bytes:
    """The `number`-th change of an input, to at most `most` bytes; every other one is of its JSON."""
    chooser, start = random.Random(number), 3 if data[:1] == HEADER else 1
    try:
        value = json.loads(data[start:]) if chooser.random() < 0.5 else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not value:
        changed: bytes = atheris.Mutate(data, most)
        return changed
    place, key = value, chooser.choice(list(value))
    while isinstance(place[key], dict | list) and place[key] and chooser.random() < 0.8:
        place = place[key]
        key = chooser.choice(list(place) if isinstance(place, dict) else range(len(place)))
    old = place.pop(key)
    if isinstance(place, list):
        place[key:key] = chooser.choice([[], [old, old], [chooser.choice(ODD)], [old + 1 if type(old) is int else old]])
    else:
        names = [key, f"{key}s", chooser.choice(WORDS)]
        place |= chooser.choice([{}, {chooser.choice(names): old}, {key: chooser.choice(ODD)}])
    return data[:start] + json.dumps(value).encode()[: most - start]


def folder(kind: str) -> Path:
    """Where files of a kind are read."""
    found = FOLDER / kind.partition(".")[0]
    found.mkdir(exist_ok=True)
    return found


def seeds() -> Iterator[bytes]:
    """Sound inputs of every kind: each dtype and scheme, files without tensors, sharded ones, both forms of config."""
    for dtype in DTYPE_BITS:
        yield tensors({"a": (dtype, (4, 8)), "empty": (dtype, (0, 3))})
    for scheme in SCHEMES:
        shapes = CodebookScheme.parse(scheme).shapes(8, 128)
        yield tensors({f"layers.0.q.{part}": ("I32" if part == "codes" else "F16", shapes[part]) for part in shapes})
        ours = CheckpointMetadata(CodebookScheme.parse(scheme), {"layers.0.q": CodebookScheme(1, 4)}, ("lm_head",))
        yield seed("config.json", {"num_hidden_layers": 2, "quantization_config": ours.to_quantization_config()})
    published = CheckpointMetadata(CodebookScheme(2, 8, 128)).to_published_block(["model.layers.0.mlp.up_proj"])
    yield seed("config.json", {"model_type": "llama", "codegemm": published})
    yield seed("config.json", {"quantization_config": {"quant_method": "other"}, "id2label": {"0": "a"}})
    yield tensors({})
    shards = {"weight_map": {"a.weight": "model-00001-of-00002.safetensors", "b.codes": "model.safetensors"}}
    yield seed("model.safetensors.index.json", {"metadata": {"total_size": 64}} | shards)


def seed(kind: str, value: Any) -> bytes:
    """A JSON value as an input."""
    return bytes([KINDS.index(kind)]) + json.dumps(value).encode()


def tensors(shapes: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The header of a file of zeros as an input."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, (dtype, shape) in shapes.items():
        end = place + math.prod(shape) * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, end]}
        place = end
    return HEADER + place.to_bytes(2, "little") + json.dumps(entries).encode()


for function in gc.get_objects():
    if isinstance(function, FunctionType) and function.__module__ in READERS:
        atheris.instrument_func(function)
WORDS = sorted({word for text in seeds() for word in text[3:].decode().split('"')[1::2]})
with tempfile.TemporaryDirectory() as scratch:
    FOLDER = Path(scratch)
    corpus = folder("corpus")
    for number, text in enumerate(seeds()):
        (corpus / f"seed-{number}").write_bytes(text)
    atheris.Setup([*sys.argv, str(corpus)], one_input, custom_mutator=mutate)
    atheris.Fuzz()
