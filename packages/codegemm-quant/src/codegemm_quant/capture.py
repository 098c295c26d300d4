"""A training step as a CUDA graph: small models spend most of a step on launching its kernels one by one."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor


class CapturedStep:
    """`step(*tensors)` for tensors of always the same shapes, recorded once and replayed.

    Without a GPU, or where it is not worth while, every call just runs the step. On a GPU the first calls run it on
    the stream that records; a step that cannot be recorded (it looks at values on the host, or its shapes depend on
    them, as in a mixture of experts) goes on being run. The step must keep all of its state on the device.
    """

    WARM_UP = 2
    """Calls that are run before the recording, which libraries need for setting themselves up."""

    def __init__(self, step: Callable[..., Tensor], device: torch.device, *, worth_while: bool) -> None:
        self._step = step
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._value = torch.empty(0)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and worth_while else None

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The value of the step, a tensor that the next call overwrites."""
        if self._stream is None:
            return self._step(*tensors)
        self._calls += 1
        if self._graph is None and (self._calls <= self.WARM_UP or not self._record(self._stream, tensors)):
            return self._run_on(self._stream, tensors) if self._stream else self._step(*tensors)
        assert self._graph is not None
        for kept, given in zip(self._inputs, tensors, strict=True):
            kept.copy_(given)
        self._graph.replay()
        return self._value

    def _run_on(self, stream: torch.cuda.Stream, tensors: tuple[Tensor, ...]) -> Tensor:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            value = self._step(*tensors)
        torch.cuda.current_stream().wait_stream(stream)
        return value

    def _record(self, stream: torch.cuda.Stream, tensors: tuple[Tensor, ...]) -> bool:
        """Record the step without running it; False when that is not possible."""
        self._inputs = [tensor.clone() for tensor in tensors]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            # thread_local: NCCL's watchdog thread may ask for its events while this thread records.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._value = self._step(*self._inputs)
        except RuntimeError as error:
            torch.cuda.set_stream(torch.cuda.default_stream())
            self._stream, self._inputs = None, []
            print(f"the step is run kernel by kernel: {str(error).splitlines()[0]}", file=sys.stderr)
            return False
        self._graph = graph
        return True
