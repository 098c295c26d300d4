from __future__ import annotations

import json

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from tokenizers.processors import TemplateProcessing

from codegemm_eval.text import C4_CHARACTERS, read_text, read_tokens
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
        ("none.txt", None, "no file .*none.txt"),
        ("empty.txt", b" \n", "empty.txt holds no text"),
        ("latin.txt", b"caf\xe9 au lait", "latin.txt is not UTF-8"),
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
        read_text(str(tmp_path / name))


def test_parquet_without_text(tmp_path):
    parquet.write_table(pyarrow.table({"body": ["one"]}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match="column text"):
        read_text(str(tmp_path / "a.parquet"))
    parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match="int64, not strings"):
        read_text(str(tmp_path / "a.parquet"))


def test_wikitext2_joins_raw_test_rows_by_a_blank_line(monkeypatch):
    def load_dataset(path, name, split):
        assert (path, name, split) == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
        return datasets.Dataset.from_dict({"text": ["", " = Title = \n", " Body .\n"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_text("wikitext2") == "\n\n = Title = \n\n\n Body .\n"


def test_c4_takes_1100_documents_and_cuts_by_characters(monkeypatch):
    def load_dataset(path, data_files, split):
        assert (path, split) == ("allenai/c4", "validation")
        assert data_files == {"validation": "en/c4-validation.00000-of-00008.json.gz"}
        return datasets.Dataset.from_dict({"text": [f"{i:04d}" + "x" * length for i in range(1200)]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    length = 6
    assert read_text("c4").endswith(" 1099xxxxxx")
    length = 4000
    assert len(read_text("c4")) == C4_CHARACTERS


def test_a_download_that_fails_says_so(monkeypatch):
    def load_dataset(*_args, **_options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(OSError, match=r"wikitext2 could not be downloaded \(no route\); give a local file"):
        read_text("wikitext2")


def test_bos_stands_once_at_the_start(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "a"}\n')
    plain = read_tokens(str(tmp_path / "a.jsonl"), tokenizer)
    assert len(plain) == 4
    with_bos = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>")
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert read_tokens(str(tmp_path / "a.jsonl"), with_bos).tolist() == [0, *plain.tolist()]
