"""Generating text as a stream: one prompt, or a conversation."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer

from codegemm_kernels.errors import BadInput, NumericalError
from codegemm_runtime.engine.choice import find_engine, request_for
from codegemm_runtime.engine.sampling import Sampling as Sampling

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


class _Stream(TextStreamer):
    """Hands finished pieces of text on and keeps the new tokens and the time of the first."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.tokens: list[int] = []
        self.first_at: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """Receives the prompt once, then one new token at a time."""
        if not self.next_tokens_are_prompt:
            self.first_at = self.first_at or time.perf_counter()
            self.tokens += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receives text that later tokens cannot change any more."""
        if text:
            self.write(text)


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
) -> Generation:
    """Continue `prompt` (text, or token ids [1, length]), handing pieces of text to `write` as they are finished.

    Raises BadInput for an empty prompt or one that leaves no room in the model's context. NumericalError for NaN in the
    first logits. Ctrl-C is passed on, or, with
    `keep_on_interrupt`, ends the generation with what there is.
    """
    if max_new_tokens < 1:
        raise BadInput(f"the number of new tokens must be at least 1, not {max_new_tokens}")
    if isinstance(prompt, str) and not prompt:
        raise BadInput("the prompt is empty: give at least one character")
    ids = tokenizer(prompt, return_tensors="pt").input_ids if isinstance(prompt, str) else prompt
    check_room(model, ids.shape[1], max_new_tokens)
    sampling = sampling or Sampling()
    stream = _Stream(tokenizer, write)
    ids = ids.to(model.device)
    torch.manual_seed(sampling.seed)
    start = time.perf_counter()
    interrupted = False
    try:
        engine = find_engine(model, ids.shape[1] + max_new_tokens)
        if engine is not None:
            stream.put(ids)
            for step in engine.generate(ids.tolist(), request_for(model, sampling, max_new_tokens)):
                stream.put(torch.tensor([token for _, token in step]))
            stream.end()
        else:
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=_generation_config(model, sampling, max_new_tokens),
                streamer=stream,
                logits_processor=LogitsProcessorList([_FirstStepCheck()]),
            )
    except KeyboardInterrupt:
        if not keep_on_interrupt:
            raise
        interrupted = True
        stream.end()
    seconds = time.perf_counter() - start
    text = tokenizer.decode(stream.tokens, skip_special_tokens=True)
    first = float("nan") if stream.first_at is None else stream.first_at - start
    return Generation(text, len(stream.tokens), seconds, first, interrupted)


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens the model was built for, None where its config does not say."""
    length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length


def check_room(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise BadInput unless prompt and answer fit the model's context together."""
    if prompt_tokens == 0:
        raise BadInput("the prompt has no tokens: give some text")
    context = context_length(model)
    if context is not None and prompt_tokens + max_new_tokens > context:
        raise BadInput(
            f"the prompt has {prompt_tokens} tokens and {max_new_tokens} new ones are wanted, but the model's context "
            f"holds {context}: shorten the prompt or ask for fewer tokens"
        )


def _generation_config(model: PreTrainedModel, sampling: Sampling, max_new_tokens: int) -> GenerationConfig:
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


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise BadInput when the model was not trained to chat."""
    if not tokenizer.chat_template:
        raise BadInput(
            f"{tokenizer.name_or_path} has no chat template, so it was not trained to chat: "
            "use `codegemm-runtime generate`"
        )


@dataclass
class Chat:
    """A conversation with a model that has a chat template. Raises BadInput when it has none."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    max_new_tokens: int
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_chat_template(self.tokenizer)

    def answer(self, question: str, write: Callable[[str], object]) -> Generation:
        """Ask and stream the answer; the oldest turns are dropped when the context is full. Ctrl-C ends the answer.

        Raises BadInput when the question alone does not fit.
        """
        self.messages.append({"role": "user", "content": question})
        try:
            ids = self._fitting_ids()
            generation = generate_text(
                self.model, self.tokenizer, ids, self.max_new_tokens, self.sampling, write, keep_on_interrupt=True
            )
        except BadInput:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": generation.text})
        return generation

    def _fitting_ids(self) -> torch.Tensor:
        while True:
            encoded = self.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            ids: torch.Tensor = encoded["input_ids"]
            try:
                check_room(self.model, ids.shape[1], self.max_new_tokens)
                return ids
            except BadInput:
                turns = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
                if len(turns) < 2:
                    raise
                del self.messages[turns[0] : turns[1]]
                print("(the context is full: the oldest turn is forgotten)", file=sys.stderr)
