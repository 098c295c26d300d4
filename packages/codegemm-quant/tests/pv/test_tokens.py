import json
from dataclasses import replace

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from codegemm_kernels import BadInput
from codegemm_quant.pv import tokens
from codegemm_quant.pv.config import TokenizeConfig
from codegemm_quant.pv.tokens import TokenCache, tokenize

WORDS = ["short", "a longer one\nof two lines", "end"]


@pytest.fixture
def documents(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in WORDS))
    return path


def run(folders, data, folder, **changes):
    return tokenize(replace(TokenizeConfig(str(data), str(folders / "dense"), str(folder)), **changes))


def test_a_text_file_is_one_document_as_its_tokenizer_reads_it(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 100)
    told = run(folders, folders / "text.txt", tmp_path / "tokens")
    tokenizer = AutoTokenizer.from_pretrained(folders / "dense")
    expected = tokenizer((folders / "text.txt").read_text())["input_ids"]
    cache = TokenCache.open(tmp_path / "tokens")
    assert cache.stream.tolist() == expected
    assert (told["tokens"], told["documents"]) == (len(expected), 1)
    assert torch.equal(cache.windows([3, 1], 8), torch.tensor([expected[24:32], expected[8:16]]))
    assert cache.count(8) == len(expected) // 8


def test_documents_are_separated(folders, documents, tmp_path):
    assert run(folders, documents, tmp_path / "tokens")["documents"] == len(WORDS)
    tokenizer = AutoTokenizer.from_pretrained(folders / "dense")
    stream = TokenCache.open(tmp_path / "tokens").stream
    assert tokenizer.decode(stream) == "</s>".join(WORDS)


def test_a_tokenizer_that_begins_and_ends_texts_does_so_once_a_document(folders, documents, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(folders / "dense")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    pair = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=pair)
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(tokens, "PIECE", 4)  # pieces within a document get none
    tokenize(TokenizeConfig(str(documents), str(tmp_path / "tokenizer"), str(tmp_path / "tokens")))
    stream = TokenCache.open(tmp_path / "tokens").stream
    assert tokenizer.decode(stream) == "".join(f"<s>{text}</s>" for text in WORDS)


def test_a_budget_ends_in_the_middle(folders, tmp_path):
    assert run(folders, folders / "text.txt", tmp_path / "tokens", max_tokens=777)["tokens"] == 777
    assert len(TokenCache.open(tmp_path / "tokens").stream) == 777


def test_bad_input(folders, documents, tmp_path):
    text = folders / "text.txt"
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "other.jsonl").write_text('{"words": "a"}')
    cases = [
        (tmp_path / "none.txt", {}, "does not exist"),
        ("none", {}, "neither a .txt"),
        (tmp_path / "empty.txt", {}, "holds no text"),
        (tmp_path / "latin.txt", {}, r"latin\.txt is not UTF-8 text \(.* at byte 3\)"),
        (tmp_path / "other.jsonl", {}, 'no "text" field, only words'),
        (text, {"tokenizer": str(tmp_path)}, "no tokenizer"),
        (text, {"out": str(tmp_path)}, "exists already"),
    ]
    for data, changes, message in cases:
        with pytest.raises(BadInput, match=message):
            run(folders, data, tmp_path / "tokens", **changes)
        assert not (tmp_path / "tokens").exists()
        assert not (tmp_path / ".tokens.partial").exists()
    with pytest.raises(BadInput, match="no folder of tokens"):
        TokenCache.open(tmp_path)
    run(folders, text, tmp_path / "tokens")
    file = tmp_path / "tokens" / "tokens.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(BadInput, match="tokenise again"):
        TokenCache.open(tmp_path / "tokens")
