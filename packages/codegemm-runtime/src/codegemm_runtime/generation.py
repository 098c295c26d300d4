"""Generating text as a stream."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from codegemm_kernels.errors import BadInput, NumericalError
from codegemm_runtime.engine.choice import find_engine, request_for, turn_of
from codegemm_runtime.engine.sampling import Sampling as Sampling
from codegemm_runtime.engine.text import TextStream

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Generation:
    """What came out and how fast."""

    text: str
    tokens: int
    """New tokens."""
    seconds: float
    """Wall time of the whole call, prompt included."""
    time_to_first_token: float
    """Seconds until the first new token, NaN when there was none."""
    interrupted: bool = False

    def summary(self) -> dict[str, Any]:
        """The JSON object of `codegemm-runtime generate`."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "time_to_first_token": self.time_to_first_token,
        }


class _Stream(BaseStreamer):
    """Hands finished pieces of text on and keeps the new tokens and the time of the first."""

    def __init__(self, text: TextStream, write: Callable[[str], object]) -> None:
        self.text, self.write = text, write
        self.tokens: list[int] = []
        self.first_at: float | None = None
        self._prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        """Receives the prompt once, then one new token at a time."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self.first_at = self.first_at or time.perf_counter()
        for token in value.flatten().tolist():
            self.tokens.append(token)
            self._hand_on(self.text.push(token))

    def end(self) -> None:
        """Hands on what was held back."""
        self._hand_on(self.text.finish())

    def stopped(self, *step: torch.Tensor) -> bool:
        """Whether a stop string came up; a stopping criterion of transformers."""
        return self.text.stopped

    def _hand_on(self, piece: str) -> None:
        if piece:
            self.write(piece)


class _FirstStepCheck(LogitsProcessor):
    """Refuses to make text of NaN; the prompt's own step only, since reading a value back stalls a GPU."""

    def __init__(self) -> None:
        self.done = False

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Pass scores [batch, vocabulary] on as they are. Raises NumericalError for NaN."""
        if not self.done and scores.isnan().any():
            raise NumericalError(
                "the model's logits are NaN: its weights hold NaN or inf, or its dtype overflows; "
                "check the checkpoint or write it again"
            )
        self.done = True
        return scores


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | torch.Tensor,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    write: Callable[[str], object] = lambda text: None,
    keep_on_interrupt: bool = False,
    stops: Sequence[str] = (),
) -> Generation:
    """Continue `prompt` (text, or token ids [1, length]), handing pieces of text to `write` as they are finished.

    Raises BadInput for a prompt that the model cannot take (`check_prompt`) or for which memory does not do,
    NumericalError for NaN in the first logits. Ctrl-C is passed on, or, with `keep_on_interrupt`, ends the generation
    with what there is. The text ends before the first of the strings `stops`.
    """
    if max_new_tokens < 1:
        raise BadInput(f"the number of new tokens must be at least 1, not {max_new_tokens}")
    ids = _ids_of(tokenizer, prompt) if isinstance(prompt, str) else prompt
    check_prompt(model, ids, max_new_tokens)
    sampling = sampling or Sampling()
    stream = _Stream(TextStream(tokenizer, stops), write)
    ids = ids.to(model.device)
    torch.manual_seed(sampling.seed)
    start = time.perf_counter()
    interrupted = False
    try:
        with turn_of(model):
            _stream(model, ids, max_new_tokens, sampling, stream)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise BadInput(
            f"there is no memory left on {model.device} for a prompt of {ids.shape[1]} tokens and {max_new_tokens} new "
            f"ones ({str(error).split('. ')[0]}): shorten them, or load the model with --device auto"
        ) from error
    except KeyboardInterrupt:
        if not keep_on_interrupt:
            raise
        interrupted = True
        stream.end()
    seconds = time.perf_counter() - start
    first = float("nan") if stream.first_at is None else stream.first_at - start
    return Generation(stream.text.text, len(stream.tokens), seconds, first, interrupted)


def _stream(
    model: PreTrainedModel, ids: torch.Tensor, max_new_tokens: int, sampling: Sampling, stream: _Stream
) -> None:
    """Put the prompt ids [1, length] and the new tokens into a stream, by the engine or else by transformers."""
    engine = find_engine(model, ids.shape[1] + max_new_tokens)
    if engine is None:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=generation_config(model, sampling, max_new_tokens),
            streamer=stream,
            logits_processor=LogitsProcessorList([_FirstStepCheck()]),
            stopping_criteria=StoppingCriteriaList([stream.stopped]),
        )
        return
    stream.put(ids)
    for step in engine.generate(ids.tolist(), request_for(model, sampling, max_new_tokens)):
        stream.put(torch.tensor([token for _, token in step]))
        if stream.stopped():
            break
    stream.end()


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens the model was built for, None where its config does not say."""
    length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length


def _ids_of(tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    """Token ids [1, length] of a prompt. Raises BadInput for one that is empty or no text."""
    if not prompt:
        raise BadInput("the prompt is empty: give at least one character")
    check_text(prompt, "the prompt")
    ids: torch.Tensor = tokenizer(prompt, return_tensors="pt").input_ids
    return ids


def check_text(text: str, which: str) -> None:
    """Raise BadInput for half characters, which is what Python makes of bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{which} is not UTF-8 at character {error.start + 1}: convert it") from error


def check_prompt(model: PreTrainedModel, ids: torch.Tensor, max_new_tokens: int) -> None:
    """Raise BadInput unless ids [1, length] are tokens of the model and fit its context together with the answer."""
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.dtype not in (torch.int64, torch.int32):
        raise BadInput(f"the prompt is {ids.dtype} {list(ids.shape)}, but must be integers [1, length]")
    length = ids.shape[1]
    if length == 0:
        raise BadInput("the prompt has no tokens: give some text")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
    if not 0 <= wrong < vocabulary:
        raise BadInput(
            f"the prompt has the token {wrong}, but the model knows {vocabulary}: "
            "the tokenizer belongs to another model"
        )
    context = context_length(model)
    if context is not None and length + max_new_tokens > context:
        raise BadInput(
            f"the prompt has {length} tokens and {max_new_tokens} new ones are wanted, but the model's context "
            f"holds {context}: shorten the prompt or ask for fewer tokens"
        )


def generation_config(model: PreTrainedModel, sampling: Sampling, max_new_tokens: int) -> GenerationConfig:
    """The model's own settings (end and padding tokens above all) with our sampling."""
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    greedy = sampling.temperature == 0
    config.update(
        do_sample=not greedy,
        temperature=1.0 if greedy else sampling.temperature,
        top_p=sampling.top_p if not greedy else 1.0,
        top_k=50 if greedy else sampling.top_k,  # 50 is transformers' neutral default, others warn under greedy
        cache_implementation="static" if _compiles(model) else None,
        max_new_tokens=max_new_tokens,
        max_length=None,
    )
    if sampling.repetition_penalty != 1:
        config.repetition_penalty = sampling.repetition_penalty
    if config.pad_token_id is None:
        end = config.eos_token_id
        config.pad_token_id = end[0] if isinstance(end, list) else end
    return config


def _compiles(model: PreTrainedModel) -> bool:
    """Whether transformers compiles the decoding of this model, which it does with a static cache on one GPU."""
    devices = {parameter.device for parameter in model.parameters()}
    return len(devices) == 1 and model.device.type == "cuda" and bool(getattr(model, "_can_compile_fullgraph", False))
