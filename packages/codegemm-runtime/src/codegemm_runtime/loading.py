"""Loading a model and its tokenizer from a folder or the hub: dense, our and published folders alike."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from codegemm_kernels.checkpoint import (
    QUANT_METHOD,
    CheckpointMetadata,
    checkpoint_files,
    quantized_names,
    read_config,
    read_headers,
)
from codegemm_kernels.checksums import SUMS_FILE
from codegemm_kernels.errors import BadInput, CheckpointError
from codegemm_kernels.model_card import CARD_FILE
from codegemm_kernels.untrusted import check_links

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Nothing that could hold a pickle, and nothing from subfolders, where hubs keep second copies in other formats.
COMPANION_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer*", "*.model")
"""Patterns of everything beside the weights."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_model(
    folder: Path | str,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    head_bits: int | None = None,
) -> PreTrainedModel:
    """A causal language model in evaluation mode, checked against its safetensors headers before any weight is read.

    `folder` is a checkpoint folder or a hub name. `device` None takes the GPU when there is one, "auto" spreads the
    model over what is there. `dtype` "auto" is the one of config.json. `head_bits` 8 or 4 rounds a dense output head
    (`rounding.round_head`). Raises BadInput or CheckpointError.
    """
    from codegemm_runtime.rounding import SCHEMES, round_head

    if head_bits is not None and head_bits not in SCHEMES:
        raise BadInput(f"the head can be rounded to {' or '.join(map(str, SCHEMES))} bits, not to {head_bits}")
    folder = resolve_folder(folder)
    target = "auto" if device == "auto" else choose_device(device)
    # Below what can fail at once, since importing transformers takes seconds.
    from transformers import AutoModelForCausalLM

    from codegemm_runtime.hf import register

    register()
    config = model_config(folder)
    headers = read_headers(checkpoint_files(folder))
    if getattr(config, "quantization_config", None) is None:
        _check_dense(folder, config, headers)
    try:
        with _no_loading_bar():
            model = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=dtype, device_map=target, use_safetensors=True, trust_remote_code=False
            )
    except torch.OutOfMemoryError as error:
        size = sum(header.nbytes for header in headers.values()) / 2**30
        raise BadInput(f"{folder} ({size:.1f} GiB) does not fit on {target}: try --device cpu or auto") from error
    except (BadInput, ImportError):
        raise
    except Exception as error:  # a config.json that makes a model, but none that transformers can load
        raise CheckpointError(f"{folder} cannot be loaded by transformers: {error}") from error
    if head_bits is not None:
        round_head(model, head_bits)
    loaded: PreTrainedModel = model
    return loaded


@contextmanager
def _no_loading_bar() -> Iterator[None]:
    """Without transformers' bar, which would be the first thing on every command's stderr."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder or hub name. Raises BadInput when there is none or it is broken."""
    folder = resolve_folder(folder)
    check_links(folder)
    # Without this, transformers makes up an empty tokenizer from config.json.
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise CheckpointError(f"{folder} has no tokenizer: copy the tokenizer files of the original model into it")
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot read
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}") from error
    return tokenizer


def resolve_folder(folder: Path | str) -> Path:
    """`folder` itself when it exists, else a download of the hub model owner/name. Raises BadInput."""
    try:
        path = Path(folder).expanduser()
        there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, no such user, a zero byte
        raise BadInput(f"{str(folder)[:80]!r} is no name of a folder ({error})") from error
    if there:
        if not path.is_dir():
            raise BadInput(f"{path} is a file: give the checkpoint folder that it is in")
        return path
    name = str(folder)
    if not _HUB_NAME.fullmatch(name):
        raise BadInput(
            f"there is no folder {name}: give a checkpoint folder or a hub name with its owner (openai-community/gpt2)"
        )
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = ["*.safetensors", CARD_FILE, SUMS_FILE, *COMPANION_FILES]
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise BadInput(f"{name} is neither a folder here nor a model that can be downloaded ({reason})") from error


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device named, or without a name the GPU when there is one. Raises BadInput for one that is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise BadInput(f"unknown device {device!r}: use cpu, cuda, cuda:0 or auto") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"there is no device {device}: this machine has {torch.cuda.device_count()} CUDA devices")
    if chosen.type not in ("cpu", "cuda"):
        raise BadInput(f"device {device} is not supported: use cpu, cuda, cuda:0 or auto")
    return chosen


def model_config(folder: Path) -> PretrainedConfig:
    """The transformers config of a checkpoint folder; a published folder's `codegemm` block becomes our config.

    Raises CheckpointError when the metadata or the config cannot be understood, BadInput for an AQLM checkpoint.
    """
    from transformers import AutoConfig
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    metadata = CheckpointMetadata.from_config(read_config(folder))
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises about any type for a config.json that makes no sense
        raise CheckpointError(f"{folder / 'config.json'} is not usable: {error}") from error
    quantization = getattr(config, "quantization_config", None)
    if metadata is not None and quantization is None:
        config.quantization_config = metadata.to_quantization_config()
    if metadata is None and quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if method == "aqlm":
            raise BadInput(f"{folder} is an AQLM checkpoint: make it ours with `codegemm-runtime convert {folder} OUT`")
        if not isinstance(method, str) or method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            # transformers itself would warn and go on with random weights.
            raise CheckpointError(f"{folder / 'config.json'} has the unknown quant_method {method!r}: restore it")
    return config


def _check_dense(folder: Path, config: PretrainedConfig, headers: dict[str, Any]) -> None:
    """Raise CheckpointError unless every parameter of a dense model is stored in its shape."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    from codegemm_runtime.hf import raise_problems
    from codegemm_runtime.verification import match_tensors

    codes = quantized_names(headers)
    if codes:
        raise CheckpointError(
            f"{folder} stores {codes[0]} as codes but its config.json has neither a quantization_config of method "
            f"{QUANT_METHOD} nor a codegemm block: restore config.json"
        )
    model = build_on_meta(config)
    raise_problems(match_tensors(model, headers, get_model_conversion_mapping(model)), headers)


def build_on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The dense model of `config` without weights. Raises CheckpointError when the config makes no model."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a bad number in config.json surfaces as any type of error in a model's constructor
        raise CheckpointError(f"config.json makes no causal language model: {error}") from error
    return model
