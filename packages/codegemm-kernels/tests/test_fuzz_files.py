"""Headers, configs, indexes and scheme strings that somebody made up: refused in one sentence, or read right."""

from __future__ import annotations

import json
import math
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from codegemm_kernels import BadInput, CheckpointError, CheckpointMetadata, CodebookScheme
from codegemm_kernels.checkpoint import (
    check_layer,
    checkpoint_files,
    read_config,
    read_headers,
)
from codegemm_kernels.untrusted import DTYPE_BITS, MAX_JSON_BYTES

NUMBERS = st.one_of(
    st.integers(-2, 300), st.sampled_from([2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -1, 0, 1.5, True, None])
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda each: st.lists(each, max_size=4) | st.dictionaries(st.text(max_size=8), each, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(
    ["a.codes", "a.codebooks", "a.scales", "__metadata__", "", "b\x1b[2J", "x.²", "l." + "9" * 5000]
)
DTYPES = st.sampled_from([*DTYPE_BITS, "I33", "", "PICKLE"])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": DTYPES | JSON,
        "shape": st.lists(NUMBERS, max_size=4) | JSON,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON,
    }
)


@pytest.fixture
def bounded_memory() -> Any:
    """At most 2 GiB more than now, so that an allocation by a declared size fails the test and not the machine."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    now = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_DATA, (now + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)


def write(file: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file of these parts; `length` is what it declares its header to be long."""
    file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return file


def check_header(file: Path) -> bool:
    """Whether a header is accepted; then the safetensors library accepts it too, and sees the same tensors."""
    try:
        headers = read_headers([file])
    except CheckpointError as error:
        assert file.name in str(error)
        assert str(error).isprintable()
        return False
    for header in headers.values():
        assert header.nbytes * 8 == math.prod(header.shape) * DTYPE_BITS[header.dtype]
    with safe_open(file, framework="np") as opened:
        assert set(opened.keys()) == headers.keys()
        assert all(tuple(opened.get_slice(name).get_shape()) == headers[name].shape for name in headers)
    check_layer("a", CodebookScheme(1, 4), 8, 16, headers)
    return True


@given(entries=st.dictionaries(NAMES, ENTRIES | JSON, max_size=4), size=st.integers(0, 64))
@example(entries={"a": {"dtype": "F32", "shape": [2**50], "data_offsets": [0, 2**52]}}, size=16)
@example(entries={"a": {"dtype": "F32", "shape": [-4, -4], "data_offsets": [0, 64]}}, size=64)
@example(entries={"a": {"dtype": "U8", "shape": [2**62, 4], "data_offsets": [0, 0]}}, size=0)
def test_made_up_headers(tmp_path: Path, bounded_memory: None, entries: dict[str, Any], size: int) -> None:
    check_header(write(tmp_path / "model.safetensors", json.dumps(entries).encode(), bytes(size)))


@given(data=st.data())
def test_sound_headers_with_one_change(tmp_path: Path, data: st.DataObject) -> None:
    """Files that were sound until somebody changed one byte, one number or one name."""
    shapes = data.draw(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=4))
    entries, place = {}, 0
    for i, shape in enumerate(shapes):
        dtype = data.draw(st.sampled_from(["F32", "F16", "I32", "U8"]))
        end = place + math.prod(shape) * DTYPE_BITS[dtype] // 8
        entries[f"t{i}"] = {"dtype": dtype, "shape": shape, "data_offsets": [place, end]}
        place = end
    text = bytearray(json.dumps(entries).encode())
    file = tmp_path / "model.safetensors"
    assert check_header(write(file, bytes(text), bytes(place)))
    at = data.draw(st.integers(0, len(text) - 1))
    text[at] = data.draw(st.integers(0, 255))
    check_header(write(file, bytes(text), bytes(place)))
    entries["t0"]["data_offsets"] = [4, 4 + entries["t0"]["data_offsets"][1]]
    assert not check_header(write(file, json.dumps(entries).encode(), bytes(place + 4)))


