"""Checkpoint folders made by an attacker: nothing of theirs runs, nothing outside is read, and words say why."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import codegemm_runtime
from codegemm_kernels import BadInput, CheckpointError
from codegemm_runtime import inspect_folder, load_model, load_tokenizer
from codegemm_runtime.chat import Chat
from codegemm_runtime.convert.conversion import convert_folder
from codegemm_runtime.generation import Sampling
from codegemm_runtime.loading import resolve_folder

codegemm_runtime.register()

# transformers has a word to say about most values that are none.
pytestmark = pytest.mark.filterwarnings("ignore")

REFUSED = (BadInput, ImportError)  # ImportError: a method of others, whose package is not installed


def save_tokenizer(folder: Path, chat_template: str | None = None) -> None:
    vocabulary = {"<s>": 0, "</s>": 1, **{chr(97 + i): i + 2 for i in range(26)}}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[])))
    made.chat_template = chat_template
    made.save_pretrained(folder)


def plant_code(folder: Path) -> Path:
    """Modules that betray that they were imported; returns the file that then appears."""
    marker = folder / "was_run"
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (folder / f"{name}.py").write_text(
            f"open({str(marker)!r}, 'w').close()\nfrom transformers import LlamaConfig as Evil\n"
        )
    return marker


AUTO_MAP = {
    "AutoConfig": "configuration_evil.Evil",
    "AutoModelForCausalLM": "modeling_evil.Evil",
    "AutoTokenizer": ["tokenization_evil.Evil", None],
}


@pytest.mark.parametrize("known", [True, False], ids=["known model type", "unknown model type"])
def test_no_code_of_a_checkpoint_runs(make_checkpoint: Callable[..., Any], tmp_path: Path, known: bool) -> None:
    checkpoint = make_checkpoint()
    folder = checkpoint.folder
    save_tokenizer(folder)
    marker = plant_code(folder)
    checkpoint.edit_config(auto_map=AUTO_MAP, **({} if known else {"model_type": "evil"}))
    settings_file = folder / "tokenizer_config.json"
    stored = json.loads(settings_file.read_text()) | {"auto_map": AUTO_MAP, "tokenizer_class": "Evil"}
    settings_file.write_text(json.dumps(stored))
    if known:
        assert load_model(folder, "cpu").config.model_type == "llama"
        assert inspect_folder(folder).problems == []
        convert_folder(folder, tmp_path / "out", to="dense")
        assert not list((tmp_path / "out").glob("*.py"))
    else:
        with pytest.raises(CheckpointError, match="not usable"):
            load_model(folder, "cpu")
        with pytest.raises(CheckpointError):
            convert_folder(folder, tmp_path / "out", to="dense")
    try:
        load_tokenizer(folder)
    except CheckpointError as error:
        assert "tokenizer" in str(error)
    assert not marker.exists()


def test_pickles_are_not_opened(make_checkpoint: Callable[..., Any]) -> None:
    """Not even beside sound weights, where transformers looks for an adapter."""
    checkpoint = make_checkpoint()
    torch.save({}, checkpoint.folder / "pytorch_model.bin")
    assert load_model(checkpoint.folder, "cpu").config.model_type == "llama"
    (checkpoint.folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    torch.save({}, checkpoint.folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        load_model(checkpoint.folder, "cpu")
    assert inspect_folder(checkpoint.folder).problems


def test_links_out_of_the_folder(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """Of a tokenizer, or of any file that a conversion would copy into a folder that is published afterwards."""
    secret = tmp_path / "id_rsa"
    secret.write_text("{}")
    for name, read in {
        "tokenizer.json": load_tokenizer,
        "notes.txt": lambda folder: convert_folder(folder, tmp_path / "out", to="dense"),
        "generation_config.json": lambda folder: load_model(folder, "cpu"),
        "chat_template.jinja": load_tokenizer,
    }.items():
        checkpoint = make_checkpoint(name=name)
        save_tokenizer(checkpoint.folder)
        (checkpoint.folder / name).unlink(missing_ok=True)
        (checkpoint.folder / name).symlink_to(secret)
        with pytest.raises(CheckpointError, match="is a link out of its folder"):
            read(checkpoint.folder)
    assert not (tmp_path / "out").exists()


def test_an_index_that_leaves_the_folder(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    checkpoint.write(shards=2)
    shard = "model-00002-of-00002.safetensors"
    (tmp_path / "other").mkdir()
    shutil.move(checkpoint.folder / shard, tmp_path / "other" / shard)
    path = checkpoint.folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for place in (f"../other/{shard}", str(tmp_path / "other" / shard)):
        moved = {name: place if file == shard else file for name, file in index["weight_map"].items()}
        path.write_text(json.dumps(index | {"weight_map": moved}))
        with pytest.raises(CheckpointError, match="no file of its folder"):
            AutoModelForCausalLM.from_pretrained(checkpoint.folder)
        with pytest.raises(CheckpointError, match="no file of its folder"):
            load_model(checkpoint.folder, "cpu")


def test_the_cache_of_the_hub_loads(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """It is made of links from a snapshot to the blobs beside."""
    checkpoint = make_checkpoint()
    save_tokenizer(checkpoint.folder)
    cache = tmp_path / "models--owner--name"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(checkpoint.folder.iterdir())):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert load_model(snapshot, "cpu").config.model_type == "llama"
    assert load_tokenizer(snapshot).vocab_size == 28
    assert AutoModelForCausalLM.from_pretrained(snapshot).config.model_type == "llama"


ATTACKS = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch was_run') }}",
    "attribute": "{{ messages|attr('__class__') }}{{ messages.__class__.__base__ }}",
    "loop": "{% for i in range(10 ** 12) %}x{% endfor %}",
    "change": "{{ messages.append('x') }}",
    "syntax": "{% for %}",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_chat_templates_run_in_a_sandbox(
    make_checkpoint: Callable[..., Any], attack: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    save_tokenizer(checkpoint.folder, ATTACKS[attack])
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_model(checkpoint.folder, "cpu"), load_tokenizer(checkpoint.folder)
    chat = Chat(model, tokenizer, Sampling(), 4)
    with pytest.raises(CheckpointError, match=r"chat template .* fails .*--plain"):
        chat.answer("hello", lambda text: None)
    assert not (tmp_path / "was_run").exists()
    assert chat.messages == []


@pytest.mark.parametrize("method", ["nope", "", None, 7, ["codegemm"], {"a": 1}])
@pytest.mark.parametrize("codes", [True, False])
def test_an_unknown_quantisation_method(make_checkpoint: Callable[..., Any], method: Any, codes: bool) -> None:
    """transformers would go on with random weights."""
    checkpoint = make_checkpoint()
    if not codes:
        checkpoint.tensors = {name: tensor.clone() for name, tensor in checkpoint.dense.state_dict().items()}
        checkpoint.write()
    checkpoint.edit_config(quantization_config={"quant_method": method}, codegemm=None)
    with pytest.raises(CheckpointError, match=r"quant_method|not usable"):
        load_model(checkpoint.folder, "cpu")
    assert inspect_folder(checkpoint.folder).problems


@pytest.mark.parametrize("name", ["metadata", "to_dict", "__class__", "__dict__", "to_diff_dict", "from_dict"])
def test_a_field_cannot_take_the_place_of_a_method(make_checkpoint: Callable[..., Any], name: str) -> None:
    checkpoint = make_checkpoint()
    config = json.loads((checkpoint.folder / "config.json").read_text())
    checkpoint.edit_config(quantization_config=config["quantization_config"] | {name: {}})
    with pytest.raises(CheckpointError, match=f"has the field {name}"):
        AutoModelForCausalLM.from_pretrained(checkpoint.folder)


@given(name=st.text(max_size=30) | st.just("x" * 5000) | st.just("~nobody/x") | st.just("\x00"))
def test_names_of_folders(name: str) -> None:
    try:
        assert resolve_folder(f"./{name}/.nowhere").is_dir()
    except BadInput as error:
        assert str(error)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.sampled_from([2**31, 2**63, 10**30, -1, 0, 0.0, 1e300, float("nan"), float("inf")]),
    st.text(max_size=6),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.text(max_size=6), st.integers(0, 3), max_size=2),
)


@pytest.fixture
def folders(make_checkpoint: Callable[..., Any]) -> list[Path]:
    """One of ours, one published, one dense; the dense one without a quantisation."""
    ours, published, dense = (
        make_checkpoint(name="a"),
        make_checkpoint(name="b", published=True),
        make_checkpoint(name="c"),
    )
    dense.tensors = {name: tensor.clone() for name, tensor in dense.dense.state_dict().items()}
    dense.write()
    dense.edit_config(quantization_config=None, codegemm=None)
    return [ours.folder, published.folder, dense.folder]


@settings(max_examples=settings.default.max_examples // 5)
@given(data=st.data())
def test_configs_with_changes(folders: list[Path], data: st.DataObject) -> None:
    """config.json with some field replaced by anything: it loads, or one exception says in words why not."""
    folder = data.draw(st.sampled_from(folders))
    path = folder / "config.json"
    sound = json.loads(path.read_text())
    config = copy.deepcopy(sound)
    for _ in range(data.draw(st.integers(1, 2))):
        inside = config
        block = data.draw(st.sampled_from(["", "", "quantization_config", "codegemm", "rope_parameters"]))
        if isinstance(config.get(block), dict):
            inside = config[block]
        inside[data.draw(st.sampled_from(sorted(inside)) if inside else st.text(max_size=6))] = data.draw(VALUES)
    path.write_text(json.dumps(config))
    try:
        load_model(folder, "cpu")
    except REFUSED as error:
        assert str(error)
    finally:
        path.write_text(json.dumps(sound))
