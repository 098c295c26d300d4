"""Tokens of a text: where the beginning is marked, and a cache by content."""

from __future__ import annotations

import hashlib
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from codegemm_eval.text import NamedSet, Text
from codegemm_eval.windows import Bos, Protocol, Windows, cut_windows
from codegemm_kernels import BadInput


@dataclass(frozen=True)
class TokenizedText:
    """A text as a model reads it."""

    ids: Tensor
    """int64 [T]."""
    bos: Bos
    """text, window or none."""
    bos_id: int | None

    def cut(self, protocol: Protocol) -> Windows:
        """The windows of `protocol`. Raises BadInput when there is no full one."""
        return cut_windows(self.ids, protocol, self.bos_id if self.bos == "window" else None)


def tokenize(text: Text, tokenizer: Any, protocol: Protocol) -> TokenizedText:
    """Tokens of `text`, from the user's cache folder where the same content was tokenised before.

    Raises BadInput when `protocol` asks for a token of a beginning and the tokenizer has none.
    """
    bos = choose_bos(tokenizer, protocol.bos)
    # "window" replaces the first token of the text anyway: tokenise as the tokenizer likes, as published numbers do.
    special = bos != "none"
    tokenizer_digest = _tokenizer_digest(tokenizer)
    rule = text.rule if text.rule is not None and text.rule.joined_by is None else None
    drawn = "" if rule is None else f"{rule.windows} documents of {protocol.window}"
    key = hashlib.sha256(f"{tokenizer_digest} {text.digest} {special} {drawn}".encode()).hexdigest()
    file = None if tokenizer_digest is None else cache_folder() / f"{key}.safetensors"
    ids = None if file is None else _load(file)
    if ids is None:
        if rule is None:
            listed = tokenizer(text.documents[0], verbose=False, add_special_tokens=special)["input_ids"]
            ids = torch.tensor(listed, dtype=torch.int64)
        else:
            ids = _draw(text.documents, rule, tokenizer, protocol.window, special)
        if file is not None:
            _save(file, ids)
    if text.rule is not None and text.rule.windows is not None:
        ids = ids[: text.rule.windows * protocol.window]
    starts = len(ids) > 0 and int(ids[0]) == tokenizer.bos_token_id
    if bos == "text" and not starts:  # asked for, though the tokenizer does not add it by itself
        ids = torch.cat([torch.tensor([tokenizer.bos_token_id]), ids])
    return TokenizedText(ids, bos, tokenizer.bos_token_id)


def choose_bos(tokenizer: Any, wanted: Bos) -> Bos:
    """`wanted`, with auto decided by the tokenizer. Raises BadInput when there is no such token."""
    if wanted == "auto":
        if "Gemma" in type(tokenizer).__name__:
            return "window"
        return "text" if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else "none"
    if wanted != "none" and tokenizer.bos_token_id is None:
        raise BadInput(f"--bos {wanted} needs a tokenizer with a BOS token, and this one has none: use --bos none")
    return wanted


def cache_folder() -> Path:
    """Where token ids are kept: $XDG_CACHE_HOME/codegemm/tokens, ~/.cache/codegemm/tokens if that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codegemm" / "tokens"


def _draw(documents: tuple[str, ...], rule: NamedSet, tokenizer: Any, window: int, special: bool) -> Tensor:
    """Windows at random places of random documents that are long enough, one after another: the older protocol for c4.

    The order of random numbers is the published one: `random.seed(0)`, a document until one is long enough, a place.
    """
    assert rule.windows is not None
    chooser = random.Random(0)
    drawn: list[Tensor] = []
    misses = 0
    while len(drawn) < rule.windows:
        document = documents[chooser.randint(0, len(documents) - 1)]
        ids = tokenizer(document, verbose=False, add_special_tokens=special)["input_ids"]
        if len(ids) < window:
            misses += 1
            if misses > 100 * len(documents):
                raise BadInput(f"no document has {window} tokens: use a smaller --window")
            continue
        start = chooser.randint(0, len(ids) - window - 1) if len(ids) > window else 0
        drawn.append(torch.tensor(ids[start : start + window], dtype=torch.int64))
    return torch.cat(drawn)


def _tokenizer_digest(tokenizer: Any) -> str | None:
    """Of all that decides its output; None for a tokenizer that cannot be written down, which is then not cached."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None or not hasattr(core, "to_str"):
        return None
    return hashlib.sha256(f"{type(tokenizer).__name__} {core.to_str()}".encode()).hexdigest()


def _load(file: Path) -> Tensor | None:
    """Cached ids, None when there are none or the file is damaged."""
    try:
        return load_file(file)["ids"].long() if file.exists() else None
    except (OSError, SafetensorError, KeyError):
        return None


def _save(file: Path, ids: Tensor) -> None:
    """Write and rename. A cache that cannot be written is worth a word, not a failure."""
    fresh = file.with_name(f"{file.name}.{os.getpid()}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"ids": ids.to(torch.int32)}, fresh)
        fresh.replace(file)
    except (OSError, SafetensorError) as error:
        print(f"(token ids are not cached: {error})", file=sys.stderr)
