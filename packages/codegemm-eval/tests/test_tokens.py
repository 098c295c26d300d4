from __future__ import annotations

import random

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from codegemm_eval.text import NamedSet, Text
from codegemm_eval.tokens import cache_folder, choose_bos, tokenize
from codegemm_eval.windows import Protocol
from codegemm_kernels import BadInput

PROTOCOL = Protocol(window=4)


@pytest.fixture
def with_bos(tokenizer):
    """A tokenizer that begins every text with its BOS."""
    changed = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>")
    changed.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return changed


class GemmaTokenizer:
    """Looks like Gemma's to the one who asks for its name."""

    def __init__(self, inner) -> None:
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, *arguments, **options):
        return self.inner(*arguments, **options)


def text(*documents: str, rule: NamedSet | None = None) -> Text:
    return Text("a.txt", documents, rule)


def test_auto_follows_the_tokenizer(tokenizer, with_bos):
    assert choose_bos(tokenizer, "auto") == "none"
    assert choose_bos(with_bos, "auto") == "text"
    assert choose_bos(GemmaTokenizer(with_bos), "auto") == "window"


def test_where_the_bos_stands(tokenizer, with_bos):
    plain = tokenizer("abcdefg")["input_ids"]
    assert len(plain) == 7
    for each in (tokenizer, with_bos):

        def read(bos, each=each):
            return tokenize(text("abcdefg"), each, Protocol(window=4, bos=bos)).cut(PROTOCOL).inputs.tolist()

        assert read("none") == [plain[:4]]
        assert read("text") == [[0, *plain[:3]], plain[3:]]
    assert tokenize(text("abcdefg"), with_bos, Protocol(window=4, bos="window")).cut(PROTOCOL).inputs.tolist() == [
        [0, *plain[:3]],
        [0, *plain[4:]],
    ]
    assert tokenize(text("abcdefg"), tokenizer, PROTOCOL).ids.tolist() == plain
    assert tokenize(text("abcdefg"), with_bos, PROTOCOL).ids.tolist() == [0, *plain]


def test_a_bos_that_is_not_there(tokenizer):
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    assert choose_bos(bare, "auto") == "none"
    with pytest.raises(BadInput, match="--bos window needs a tokenizer with a BOS token"):
        choose_bos(bare, "window")


class Counting(GemmaTokenizer):
    """Counts how often it is asked."""

    calls = 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        return self.inner(*arguments, **options)


def test_tokens_are_cached_by_content(tokenizer, with_bos):
    protocol = Protocol(window=4, bos="none")
    first = Counting(tokenizer)
    ids = tokenize(text("abcdef"), first, protocol).ids
    again = Counting(tokenizer)
    assert torch.equal(tokenize(Text("other name", ("abcdef",)), again, protocol).ids, ids)
    assert (first.calls, again.calls) == (1, 0)
    files = list(cache_folder().iterdir())
    assert [file.suffix for file in files] == [".safetensors"]

    assert len(tokenize(text("abcdeg"), again, protocol).ids) == 6
    changed = Counting(with_bos)  # the same name and vocabulary, another post-processor
    tokenize(text("abcdef"), changed, protocol)
    assert (again.calls, changed.calls) == (1, 1)

    files[0].write_bytes(b"damaged")
    assert torch.equal(tokenize(text("abcdef"), again, protocol).ids, ids)
    assert again.calls == 2


def test_a_cache_that_cannot_be_written_is_no_failure(tokenizer, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(tokenize(text("abcdef"), tokenizer, PROTOCOL).ids) == 6
    assert "not cached" in capsys.readouterr().err


def test_tokens_of_the_first_windows_only(tokenizer):
    rule = NamedSet(list, " ", windows=2)
    assert len(tokenize(text("abcdefghijkl", rule=rule), tokenizer, PROTOCOL).ids) == 8


def test_windows_drawn_from_documents_by_the_published_random_numbers(tokenizer):
    documents = ("ab", "abcdefgh", "wxyz", "ABCDEFGHIJKLMNOP")
    rule = NamedSet(list, None, windows=6)
    found = tokenize(text(*documents, rule=rule), tokenizer, PROTOCOL).cut(PROTOCOL).inputs

    random.seed(0)
    expected = []
    while len(expected) < 6:
        ids = tokenizer(documents[random.randint(0, 3)])["input_ids"]
        if len(ids) >= 4:
            start = random.randint(0, len(ids) - 5) if len(ids) > 4 else 0
            expected.append(ids[start : start + 4])
    assert found.tolist() == expected
    with pytest.raises(BadInput, match="no document has 40 tokens"):
        tokenize(text(*documents, rule=rule), tokenizer, Protocol(window=40))
