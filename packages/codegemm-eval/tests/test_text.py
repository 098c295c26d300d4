from __future__ import annotations

import json

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from codegemm_eval.text import C4_CHARACTERS, load_text, read_text
from codegemm_kernels import BadInput


def test_local_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwö", encoding="utf-8")
    lines = [json.dumps({"text": "one"}), "", json.dumps({"text": "two", "other": 1})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "n": [1, 2]}), tmp_path / "a.parquet")
    assert read_text(str(tmp_path / "a.txt")) == "one\ntwö"
    assert read_text(str(tmp_path / "a.jsonl")) == "one\n\ntwo"
    assert read_text(str(tmp_path / "a.parquet")) == "one\n\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no file .*none.txt.*wikitext2"),
        ("empty.txt", b" \n", "empty.txt holds no text"),
        ("latin.txt", b"caf\xe9 au lait", "latin.txt is not UTF-8"),
        (
            "latin.jsonl",
            b'{"text": "' + 20000 * b"x" + b'"}\n{"text": "caf\xe9"}\n',
            "latin.jsonl is not .* at byte 20026",
        ),
        ("a.csv", b"text\n", "suffix '.csv'"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": 1}\n', "a.jsonl line 2"),
        ("b.jsonl", b"[1]\n", "b.jsonl line 1"),
        ("c.jsonl", b'{"text": 1}\n', '"text" is int'),
        ("a.parquet", b"not parquet", "a.parquet is no parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message):
        load_text(str(tmp_path / name))


def test_parquet_without_text(tmp_path):
    parquet.write_table(pyarrow.table({"body": ["one"]}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match="column text"):
        read_text(str(tmp_path / "a.parquet"))
    parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match="int64, not strings"):
        read_text(str(tmp_path / "a.parquet"))


def served(monkeypatch, expected: tuple, **columns: list[str]) -> None:
    """Make datasets.load_dataset answer with `columns` when it is called with `expected`."""

    def load_dataset(*arguments, **options):
        assert (arguments, options) == expected
        return datasets.Dataset.from_dict(columns)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_wikitext2_joins_raw_test_rows_by_a_blank_line(monkeypatch):
    rows = ["", " = Title = \n", " Body .\n"]
    served(monkeypatch, (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"}), text=rows)
    assert load_text("wikitext2").documents == ("\n\n = Title = \n\n\n Body .\n",)


C4 = (
    ("allenai/c4",),
    {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "split": "validation"},
)


def test_c4_takes_1100_documents_and_cuts_by_characters_or_tokens(monkeypatch):
    served(monkeypatch, C4, text=[f"{i:04d}" + "x" * 6 for i in range(1200)])
    assert load_text("c4").documents[0].endswith(" 1099xxxxxx")
    assert load_text("c4-tokens").documents == load_text("c4").documents
    assert len(load_text("c4-documents").documents) == 1200
    served(monkeypatch, C4, text=["x" * 4000] * 1200)
    assert len(load_text("c4").documents[0]) == C4_CHARACTERS
    assert len(load_text("c4-tokens").documents[0]) == 1100 * 4001 - 1


@pytest.mark.parametrize(("name", "split", "text"), [("ptb", "validation", "a b\n\nc"), ("ptb-new", "test", "a b c")])
def test_ptb_joins_sentences(monkeypatch, name, split, text):
    files = {split: f"penn_treebank/{split}/0000.parquet"}
    options = {"revision": "refs/convert/parquet", "data_files": files, "split": split}
    served(monkeypatch, (("ptb-text-only/ptb_text_only",), options), sentence=["a b", "c"])
    assert load_text(name).documents == (text,)


def test_the_digest_is_of_the_content(tmp_path):
    for name, content in (("a.txt", "one"), ("b.txt", "one"), ("c.txt", "two")):
        (tmp_path / name).write_text(content)
    a, b, c = (load_text(str(tmp_path / name)) for name in ("a.txt", "b.txt", "c.txt"))
    assert a.digest == b.digest != c.digest
    assert (a.name, a.rule) == ("a.txt", None)


def test_a_download_that_fails_says_so(monkeypatch):
    def load_dataset(*_args, **_options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(OSError, match=r"wikitext2 could not be downloaded \(no route\); give a local file"):
        load_text("wikitext2")
