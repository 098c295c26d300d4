"""The text to evaluate on: a local file, or a named test set by the protocol of the published numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from codegemm_kernels import BadInput

C4_DOCUMENTS = 1100
C4_CHARACTERS = 2_088_528
SUFFIXES = (".txt", ".jsonl", ".parquet")


def read_text(source: str) -> str:
    """Text of a local file (.txt; .jsonl or .parquet with a `text` column) or of the test set wikitext2 or c4.

    Documents of .jsonl and .parquet files are joined by a blank line. Raises BadInput for anything that is neither,
    cannot be read or is empty, and OSError when a test set cannot be downloaded.
    """
    path = Path(source).expanduser()
    if path.is_file():
        text = _read_file(path)
    elif source in NAMED:
        text = _download(source)
    else:
        raise BadInput(
            f"no file {source} and no test set of that name: "
            f"give a {', '.join(SUFFIXES)} file or one of {', '.join(NAMED)}"
        )
    if not text.strip():
        raise BadInput(f"{source} holds no text (0 tokens): give a text of at least one window")
    return text


def read_tokens(source: str, tokenizer: Any) -> torch.Tensor:
    """Tokens [T] int64 of `read_text(source)`, tokenised in one piece.

    Special tokens are what the tokenizer adds by itself: its BOS, if it has one, stands once, at the start.
    """
    ids = tokenizer(read_text(source), verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _read_file(path: Path) -> str:
    try:
        if path.suffix == ".txt":
            return path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return "\n\n".join(_json_lines(path))
        if path.suffix == ".parquet":
            return "\n\n".join(_parquet_rows(path))
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first") from error
    raise BadInput(f"{path} has the suffix {path.suffix!r}: give a file with one of {', '.join(SUFFIXES)}")


def _json_lines(path: Path) -> list[str]:
    texts = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise BadInput(f'{path} line {number} is no JSON object with a "text" ({error!r})') from error
            if not isinstance(text, str):
                raise BadInput(f'{path} line {number}: "text" is {type(text).__name__}, not a string')
            texts.append(text)
    return texts


def _parquet_rows(path: Path) -> list[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        column = parquet.read_table(path, columns=["text"]).column("text")
    except (pyarrow.ArrowException, KeyError) as error:
        raise BadInput(f"{path} is no parquet file with a column text ({error})") from error
    if not pyarrow.types.is_string(column.type) and not pyarrow.types.is_large_string(column.type):
        raise BadInput(f"{path}: the column text holds {column.type}, not strings")
    return [text for text in column.to_pylist() if text is not None]


def _wikitext2() -> str:
    """The raw-v1 test rows, joined by a blank line."""
    from datasets import load_dataset

    return "\n\n".join(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"])


def _c4() -> str:
    """The first 1100 documents of en validation shard 0, joined by a space and cut to 2 088 528 characters."""
    from datasets import load_dataset

    files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    documents = load_dataset("allenai/c4", data_files=files, split="validation")
    return " ".join(documents.select(range(min(C4_DOCUMENTS, len(documents))))["text"])[:C4_CHARACTERS]


NAMED: Mapping[str, Callable[[], str]] = {"wikitext2": _wikitext2, "c4": _c4}


def _download(name: str) -> str:
    try:
        return NAMED[name]()
    except OSError as error:
        raise OSError(f"the test set {name} could not be downloaded ({error}); give a local file instead") from error