@given(content=st.binary(max_size=64), length=st.integers(0, 2**64 - 1) | st.integers(0, 64))
def test_garbage(tmp_path: Path, bounded_memory: None, content: bytes, length: int) -> None:
    check_header(write(tmp_path / "model.safetensors", content, length=length))


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"U8","dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
        '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'.encode("utf-16"),
        b'\xff\xfe{"a":1}',
        b"null",
        b"",
    ],
    ids=["twice", "field twice", "brackets", "braces", "digits", "NaN", "overlap", "gap", "UTF-16", "BOM", "null", "0"],
)
def test_headers_with_a_purpose(tmp_path: Path, header: bytes) -> None:
    assert not check_header(write(tmp_path / "model.safetensors", header, bytes(4)))


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path, bounded_memory: None) -> None:
    """A sparse file of 8 TiB that consists of its header: nothing on disk, and the whole memory if it were read."""
    file = write(tmp_path / "model.safetensors", b"{", length=(8 << 40) - 8)
    os.truncate(file, 8 << 40)
    assert not check_header(file)
    os.truncate(tmp_path / "model.safetensors", 4)
    assert not check_header(file)
    with pytest.raises(SafetensorError), safe_open(file, framework="np"):
        pass


@given(text=st.text(max_size=20) | st.from_regex(r"m\d+v\d+(b\d+)?g-?\d+", fullmatch=True))
@example(text="m" + "1" * 5000 + "v4g128")
@example(text="m１v４g１２８")
@example(text="m0v4g128")
@example(text="m1v4g0")
@example(text="m1v4g-2")
def test_scheme_strings(text: str) -> None:
    try:
        scheme = CodebookScheme.parse(text)
    except BadInput:
        return
    assert text.strip().isascii()
    assert CodebookScheme.parse(str(scheme)) == scheme
    try:
        shapes = scheme.shapes(24, 4096)
    except BadInput:
        return
    assert math.prod(shapes["codes"]) * 4 * scheme.vector_length == scheme.num_codebooks * 24 * 4096


BLOCK = {"quant_method": "codegemm", "format_version": 1, "scheme": "m1v4g128", "layers": {"a": "m2v8g128"}}
PUBLISHED = {"group_size": 128, "vec_len": 8, "num_codebooks": 2, "nbits_per_codebook": 8}


@given(data=st.data(), block=st.sampled_from([BLOCK, PUBLISHED]))
def test_quantization_blocks(tmp_path: Path, data: st.DataObject, block: dict[str, Any]) -> None:
    """Ours and the published one, with one field replaced by anything; what is accepted survives a round trip."""
    key = data.draw(st.sampled_from([*block, "modules_to_not_convert", "unknown"]))
    changed = block | {key: data.draw(NUMBERS | JSON | st.dictionaries(st.text(max_size=4), JSON, max_size=2))}
    config = {"quantization_config" if block is BLOCK else "codegemm": changed}
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        metadata = CheckpointMetadata.from_config(read_config(tmp_path))
    except CheckpointError:
        return
    if metadata is not None:
        again = {"quantization_config": json.loads(json.dumps(metadata.to_quantization_config()))}
        assert CheckpointMetadata.from_config(again) == metadata


@given(config=JSON | st.binary(max_size=40) | st.text(max_size=40))
@example(config="[" * 100_000)
@example(config='{"a":' * 900 + "1" + "}" * 900)
@example(config='{"a": ' + "1" * 5000 + "}")
@example(config='{"num_hidden_layers": 1' + "0" * 4000 + "}")
@example(config='{"text_config": {"num_experts": 1e300}}')
@example(config='{"num_labels": 1000000000}')
def test_configs(tmp_path: Path, config: Any) -> None:
    path = tmp_path / "config.json"
    if isinstance(config, bytes):
        path.write_bytes(config)
    else:
        path.write_text(config if isinstance(config, str) else json.dumps(config), errors="surrogatepass")
    try:
        read = read_config(tmp_path)
        CheckpointMetadata.from_config(read)
    except CheckpointError:
        return
    assert read == config or any(value != value for value in _leaves(config)), "NaN alone differs from itself"


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict | list):
        each = value.values() if isinstance(value, dict) else value
        return [leaf for one in each for leaf in _leaves(one)]
    return [value]


