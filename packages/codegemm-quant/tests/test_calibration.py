import json

import pytest
import torch
from datasets import Dataset

from codegemm_kernels import BadInput
from codegemm_quant.calibration import calibration_windows


def test_windows_of_a_text_file_are_disjoint_and_repeat_by_seed(text_file, tokenizer):
    windows = calibration_windows(str(text_file), tokenizer, 20, 64, seed=1)
    assert windows.shape == (20, 64)
    assert windows.dtype == torch.int64
    stream = tokenizer(text_file.read_text()).input_ids
    places = [next(i for i in range(0, len(stream), 64) if stream[i : i + 64] == w) for w in windows.tolist()]
    assert len(set(places)) == 20
    assert torch.equal(windows, calibration_windows(str(text_file), tokenizer, 20, 64, seed=1))
    assert not torch.equal(windows, calibration_windows(str(text_file), tokenizer, 20, 64, seed=2))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_windows_of_documents_lie_inside_one_document(tmp_path, suffix, tokenizer):
    texts = [chr(97 + i) * (30 + 20 * i) for i in range(10)]
    path = tmp_path / f"documents.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        Dataset.from_dict({"text": texts}).to_parquet(path)
    windows = calibration_windows(str(path), tokenizer, 6, 100, seed=0)
    assert windows.shape == (6, 100)
    assert all(len(set(window.tolist())) == 1 for window in windows)


def test_too_little_text_says_how_much_there_is(tmp_path, text_file, tokenizer):
    length = len(tokenizer(text_file.read_text()).input_ids)
    with pytest.raises(BadInput, match=rf"text\.txt is too short: its {length} tokens"):
        calibration_windows(str(text_file), tokenizer, 1000, 64, seed=0)
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(BadInput, match="its 0 tokens"):
        calibration_windows(str(empty), tokenizer, 1, 64, seed=0)
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "abc"}\n')
    with pytest.raises(BadInput, match="0 of its 1 documents"):
        calibration_windows(str(short), tokenizer, 1, 64, seed=0)


def test_what_is_no_text_is_refused(tmp_path, tokenizer):
    with pytest.raises(BadInput, match=r"absent\.txt does not exist"):
        calibration_windows(str(tmp_path / "absent.txt"), tokenizer, 1, 8, seed=0)
    with pytest.raises(BadInput, match="neither a "):
        calibration_windows("imagenet", tokenizer, 1, 8, seed=0)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"txt": 1}\n')
    with pytest.raises(BadInput, match=r"broken\.jsonl line 2"):
        calibration_windows(str(broken), tokenizer, 1, 8, seed=0)


@pytest.mark.parametrize("name", ["latin.txt", "latin.jsonl"])
def test_text_that_is_not_utf_8_is_refused(tmp_path, name, tokenizer):
    content = json.dumps({"text": "x" * 20000}).encode() + b'\n{"text": "caf\xe9 au lait"}\n'
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=rf"{name} is not UTF-8 text \(.* at byte {content.index(0xE9)}\)"):
        calibration_windows(str(tmp_path / name), tokenizer, 1, 8, seed=0)


def test_a_damaged_parquet_file_is_named(tmp_path, tokenizer):
    path = tmp_path / "documents.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(BadInput, match=r"documents\.parquet is no readable parquet file"):
        calibration_windows(str(path), tokenizer, 1, 8, seed=0)
