"""The decode engine: a model, its cache, its captured steps, and the loop that makes tokens."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from codegemm_kernels.errors import BadInput, NumericalError
from codegemm_runtime.engine.cache import KVCache
from codegemm_runtime.engine.decoder import Decoder, read_decoder
from codegemm_runtime.engine.forward import prefill
from codegemm_runtime.engine.memory import check_memory
from codegemm_runtime.engine.sampling import Kind, Sampler, Sampling
from codegemm_runtime.engine.steps import Steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFILL_CHUNK = 2048
"""Prompt tokens read at a time: every chunk decodes all weights, and 2048 rows hide that behind the products."""
_BUCKETS = (1, 2, 4, 8, 16, 32)
LARGEST_BATCH = _BUCKETS[-1]


@dataclass(frozen=True)
class Request:
    """What to make of some prompts."""

    max_new_tokens: int = 128
    """Largest number of new tokens of a sequence."""
    sampling: Sampling = field(default_factory=Sampling)
    """How tokens are chosen."""
    sequences: int = 1
    """Sequences made of each prompt."""
    ends: frozenset[int] = frozenset()
    """Tokens that end a sequence; they are handed out too."""


class Engine:
    """Generates with one model. Sequences of a batch may have prompts of different lengths.

    `batch` sequences of up to `context` tokens, prompt included, are in flight at most; more wait for their turn. On a
    GPU a step is one captured graph a batch size, made at first use. One request at a time: a new one ends the one
    before, whose stream then raises. Raises Unsupported (see `decoder`) for a model it cannot run, BadInput where
    memory will not do.
    """

    def __init__(
        self, model: PreTrainedModel, context: int | None = None, batch: int = 1, int8_cache: bool = False
    ) -> None:
        """`context` None is the model's own. `int8_cache` halves the cache, at a little less accuracy."""
        self.decoder: Decoder = read_decoder(model)
        if context is not None and context < 1:
            raise BadInput(f"the context must hold at least 1 token, not {context}")
        self.context = min(context or self.decoder.context, self.decoder.context)
        if not 1 <= batch <= LARGEST_BATCH:
            raise BadInput(f"the engine runs 1 to {LARGEST_BATCH} sequences at a time, not {batch}")
        self.batch = bucket(batch)
        check_memory(self.decoder, self.batch, self.context, int8_cache, min(PREFILL_CHUNK, self.context))
        self.cache = KVCache(self.decoder, self.batch, self.context, int8_cache)
        self.sampler = Sampler(self.decoder, self.batch)
        self.steps = Steps(self.decoder, self.cache, self.sampler)
        self._stopped: set[int] = set()
        self._request: Request | None = None
        self._lock = threading.Lock()

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], request: Request) -> Iterator[list[tuple[int, int]]]:
        """Continue token lists; yields the (sequence, token) pairs of one step at a time, on a GPU a step late.

        Sequence i * request.sequences + j is the j-th of prompt i. `stop` ends one early, closing the iterator all.
        Raises BadInput for an empty prompt, one that does not fit or a token that is none; NumericalError for NaN in
        the first logits; RuntimeError when another request has begun meanwhile. The engine then takes the next request.
        """
        self._check(prompts, request)
        request = replace(request)  # an object of its own, to tell this request from another that is equal
        with self._lock:
            self._request = request
            self._stopped.clear()
            self.sampler.begin(request.sampling)
        try:
            waiting = [i for i in range(len(prompts)) for _ in range(request.sequences)]
            for start in range(0, len(waiting), self.batch):
                yield from self._run(list(enumerate(waiting))[start : start + self.batch], prompts, request)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            longest = max(map(len, prompts))
            raise BadInput(
                f"the GPU has no memory left for a prompt of {longest} tokens: shorten it, or make the engine with a "
                "smaller context or batch"
            ) from error

    def stop(self, sequence: int) -> None:
        """End a sequence of the running request, because of its text for example."""
        self._stopped.add(sequence)

    def _check(self, prompts: Sequence[Sequence[int]], request: Request) -> None:
        if request.max_new_tokens < 1:
            raise BadInput(f"the number of new tokens must be at least 1, not {request.max_new_tokens}")
        if request.sequences < 1:
            raise BadInput(f"the number of sequences of a prompt must be at least 1, not {request.sequences}")
        for i, prompt in enumerate(prompts):
            which = "the prompt" if len(prompts) == 1 else f"prompt {i + 1}"
            if not prompt:
                raise BadInput(f"{which} has no tokens: give some text")
            if not all(isinstance(token, Integral) for token in prompt):
                raise BadInput(f"{which} holds something else than token numbers: give a list of integers")
            if len(prompt) + request.max_new_tokens > self.context:
                raise BadInput(
                    f"{which} has {len(prompt)} tokens and {request.max_new_tokens} new ones are wanted, but the "
                    f"context holds {self.context}: shorten the prompt or ask for fewer tokens"
                )
            wrong = min(prompt) if min(prompt) < 0 else max(prompt)
            if not 0 <= wrong < self.decoder.vocabulary:
                raise BadInput(
                    f"{which} has the token {wrong}, but the model knows {self.decoder.vocabulary}: "
                    "the tokenizer belongs to another model"
                )

    def _run(
        self, members: list[tuple[int, int]], prompts: Sequence[Sequence[int]], request: Request
    ) -> Iterator[list[tuple[int, int]]]:
        """Sequences (number, prompt) that are in flight together, from prefill to the last token."""
        batch = bucket(len(members))
        kind = request.sampling.kind
        with self._turn(request):
            self._begin(members, prompts, batch, kind)
            pending: deque[Tokens] = deque([Tokens(self.steps.tokens[:batch])])
        alive = {slot: sequence for slot, (sequence, _) in enumerate(members)}
        ahead = self.decoder.device.type == "cuda"
        launched = 1
        while alive:
            # The next step is under way before the last one's tokens are read: the GPU never waits for Python. A CPU
            # would have to finish it first.
            if launched < request.max_new_tokens and (ahead or not pending):
                with self._turn(request):
                    self.steps.advance(batch, kind)
                    pending.append(Tokens(self.steps.tokens[:batch]))
                launched += 1
            if not pending:
                return
            tokens = pending.popleft().read()
            yield [(sequence, tokens[slot]) for slot, sequence in alive.items()]
            alive = {
                slot: sequence
                for slot, sequence in alive.items()
                if tokens[slot] not in request.ends and sequence not in self._stopped
            }

    def _begin(self, members: list[tuple[int, int]], prompts: Sequence[Sequence[int]], batch: int, kind: Kind) -> None:
        """Read the prompts and choose the first tokens. Raises NumericalError for NaN."""
        if kind.penalised:
            self.sampler.forget()
        logits = self._read_prompts(members, prompts, batch, kind.penalised)
        if logits.isnan().any():
            raise NumericalError(
                "the model's logits are NaN: its weights hold NaN or inf, or its dtype overflows; "
                "check the checkpoint or write it again"
            )
        self.steps.feed(self.sampler.choose(logits, kind))

    @contextmanager
    def _turn(self, request: Request) -> Iterator[None]:
        """Keep other threads off the cache, and make the model's GPU current, which is where Triton launches.

        Not across a yield to the caller. Raises RuntimeError when `request` is no longer the one that is run.
        """
        device = self.decoder.device
        with self._lock, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            if self._request is not request:
                raise RuntimeError("another request was begun on this engine: finish one first, or make two engines")
            yield

    def _read_prompts(
        self, members: list[tuple[int, int]], prompts: Sequence[Sequence[int]], batch: int, note: bool
    ) -> Tensor:
        """Prefill every prompt once and copy it to its other sequences; logits [batch, vocabulary]."""
        device = self.decoder.device
        first: dict[int, int] = {}
        rows: list[Tensor] = []
        for slot, (_, i) in enumerate(members):
            tokens = torch.tensor(prompts[i], device=device)
            if i in first:
                self.cache.copy_slot(first[i], slot, len(prompts[i]))
                rows.append(rows[first[i]])
            else:
                first[i] = slot
                rows.append(prefill(self.decoder, self.cache, tokens, slot, PREFILL_CHUNK))
            if note:
                self.sampler.see(slot, tokens)
        spare = batch - len(members)
        self.steps.set_lengths([len(prompts[i]) for _, i in members] + [0] * spare)
        return torch.cat(rows + rows[:1] * spare)


class Tokens:
    """Tokens [batch] on their way to the host; a GPU goes on meanwhile."""

    def __init__(self, tokens: Tensor) -> None:
        if tokens.is_cuda:
            self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._host.copy_(tokens, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        else:
            self._host = tokens.clone()

    def read(self) -> list[int]:
        """Wait for them."""
        if self._host.is_pinned():
            self._done.synchronize()
        tokens: list[int] = self._host.tolist()
        return tokens


def bucket(batch: int) -> int:
    """The smallest batch size with captured steps that holds `batch` sequences."""
    return next(size for size in _BUCKETS if size >= batch)
