"""A text as token ids in a file: written once, then mapped into memory and read window by window."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from codegemm_kernels import BadInput
from codegemm_kernels.untrusted import read_utf8
from codegemm_quant.calibration import DATASETS, TEXT_SUFFIXES
from codegemm_quant.pv.config import TokenizeConfig
from codegemm_quant.subject import check_out

TOKENS_FILE, ABOUT_FILE = "tokens.bin", "tokens.json"
PIECE = 1 << 20
"""Characters of a document tokenised at once; pieces end at line ends."""


@dataclass(frozen=True)
class TokenCache:
    """Token ids of a whole text, int32, as one stream. Documents follow each other."""

    stream: Tensor
    """int32 [tokens], mapped from the file."""
    about: dict[str, Any]
    """What is in tokens.json."""

    @classmethod
    def open(cls, folder: Path) -> TokenCache:
        """Map a folder written by `tokenize`. Raises BadInput when it is none or is cut short."""
        try:
            about = json.loads((folder / ABOUT_FILE).read_text())
            count, size = int(about["tokens"]), (folder / TOKENS_FILE).stat().st_size
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{folder} is no folder of tokens ({error!r}): make it with `codegemm-quant tokenize`"
            ) from error
        if size != 4 * count:
            raise BadInput(f"{folder / TOKENS_FILE} holds {size} bytes where {4 * count} are needed: tokenise again")
        stream = torch.from_file(str(folder / TOKENS_FILE), shared=False, size=count, dtype=torch.int32)
        return cls(stream, about)

    def count(self, length: int) -> int:
        """How many windows of `length` tokens there are; they do not overlap."""
        return len(self.stream) // length

    def windows(self, numbers: list[int], length: int) -> Tensor:
        """The windows of these numbers, int64 [windows, length]."""
        return torch.stack([self.stream[number * length : (number + 1) * length] for number in numbers]).long()


def tokenize(config: TokenizeConfig) -> dict[str, Any]:
    """Tokenise a text into the folder `config.out`; returns what tokens.json says of it.

    Every document gets the special tokens that the tokenizer itself puts around a text, once however long it is. Where
    the tokenizer ends a text with none, documents are separated by its end token.
    """
    out = Path(config.out)
    check_out(out)
    tokenizer = _tokenizer(config.tokenizer)
    building = out.with_name(f".{out.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    tokens, documents = 0, 0
    try:
        with (building / TOKENS_FILE).open("wb") as file, tqdm(desc="tokenise", unit=" tokens", unit_scale=True) as bar:
            for part, starts in _token_parts(_documents(config.data), tokenizer):
                documents += starts
                wanted = len(part) if config.max_tokens is None else min(len(part), config.max_tokens - tokens)
                file.write(torch.tensor(part[:wanted], dtype=torch.int32).numpy().tobytes())
                tokens += wanted
                bar.update(wanted)
                if tokens == config.max_tokens:
                    break
        if not tokens:
            raise BadInput(f"{config.data} holds no text")
        about = {
            "data": config.data,
            "tokens": tokens,
            "documents": documents,
            "vocabulary": len(tokenizer),
            "tokenizer": vocabulary_fingerprint(tokenizer),
        }
        (building / ABOUT_FILE).write_text(json.dumps(about, indent=2))
        building.replace(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return {"out": str(out), **about}


def _tokenizer(name: str) -> Any:
    """The tokenizer of a model folder or hub name. Raises BadInput when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(":")
        raise BadInput(
            f"there is no tokenizer in {name} ({reason}): give a folder with tokenizer.json, or a hub name"
        ) from error


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """Tells tokenizers of different vocabularies apart."""
    entries = sorted(tokenizer.get_vocab().items())
    return sha256(json.dumps(entries).encode()).hexdigest()[:16]


def _token_parts(documents: Iterable[str], tokenizer: Any) -> Iterator[tuple[list[int], bool]]:
    """Token ids of all documents piece by piece, and whether a piece begins a document."""
    probe = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    at = next(i for i in range(len(probe)) if probe[i : i + len(bare)] == bare)
    before, after = probe[:at], probe[at + len(bare) :]
    end = tokenizer.eos_token_id
    separator = [] if after or end is None else [end]
    for number, text in enumerate(documents):
        yield (separator if number else []) + before, True
        for piece in _pieces(text):
            yield tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"], False
        yield after, False


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        line_end = text.find("\n", start + PIECE)
        end = len(text) if line_end < 0 else line_end + 1
        yield text[start:end]
        start = end


def _documents(data: str) -> Iterator[str]:
    """The documents of a text. A .txt file and wikitext2 are one; data sets of the hub are streamed."""
    path = Path(data)
    if path.suffix == ".txt":
        if not path.is_file():
            raise BadInput(f"the text {data} does not exist")
        yield read_utf8(path)
        return
    if path.suffix in TEXT_SUFFIXES and not path.is_file():
        raise BadInput(f"the text {data} does not exist")
    if path.suffix not in TEXT_SUFFIXES and data not in DATASETS and data.count("/") != 1:
        raise BadInput(
            f"text {data!r} is neither a {', '.join(TEXT_SUFFIXES)} file, nor one of {', '.join(DATASETS)}, "
            "nor a hub data set such as owner/name or owner/name:config"
        )
    rows = _stream(data, path)
    if data == "wikitext2":
        yield "\n\n".join(row["text"] for row in rows)
        return
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise BadInput(f'{data} has no "text" field, only {", ".join(row)}')
        yield row["text"]


def _stream(data: str, path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file or hub data set, read as they are needed."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    named: dict[str, tuple[Any, ...]] = {
        "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
        "c4": ("allenai/c4", "en"),
        "slimpajama": ("DKYoon/SlimPajama-6B",),
    }
    try:
        if path.suffix in TEXT_SUFFIXES:
            kind = "json" if path.suffix == ".jsonl" else "parquet"
            rows = load_dataset(kind, data_files=str(path.resolve()), split="train", streaming=True)
        else:
            rows = load_dataset(*named.get(data, tuple(data.split(":"))), split="train", streaming=True)
        yield from rows
    except (DatasetGenerationError, DatasetNotFoundError, ValueError) as error:
        raise BadInput(f"{data} cannot be read as a data set: {str(error).splitlines()[0]}") from error
