"""Writing the ready checkpoint: a normal Hugging Face folder, built beside and renamed when it is whole."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from codegemm_kernels import CheckpointMetadata
from codegemm_kernels.checksums import write_checksums
from codegemm_kernels.model_card import CARD_FILE, write_model_card
from codegemm_quant.experts import is_fused


def export_checkpoint(
    model: Any,
    tokenizer: Any,
    tensors: dict[str, Tensor],
    metadata: CheckpointMetadata,
    quantised: list[str],
    dtype: torch.dtype,
    out: Path,
    also: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write `out`: the model's own tensors with `tensors` in the place of those that were quantised or tuned.

    model: the dense transformers model; tensors: by full name; quantised: names of the modules whose `.weight` is
    gone, with all experts of a mixture apart if one is quantised. Floats are stored in `dtype`; `also` writes further
    files. The folder appears under its name only when everything is in it.
    """
    gone = {f"{name}.weight" for name in quantised}
    for name, module in model.named_modules():
        if is_fused(module) and any(linear.startswith(f"{name}.") for linear in quantised):
            gone |= {f"{name}.{part}" for part, _ in module.named_parameters()}
    state = {name: value.detach().cpu() for name, value in model.state_dict().items() if name not in gone}
    state.update(tensors)
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    for tied in tied_names(model):
        state.pop(tied, None)
    building = out.with_name(f".{out.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    try:
        with _lent(model, dtype):
            model.config.quantization_config = metadata.to_quantization_config()
            published = metadata.to_published_block(quantised)
            if published is not None and not any(is_fused(module) for module in model.modules()):
                model.config.codegemm = published
            model.save_pretrained(building, state_dict=state)
        tokenizer.save_pretrained(building)
        also(building)
        source = str(model.config._name_or_path)
        write_model_card(building, out.name, source, hub_card(source))
        write_checksums(building)
        building.replace(out)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {out} ({error}): make room and continue with --resume") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def _lent(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """The model in another dtype, which is what config.json will say, with a config of its own; then as it was."""
    config, tensors = model.config, [(tensor, tensor.data) for tensor in [*model.parameters(), *model.buffers()]]
    model.config = copy.deepcopy(config)
    model.config.dtype = dtype
    model.to(dtype)
    try:
        yield
    finally:
        model.config = config
        for tensor, data in tensors:
            tensor.data = data


def hub_card(source: str) -> str | None:
    """The card of a model on the hub, for its licence; None for a folder, without network, or where there is none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    if not source or Path(source).is_dir():
        return None
    try:
        return Path(hf_hub_download(source, CARD_FILE)).read_text(encoding="utf-8", errors="replace")
    except (OSError, HFValidationError):  # errors of the hub's server and of the network are OSErrors
        return None


def tied_names(model: nn.Module) -> set[str]:
    """Names in the state dict that are another parameter under a second name, such as a tied output head."""
    first: dict[int, str] = {}
    tied = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied.add(name)
    return tied