@given(names=st.lists(st.text(max_size=12) | JSON, max_size=3))
@example(names=["../other/model.safetensors"])
@example(names=["/etc/passwd"])
@example(names=["sub/model.safetensors"])
@example(names=["a\x00b"])
@example(names=["", "."])
@example(names=["..", "here.safetensors"])
def test_indexes(tmp_path: Path, names: list[Any]) -> None:
    """No file outside the folder is ever opened because of an index."""
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (tmp_path / "other").mkdir(exist_ok=True)
    for file in (folder / "here.safetensors", tmp_path / "other" / "model.safetensors"):
        write(file, b"{}")
    index = {"weight_map": {str(i): name for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    try:
        files = checkpoint_files(folder)
    except CheckpointError:
        return
    assert all(file.resolve().parent == folder.resolve() for file in files)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000, '"'])
def test_indexes_of_another_kind(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        checkpoint_files(tmp_path)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    """A pipe would be read for ever."""
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="no regular file"):
        read_config(tmp_path)
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoint_files(tmp_path)
    with pytest.raises(CheckpointError, match="cut short"):
        read_headers([tmp_path / "model.safetensors"])


def test_a_config_of_gigabytes_is_not_read(tmp_path: Path, bounded_memory: None) -> None:
    (tmp_path / "config.json").touch()
    os.truncate(tmp_path / "config.json", 8 << 40)
    with pytest.raises(CheckpointError, match=f"more than {MAX_JSON_BYTES} bytes"):
        read_config(tmp_path)


class TestLinks:
    """Files that are links: into the hub's cache they stay, out of the folder they are refused."""

    @pytest.fixture
    def secret(self, tmp_path: Path) -> Path:
        file = tmp_path / "secret"
        file.write_text("{}")
        return file

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "notes.txt"])
    def test_out_of_the_folder(self, tmp_path: Path, secret: Path, name: str) -> None:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        write(folder / "model.safetensors", b"{}")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("../secret")
        for read in (read_config, checkpoint_files):
            with pytest.raises(CheckpointError, match=f"{name} is a link out of its folder"):
                read(folder)

    def test_a_folder_of_templates(self, tmp_path: Path, secret: Path) -> None:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        elsewhere = tmp_path / "templates"
        elsewhere.mkdir()
        (elsewhere / "tool.jinja").write_text("")
        (folder / "additional_chat_templates").symlink_to(elsewhere)
        with pytest.raises(CheckpointError, match=r"tool\.jinja is a link"):
            read_config(folder)

    def test_the_cache_of_the_hub(self, tmp_path: Path, secret: Path) -> None:
        cache = tmp_path / "models--owner--name"
        snapshot, blobs = cache / "snapshots" / "0123", cache / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        (blobs / "aa").write_text("{}")
        write(blobs / "bb", b"{}")
        (snapshot / "config.json").symlink_to("../../blobs/aa")
        (snapshot / "model.safetensors").symlink_to("../../blobs/bb")
        assert read_config(snapshot) == {}
        assert read_headers(checkpoint_files(snapshot)) == {}
        (snapshot / "tokenizer.json").symlink_to("../../../secret")
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link"):
            read_config(snapshot)

    def test_inside_the_folder_and_to_the_folder(self, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "real.json").write_text("{}")
        (folder / "config.json").symlink_to("real.json")
        (folder / "loop").symlink_to("loop")
        (tmp_path / "name").symlink_to(folder)
        assert read_config(tmp_path / "name") == {}


def test_an_adapter_beside_the_model_is_refused(tmp_path: Path) -> None:
    """transformers would load it, and pickles of it, without a word."""
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        read_config(tmp_path)
