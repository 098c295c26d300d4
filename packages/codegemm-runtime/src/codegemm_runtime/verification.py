"""A checkpoint's tensors against a model's module tree: names, shapes and dtypes, before any weight is read.

transformers only logs a report when a tensor is missing, and goes on with random weights; here it is an error. Which
module a stored tensor lands in is transformers' own renaming, run over the same list of conversions that it loads with.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from codegemm_kernels.checkpoint import PARTS, CheckpointMetadata, TensorHeader, check_layer, quantized_names
from codegemm_kernels.scheme import CodebookScheme
from codegemm_runtime.linear import CodebookLinear
from codegemm_runtime.replace import find_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLOATS = ("F16", "BF16", "F32", "F64")
_OLD_BUFFERS = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
"""Tensors that older releases of transformers stored and newer ones compute."""


def match_layers(
    model: PreTrainedModel,
    metadata: CheckpointMetadata,
    headers: Mapping[str, TensorHeader],
    conversions: Iterable[Any],
) -> tuple[dict[str, CodebookScheme], list[str]]:
    """Schemes by name in the module tree of every layer stored as codes, and what is wrong with the others.

    `model` still has its dense linears (on the meta device); `conversions` is transformers' list for it.
    """
    schemes: dict[str, CodebookScheme] = {}
    problems: list[str] = []
    # The renaming knows dense names only, so a layer is looked up by the weight that it replaces.
    stored = {f"{name}.weight": name for name in quantized_names(headers)}
    for weight, target in _targets(model, stored, conversions).items():
        name, place = stored[weight], target.name.removesuffix(".weight")
        linear = find_linear(model, place)
        if isinstance(linear, str):
            if not _is_foreign_key(model, name):
                problems.append(f"{name} is stored as codes, but {linear}")
            continue
        scheme = metadata.scheme_of(name)
        faults = check_layer(name, scheme, linear.out_features, linear.in_features, headers)
        problems.extend(faults)
        if not faults:
            schemes[place] = scheme
    return schemes, problems


def match_tensors(model: PreTrainedModel, headers: Mapping[str, TensorHeader], conversions: Iterable[Any]) -> list[str]:
    """Everything wrong between the stored tensors and a model whose quantised layers are in place, a sentence each.

    Parameters need a stored tensor of their shape and kind of dtype, tied ones one of the group. Buffers may be
    missing, since modules compute theirs. A quantised model has no tensor without a place in it; in a dense one, extra
    tensors matter only where they belong to a layer that would drop them.
    """
    targets = _targets(model, headers, conversions)
    state = model.state_dict()
    problems = []
    for key, target in targets.items():
        if target.name not in state:
            problems.extend(_unused(model, key, target.name))
        elif not target.converted:
            wanted = state[target.name]
            problems.extend(_mismatch(key, headers[key], wanted.shape, wanted.is_floating_point()))
    return _missing(model, {target.name for target in targets.values()}) + problems


class _Target(NamedTuple):
    name: str
    """Name in the module tree, or what transformers makes of a name that has no place there."""
    converted: bool
    """Whether the tensor goes through an operation, such as stacking the weights of experts."""


def _targets(model: PreTrainedModel, keys: Iterable[str], conversions: Iterable[Any]) -> dict[str, _Target]:
    """Where transformers would load each stored tensor; the loop of its loader with nothing loaded."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    # Copies, because matching marks a conversion as used and transformers reverses the used ones at save.
    conversions = [copy.deepcopy(conversion) for conversion in conversions]
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
    targets = {}
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if target not in state and key in state:
            target, pattern = rename_source_key(key, [], [], prefix, state)
        targets[key] = _Target(target, pattern is not None)
    return targets


def _mismatch(key: str, header: TensorHeader, shape: Iterable[int], is_float: bool) -> list[str]:
    where = f"{key} in {header.file.name}"
    if header.shape != tuple(shape):
        return [f"{where} has shape {list(header.shape)}, but the model needs {list(shape)}"]
    if is_float != (header.dtype in _FLOATS):
        return [f"{where} is {header.dtype}, but the model needs {'floating point' if is_float else 'integers'}"]
    return []


def _missing(model: PreTrainedModel, found: set[str]) -> list[str]:
    ignored = _any_of(model._keys_to_ignore_on_load_missing)
    groups = _tied_groups(model)
    problems = []
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name in found or groups.get(name, set()) & found or (ignored and ignored.search(name)):
            continue
        if hasattr(model, model.base_model_prefix) and _is_foreign_key(model, name):
            continue  # a task head that this checkpoint was never trained with: transformers says so
        owner = name.removesuffix(".weight")
        unquantised = owner != name and isinstance(find_linear(model, owner), nn.Linear)
        problems.append(f"{name} is missing" + (f", and there are no {owner}.codes" if unquantised else ""))
    return problems


def _tied_groups(model: PreTrainedModel) -> dict[str, set[str]]:
    """For each tied parameter the names one of which is enough."""
    groups: dict[str, set[str]] = {}
    same: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[name] = same.setdefault(id(parameter), set())
        groups[name].add(name)
    for target, source in model.all_tied_weights_keys.items():
        union = groups.get(target, {target}) | groups.get(source, {source})
        for name in union:
            groups[name] = union
    return groups


def _unused(model: PreTrainedModel, key: str, target: str) -> list[str]:
    """The problem with a stored tensor that has no place in the model, if it is one."""
    ignored = _any_of(model._keys_to_ignore_on_load_unexpected)
    if (ignored and ignored.search(target)) or _is_foreign_key(model, key):
        return []
    owner, _, leaf = target.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        module = None
    if isinstance(module, CodebookLinear):
        reason = "that layer has no bias" if leaf == "bias" else f"{owner} is stored as codes"
        return [f"{key} would be ignored: {reason}"]
    if isinstance(module, nn.Linear) and leaf == "bias":
        return [f"{key} would be ignored: that layer has no bias"]
    if leaf in PARTS and isinstance(module, nn.Linear):
        lacking = f"{owner}.codes is missing" if leaf != "codes" else "the layer cannot be loaded"
        return [f"{key} would be ignored: {lacking}"]
    quantised = any(isinstance(each, CodebookLinear) for each in model.modules())
    computed = module is not None and leaf in dict(module.named_buffers(recurse=False))
    if quantised and not computed and not _OLD_BUFFERS.search(key):
        return [f"{key} has no place in a {type(model).__name__}"]
    return []


def _is_foreign_key(model: PreTrainedModel, key: str) -> bool:
    """Whether the stored name `key` belongs to the head of another architecture than that of `model`."""
    if type(model).__name__ in (model.config.architectures or [type(model).__name__]):
        return False
    return not key.startswith(f"{model.base_model_prefix}.")


def _any_of(patterns: Iterable[str] | None) -> re.Pattern[str] | None:
    return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None
