"""Calibration windows: token ids [samples, sequence_length] from a local file or a named data set."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codegemm_kernels import BadInput
from codegemm_kernels.untrusted import read_utf8

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
DATASETS = ("wikitext2", "c4", "slimpajama")
PIECE = 1 << 16
"""Characters of a text that are tokenised together; five million take a sixteenth of the time on sixteen cores."""
_C4_SHARD = "en/c4-train.00000-of-01024.json.gz"


def calibration_windows(data: str, tokenizer: Any, samples: int, sequence_length: int, seed: int) -> Tensor:
    """Random windows without padding, reproducible by seed: int64 [samples, sequence_length].

    A text that is one stream (a .txt file, wikitext2) is cut into windows that do not overlap. From a collection of
    documents (.jsonl, .parquet, c4, slimpajama) each window lies inside one document, at a random place, and only
    documents long enough are used. Raises BadInput when there is not enough text, saying how much there is.
    """
    path = Path(data)
    if data in DATASETS:
        documents, stream = _named(data, seed), data == "wikitext2"
    elif path.suffix in TEXT_SUFFIXES:
        if not path.is_file():
            raise BadInput(f"calibration text {data} does not exist")
        documents, stream = _local(path, seed), path.suffix == ".txt"
    else:
        raise BadInput(
            f"calibration text {data!r} is neither a {', '.join(TEXT_SUFFIXES)} file nor one of {', '.join(DATASETS)}"
        )
    if stream:
        return _stream_windows(data, "\n\n".join(documents), tokenizer, samples, sequence_length, seed)
    return _document_windows(data, documents, tokenizer, samples, sequence_length, seed)


def _local(path: Path, seed: int) -> Iterable[str]:
    if path.suffix == ".txt":
        return [read_utf8(path)]
    documents = list(_jsonl(path) if path.suffix == ".jsonl" else _parquet(path))
    random.Random(seed).shuffle(documents)
    return documents


def _jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(read_utf8(path).split("\n"), 1):
        if line.strip():
            try:
                yield str(json.loads(line)["text"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise BadInput(f'{path} line {number} is not a JSON object with a "text" field') from error


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        rows = load_dataset("parquet", data_files=str(path.resolve()), split="train")
    except (pyarrow.ArrowException, DatasetGenerationError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{path} is no readable parquet file ({reason}): write or download it again") from error
    if "text" not in rows.column_names:
        raise BadInput(f'{path} has no "text" column, only {", ".join(rows.column_names)}')
    return (str(row["text"]) for row in rows)


def _named(name: str, seed: int) -> Iterable[str]:
    from datasets import load_dataset

    if name == "wikitext2":
        return list(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="train")["text"])
    if name == "c4":
        rows = load_dataset("allenai/c4", data_files={"train": _C4_SHARD}, split="train")
    else:
        rows = load_dataset("DKYoon/SlimPajama-6B", split="train", streaming=True)
    rows = rows.shuffle(seed=seed)
    return (row["text"] for row in rows)


def _stream_windows(data: str, text: str, tokenizer: Any, samples: int, length: int, seed: int) -> Tensor:
    tokens = _tokens(text, tokenizer)
    available = len(tokens) // length
    if available < samples:
        raise BadInput(
            f"calibration text {data} is too short: its {len(tokens)} tokens make {available} windows of {length}, "
            f"but {samples} are needed; give more text, or lower samples or sequence_length"
        )
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:samples]
    windows: Tensor = tokens[: available * length].view(available, length)[chosen]
    return windows.contiguous()


def _tokens(text: str, tokenizer: Any) -> Tensor:
    """Token ids of a long text, cut at line ends into pieces that a fast tokenizer works on in parallel."""
    pieces, at = [], 0
    while at < len(text):
        end = text.find("\n", at + PIECE) + 1 or len(text)
        pieces.append(text[at:end])
        at = end
    first = tokenizer(pieces[:1] or [""], verbose=False).input_ids
    rest = tokenizer(pieces[1:], verbose=False, add_special_tokens=False).input_ids if pieces[1:] else []
    return torch.tensor(list(chain.from_iterable([*first, *rest])), dtype=torch.long)


def _document_windows(
    data: str, documents: Iterable[str], tokenizer: Any, samples: int, length: int, seed: int
) -> Tensor:
    chooser = random.Random(seed)
    windows: list[Tensor] = []
    seen = 0
    for text in documents:
        seen += 1
        tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        if len(tokens) >= length:
            start = chooser.randint(0, len(tokens) - length)
            windows.append(tokens[start : start + length])
        if len(windows) == samples:
            return torch.stack(windows)
    raise BadInput(
        f"calibration text {data} is too short: {len(windows)} of its {seen} documents have {length} tokens or more, "
        f"but {samples} are needed; give more text, or lower samples or sequence_length"
    )
