"""The text to evaluate on: a local file, or a named test set by the protocol of the published numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from codegemm_kernels import BadInput
from codegemm_kernels.untrusted import read_utf8

C4_DOCUMENTS = 1100
C4_CHARACTERS = 2_088_528
C4_WINDOWS = 256
SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class NamedSet:
    """A test set of published numbers and how its documents become one text."""

    load: Callable[[], list[str]]
    joined_by: str | None
    """None: each window is drawn from one document."""
    characters: int | None = None
    """The joined text is cut to this many."""
    windows: int | None = None
    """Only the tokens of the first (or this many random) windows are used."""


@dataclass(frozen=True)
class Text:
    """What to measure on, before it is tokenised."""

    name: str
    """The name of a test set or of a file without its folder."""
    documents: tuple[str, ...]
    """One text, or the documents that windows are drawn from."""
    rule: NamedSet | None = None

    @property
    def digest(self) -> str:
        """Of the content, however it is called."""
        content = hashlib.sha256()
        for document in self.documents:
            content.update(document.encode("utf-8", "surrogatepass") + b"\0")
        return content.hexdigest()[:16]


def load_text(source: str) -> Text:
    """A local file (.txt; .jsonl or .parquet with a `text` column) or a test set of that name (see `NAMED`).

    Documents of .jsonl and .parquet files are joined by a blank line. Raises BadInput for anything that is neither,
    cannot be read or is empty, and OSError when a test set cannot be downloaded.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return Text(path.name, (read_text(source),))
    rule = NAMED.get(source)
    if rule is None:
        raise BadInput(
            f"no file {source} and no test set of that name: "
            f"give a {', '.join(SUFFIXES)} file or one of {', '.join(NAMED)}"
        )
    try:
        documents = rule.load()
    except OSError as error:
        raise OSError(f"the test set {source} could not be downloaded ({error}); give a local file instead") from error
    if rule.joined_by is not None:
        documents = [rule.joined_by.join(documents)[: rule.characters]]
    return Text(source, tuple(documents), rule)


def read_text(file: str) -> str:
    """Text of a local file. Raises BadInput when it cannot be read or is empty."""
    text = _read_file(Path(file).expanduser())
    if not text.strip():
        raise BadInput(f"{file} holds no text (0 tokens): give a text of at least one window")
    return text


def _read_file(path: Path) -> str:
    try:
        if path.suffix == ".txt":
            return read_utf8(path)
        if path.suffix == ".jsonl":
            return "\n\n".join(_json_lines(path))
        if path.suffix == ".parquet":
            return "\n\n".join(_parquet_rows(path))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from error
    raise BadInput(f"{path} has the suffix {path.suffix!r}: give a file with one of {', '.join(SUFFIXES)}")


def _json_lines(path: Path) -> list[str]:
    texts = []
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
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


def _wikitext2() -> list[str]:
    """The raw-v1 test rows."""
    from datasets import load_dataset

    return list(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"])


def _ptb(split: str) -> list[str]:
    """Sentences of the Penn Treebank, whose hub repository is a script: datasets reads the hub's own copy of it."""
    from datasets import load_dataset

    files = {split: f"penn_treebank/{split}/0000.parquet"}
    rows = load_dataset("ptb-text-only/ptb_text_only", revision="refs/convert/parquet", data_files=files, split=split)
    return list(rows["sentence"])


def _c4() -> list[str]:
    """Documents of en validation shard 0."""
    from datasets import load_dataset

    files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    return list(load_dataset("allenai/c4", data_files=files, split="validation")["text"])


def _first_of_c4() -> list[str]:
    return _c4()[:C4_DOCUMENTS]


NAMED: Mapping[str, NamedSet] = {
    "wikitext2": NamedSet(_wikitext2, "\n\n"),
    "c4": NamedSet(_first_of_c4, " ", characters=C4_CHARACTERS),
    "c4-tokens": NamedSet(_first_of_c4, " ", windows=C4_WINDOWS),
    "c4-documents": NamedSet(_c4, None, windows=C4_WINDOWS),
    "ptb": NamedSet(partial(_ptb, "validation"), "\n\n"),
    "ptb-new": NamedSet(partial(_ptb, "test"), " "),
}
"""Test sets by name; README.md says which published protocol each is."""
