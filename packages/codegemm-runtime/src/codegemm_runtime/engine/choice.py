"""Engine or transformers: which one a model's text is made by."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from codegemm_runtime.engine.decoder import Unsupported
from codegemm_runtime.engine.engine import LARGEST_BATCH, Engine, Request
from codegemm_runtime.engine.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SMALLEST_CONTEXT = 512
# Settings of a generation_config that a request has, or that say nothing about which token comes next.
_KNOWN_SETTINGS = frozenset(
    {"bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_p", "top_k", "max_length"}
    | {"repetition_penalty", "max_new_tokens", "use_cache", "cache_implementation", "transformers_version"}
    | {"_from_model_config"}
)
_engines: WeakKeyDictionary[PreTrainedModel, tuple[Engine, int]] = WeakKeyDictionary()
_refused: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
_turns: WeakKeyDictionary[PreTrainedModel, threading.RLock] = WeakKeyDictionary()


def turn_of(model: PreTrainedModel) -> threading.RLock:
    """A lock to hold while generating: the engine kept for a model makes one request at a time."""
    return _turns.setdefault(model, threading.RLock())


def find_engine(model: PreTrainedModel, context: int, batch: int = 1) -> Engine | None:
    """An engine for `batch` sequences of up to `context` tokens, kept for the next call; None if transformers must do.

    Says why once a model, on stderr. Raises BadInput where memory will not do.
    """
    try:
        _check_settings(model)
        engine = _engine_of(model, context, batch)
    except Unsupported as reason:
        if _refused.get(model) != str(reason):
            print(f"(generating with transformers: the model {reason})", file=sys.stderr)
            _refused[model] = str(reason)
        return None
    # A rotation that changes with the length keeps the engine below the model's own limit.
    return engine if engine.context >= context else None


def _engine_of(model: PreTrainedModel, context: int, batch: int) -> Engine:
    """The engine kept for `model` if it is large enough, else a new one in its place."""
    batch = min(batch, LARGEST_BATCH)  # more sequences wait for their turn
    # Captured steps hold addresses: a model whose weights moved needs a new engine.
    places = hash(tuple(parameter.data_ptr() for parameter in model.parameters()))
    engine, known = _engines.get(model, (None, 0))
    if engine is not None and known == places and engine.context >= context and engine.batch >= batch:
        return engine
    del engine
    _engines.pop(model, None)  # its cache is freed before the next one is made
    size = _SMALLEST_CONTEXT
    while size < context:
        size *= 2
    engine = Engine(model, size, batch)
    _engines[model] = (engine, places)
    return engine


def request_for(model: PreTrainedModel, sampling: Sampling, max_new_tokens: int) -> Request:
    """A request that ends where the model's generation_config says, and penalises as it says unless `sampling` does."""
    penalty = model.generation_config.repetition_penalty
    if sampling.repetition_penalty == 1 and penalty:
        sampling = replace(sampling, repetition_penalty=penalty)
    ends = model.generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return Request(max_new_tokens, sampling, ends=frozenset(listed))


def _check_settings(model: PreTrainedModel) -> None:
    """Raise Unsupported for a generation_config that changes the choice of tokens in ways the engine has not."""
    settings = model.generation_config.to_diff_dict()
    foreign = sorted(
        key for key, value in settings.items() if value and key not in _KNOWN_SETTINGS and not key.startswith("output_")
    )
    if foreign:
        raise Unsupported(f"sets {foreign[0]} in its generation_config")
