"""One decode step with the choice of its tokens, captured once a batch size and kind of sampling, then replayed.

On the CPU the compiled operations of a step are recorded instead, once a batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from codegemm_kernels.checks import DTYPES
from codegemm_runtime.engine.cache import KVCache
from codegemm_runtime.engine.decoder import Decoder
from codegemm_runtime.engine.forward import step
from codegemm_runtime.engine.recorded import RecordedStep
from codegemm_runtime.engine.sampling import Kind, Sampler


class Steps:
    """`advance` takes `tokens` [slots] and `lengths` [slots] to the next ones, in place."""

    def __init__(self, decoder: Decoder, cache: KVCache, sampler: Sampler) -> None:
        self._decoder, self._cache, self._sampler = decoder, cache, sampler
        self.tokens = torch.zeros(cache.slots, dtype=torch.long, device=decoder.device)
        self.lengths = torch.zeros(cache.slots, dtype=torch.int32, device=decoder.device)
        self._graphs: dict[tuple[int, Kind], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._recorded: dict[int, RecordedStep] = {}
        self._fresh: set[int] = set()  # batch sizes whose recorded steps know the weights as they are now

    def feed(self, tokens: Tensor) -> None:
        """Set the tokens [batch] that the next step reads. Weights may have changed since the last call."""
        self._fresh.clear()
        self.tokens[: tokens.shape[0]] = tokens

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Set how many tokens each of the first slots holds."""
        self.lengths[: len(lengths)] = torch.tensor(lengths, dtype=torch.int32, device=self.lengths.device)

    def advance(self, batch: int, kind: Kind) -> None:
        """One step of slots 0 .. batch - 1."""
        if self._decoder.device.type != "cuda":
            self._advance_on_cpu(batch, kind)
            return
        key = (batch, kind)
        if key not in self._graphs:
            self._graphs[key] = self._capture(batch, kind)
        self._graphs[key].replay()

    def _advance(self, batch: int, kind: Kind) -> None:
        tokens, lengths = self.tokens[:batch], self.lengths[:batch]
        logits = step(self._decoder, self._cache, tokens, lengths)
        tokens.copy_(self._sampler.choose(logits, kind))
        lengths.add_(1)  # beyond the capacity only in spare slots, and attention stops there

    def _advance_on_cpu(self, batch: int, kind: Kind) -> None:
        if self._decoder.dtype not in DTYPES:
            self._advance(batch, kind)
            return
        tokens, lengths = self.tokens[:batch], self.lengths[:batch]
        if batch not in self._fresh:
            if batch in self._recorded and not self._recorded[batch].refresh():
                self._recorded.clear()  # those of other batch sizes hold weights that are no longer the model's
            if batch not in self._recorded:
                self._recorded[batch] = RecordedStep(self._decoder, self._cache, tokens, lengths)
            self._fresh.add(batch)
        recorded = self._recorded[batch]
        recorded.run()
        tokens.copy_(recorded.best if kind == Kind() else self._sampler.choose(recorded.logits, kind))
        lengths.add_(1)

    def _capture(self, batch: int, kind: Kind) -> torch.cuda.CUDAGraph:
        """Capture a step. A first run outside the graph compiles kernels and makes handles; its traces are undone."""
        before = (self.tokens.clone(), self.lengths.clone(), self._sampler.seen.clone())
        noise = self._sampler.generator.get_state()
        stream = torch.cuda.Stream(self._decoder.device)
        stream.wait_stream(torch.cuda.current_stream(self._decoder.device))
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._sampler.generator)
        with torch.cuda.stream(stream):
            self._advance(batch, kind)
        torch.cuda.current_stream(self._decoder.device).wait_stream(stream)
        # One pool for all graphs: nothing in it outlives a replay.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            self._advance(batch, kind)
        for tensor, old in zip((self.tokens, self.lengths, self._sampler.seen), before, strict=True):
            tensor.copy_(old)
        self._sampler.generator.set_state(noise)
        return graph
