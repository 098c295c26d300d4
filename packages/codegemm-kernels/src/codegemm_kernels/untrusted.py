"""Reading what somebody else wrote: text, bounded JSON, tensors that lie where they say, files that stay inside.

Nothing here allocates by a number from a file: a header that declares petabytes is held against the size of its file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from codegemm_kernels.errors import BadInput, CheckpointError

MAX_JSON_BYTES = 100_000_000
"""The largest header that the safetensors library reads, and far more than any config or index."""
MAX_COUNT = 1024
"""The largest number of layers, experts or labels: transformers makes objects by them before it looks at a tensor."""
MAX_DEPTH = 64
"""How deeply a config may be nested."""
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits of an element by the safetensors name of its dtype."""
_COUNTS = re.compile(r"(layers?|experts|num_labels|depth)$")
# Names are printed, sorted by their numbers and looked up in a module tree.
_TENSOR_NAME = re.compile(r"(?!.*\d{10})[ -~]+")


def read_utf8(path: Path) -> str:
    """The text in a file. Raises BadInput naming the first byte that is not UTF-8; OSError."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first") from error


def read_json(path: Path) -> Any:
    """The JSON value in a file. Raises CheckpointError naming a file that is too large or no JSON; OSError."""
    if not path.is_file() and path.exists():  # a pipe would never end
        raise CheckpointError(f"{path} is no regular file: get the checkpoint again")
    with path.open("rb") as stream:
        text = stream.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has more than {MAX_JSON_BYTES} bytes: get the checkpoint again")
    try:
        return parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error})") from error


def parse_json(text: bytes | str) -> Any:
    """A JSON value. Raises ValueError for what is none, nested too deeply or has numbers of thousands of digits."""
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_entries(text: bytes) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Dtype, shape and bytes of every tensor in a safetensors header.

    Raises ValueError naming the tensor unless they lie one after another without gaps or overlaps, as the safetensors
    library itself demands, and are of the sizes that dtype and shape make.
    """
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise ValueError("its __metadata__ are no strings")
    entries, ranges = {}, []
    for name, entry in header.items():
        if not _TENSOR_NAME.fullmatch(name):
            raise ValueError(f"the name {name[:80]!r} is none that a model has")
        dtype, shape, (start, end) = _fields(name, entry)
        bits = DTYPE_BITS[dtype] * math.prod(shape)
        if not 0 <= start <= end or bits != 8 * (end - start):
            raise ValueError(f"{name}: {dtype} of shape {list(shape)} does not fill bytes {start} to {end}")
        entries[name] = (dtype, shape, end - start)
        ranges.append((start, end, name))
    place = 0
    for start, end, name in sorted(ranges):
        if start != place:
            raise ValueError(f"{name} begins at byte {start} and not at {place}, where the tensor before it ends")
        place = end
    return entries


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _fields(name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, Mapping) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"{name} has the unknown dtype {str(dtype)[:80]!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has a shape or offsets that are no lists of sizes")
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _are_sizes(values: Any) -> bool:
    """Whether this is a short list of integers that fit 63 bits."""
    short = isinstance(values, list) and len(values) <= 64
    return short and all(type(each) is int and 0 <= each < 2**63 for each in values)


def check_config(config: Any, path: Path) -> None:
    """Raise CheckpointError for a config.json by which transformers would make millions of objects, or recurse."""
    waiting: list[tuple[str, Any, int]] = [("", config, 0)]
    while waiting:
        key, value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise CheckpointError(f"{path} is nested too deeply: get the checkpoint again")
        if isinstance(value, int | float) and value > MAX_COUNT and _COUNTS.search(key):
            raise CheckpointError(f"{path} has more than {MAX_COUNT} as {key}: get the checkpoint again")
        if isinstance(value, dict):
            waiting.extend((name, each, depth + 1) for name, each in value.items())
        elif isinstance(value, list):
            waiting.extend(("", each, depth + 1) for each in value)


def check_links(folder: Path) -> None:
    """Raise CheckpointError for a file that is a link to somewhere else, which a copy of the folder would give away.

    The hub's cache is made of links from `snapshots/<revision>` to `blobs`, which belong to it.
    """
    root = folder.resolve()
    inside = [root]
    if root.parent.name == "snapshots":
        inside.append(root.parent.parent / "blobs")
    files: Iterable[Path] = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    for file in files:
        if file.is_file() and not any(file.resolve().is_relative_to(each) for each in inside):
            raise CheckpointError(f"{file} is a link out of its folder: put the file itself there")
