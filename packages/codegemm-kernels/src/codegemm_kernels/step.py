"""A decode step on the CPU, recorded once and run by one call: what a captured graph is on a GPU.

Every method appends an operation on tensors that stay where they are; `run` does all of them in one parallel region,
reading lengths, tokens and weights as they are then. Like `ops`, this checks all that the compiled code relies on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from codegemm_kernels import _C
from codegemm_kernels.checks import DTYPES, check_input, check_weight
from codegemm_kernels.errors import BadInput

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
"""Numbers of the activations in csrc/cpu/step.h."""
MAX_DENSE_ROWS = 4
"""Rows up to which `Step.dense` waits for memory as F.linear does; from there on F.linear multiplies faster."""


def max_product_rows() -> int:
    """Rows up to which `Step.products` is faster than `ops.gemm`, which then multiplies dequantised weights."""
    rows: int = _C.max_gemm_rows()
    return rows


class Norm(Protocol):
    """RMSNorm: x / rms(x) * (weight + offset), computed in fp32."""

    @property
    def weight(self) -> Tensor:
        """[width], contiguous."""

    @property
    def eps(self) -> float:
        """Added to the mean square."""

    @property
    def offset(self) -> float:
        """Added to the weight."""


@dataclass(frozen=True)
class Cache:
    """Keys and values of one layer, and how attention reads them."""

    keys: Tensor
    """[slots, kv heads, capacity, head dim] in the dtype of the step, or int8; `values` likewise."""
    values: Tensor
    key_scales: Tensor | None
    """[slots, kv heads, capacity] fp32 for int8; `value_scales` likewise."""
    value_scales: Tensor | None
    lengths: Tensor
    """Tokens in each slot before this one, int32 [slots]."""
    cos: Tensor
    """Angles by position, fp32 [capacity or more, pairs]; `sin` likewise."""
    sin: Tensor
    scale: float
    """Of the scores."""
    softcap: float | None = None
    window: int | None = None
    """Keys that a query sees, itself included."""
    q_norm: Norm | None = None
    k_norm: Norm | None = None


class Step:
    """Operations on `rows` rows of one dtype. It keeps the memory of its tensors alive, wherever their owners go."""

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        """Raises BadInput for a dtype without kernels."""
        if dtype not in DTYPES:
            raise BadInput(f"a step runs in float32, float16 or bfloat16, not in {dtype}: cast the model")
        self.rows, self.dtype = rows, dtype
        self._kept: list[Tensor] = []
        self._compiled = _C.Step(threads=torch.get_num_threads())

    def prepare(self) -> None:
        """Read the codebooks again: before the first run, and after they have changed."""
        self._compiled.prepare()

    def run(self) -> None:
        """Run all operations. Raises IndexError for a token that the model does not know, before anything is done."""
        self._compiled.run(threads=torch.get_num_threads())

    def embed(self, table: Tensor, tokens: Tensor, y: Tensor) -> None:
        """y [rows, width] = table [vocabulary, width] at tokens, int64 [rows]."""
        self._compiled.embed(
            table=self._address(table, (table.shape[0], y.shape[-1])),
            tokens=self._address(tokens, (self.rows,), torch.int64),
            y=self._address(y, (self.rows, table.shape[1])),
            rows=self.rows,
            width=table.shape[1],
            vocabulary=table.shape[0],
            dtype=DTYPES[self.dtype],
        )

    def add_norm(
        self, residual: Tensor, branch: Tensor | None, branch_norm: Norm | None, norm: Norm, y: Tensor
    ) -> None:
        """residual += branch (normed if it has a norm); y = residual normed; all [rows, width]."""
        shape = (self.rows, residual.shape[-1])
        self._compiled.add_norm(
            residual=self._address(residual, shape),
            branch=0 if branch is None else self._address(branch, shape),
            branch_norm=self._norm(branch_norm, shape[1]),
            norm=self._norm(norm, shape[1]),
            y=self._address(y, shape),
            rows=self.rows,
            width=shape[1],
            dtype=DTYPES[self.dtype],
        )

    def products(
        self,
        x: Tensor,
        codes: Sequence[Tensor],
        codebooks: Sequence[Tensor],
        scales: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        ys: Sequence[Tensor],
    ) -> None:
        """The products of `ops.gemm`, side by side, from x [rows, K] to ys [rows, N]."""
        matrices = list(zip(codes, codebooks, scales, biases, ys, strict=True))
        if not matrices:
            raise BadInput("a group of products has no matrix: give at least one")
        shapes = [check_weight(*matrix[:3]) for matrix in matrices]
        for (N, K, _), (code, book, _, bias, _) in zip(shapes, matrices, strict=True):
            check_input(x, bias, code, book, N, K)
        self._compiled.products(
            codes=[self._address(each, each.shape, each.dtype) for each in codes],
            codebooks=[self._address(each, each.shape) for each in codebooks],
            scales=[self._address(each, each.shape) for each in scales],
            biases=[0 if each is None else self._address(each, each.shape) for each in biases],
            ys=[self._address(y, (self.rows, N)) for y, (N, _, _) in zip(ys, shapes, strict=True)],
            num_codebooks=[each.shape[0] for each in codebooks],
            vector_length=[each.shape[2] for each in codebooks],
            num_groups=[groups for _, _, groups in shapes],
            out_features=[N for N, _, _ in shapes],
            tiled=[each.dtype == torch.uint8 for each in codes],
            in_features=x.shape[1],
            dtype=DTYPES[self.dtype],
            x=self._rows(x, x.shape[1]),
            rows=self.rows,
        )

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """y [rows, N] = F.linear(x [rows, K], weight [N, K], bias [N]), with sums in fp32."""
        N, K = weight.shape
        self._compiled.dense(
            weight=self._address(weight, (N, K)),
            x=self._rows(x, K),
            bias=0 if bias is None else self._address(bias, (N,)),
            y=self._address(y, (self.rows, N)),
            rows=self.rows,
            out_features=N,
            in_features=K,
            dtype=DTYPES[self.dtype],
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, y: Tensor, cache: Cache) -> None:
        """Norm and rotate q and k, append k and v to the cache, attend: one new token a row, for the first slots.

        q and y [rows, heads * head dim], k and v [rows, kv heads * head dim]. A slot that holds `capacity` tokens or
        more overwrites its last.
        """
        slots, kv_heads, capacity, head_dim = cache.keys.shape
        width, pairs = y.shape[-1], cache.cos.shape[-1]
        heads = width // head_dim
        int8 = cache.key_scales is not None
        fits = slots >= self.rows and heads > 0 and heads % kv_heads == 0 and cache.cos.shape[0] >= capacity
        if not fits or 2 * pairs > head_dim or int8 != (cache.value_scales is not None) or capacity < 1:
            raise BadInput(
                f"a cache {list(cache.keys.shape)} with angles {list(cache.cos.shape)} is none for {self.rows} rows of "
                f"{heads} heads"
            )
        shape, stored = cache.keys.shape, torch.int8 if int8 else self.dtype
        self._compiled.attend(
            q=self._rows(q, heads * head_dim),
            k=self._rows(k, kv_heads * head_dim),
            v=self._rows(v, kv_heads * head_dim),
            y=self._address(y, (self.rows, heads * head_dim)),
            q_norm=self._norm(cache.q_norm, head_dim),
            k_norm=self._norm(cache.k_norm, head_dim),
            cos=self._address(cache.cos, cache.cos.shape, torch.float32),
            sin=self._address(cache.sin, cache.cos.shape, torch.float32),
            keys=self._address(cache.keys, shape, stored),
            values=self._address(cache.values, shape, stored),
            key_scales=self._scales(cache.key_scales, shape),
            value_scales=self._scales(cache.value_scales, shape),
            lengths=self._address(cache.lengths, (self.rows,), torch.int32),
            slots=self.rows,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            pairs=pairs,
            capacity=capacity,
            window=cache.window or 0,
            scale=cache.scale,
            softcap=cache.softcap or 0.0,
            dtype=DTYPES[self.dtype],
        )

    def gate(self, gate: Tensor, up: Tensor, activation: str, y: Tensor) -> None:
        """y = activation(gate) * up, all [rows, width]."""
        if activation not in ACTIVATIONS:
            raise BadInput(f"unknown activation {activation!r}: choose from {', '.join(ACTIVATIONS)}")
        width = y.shape[-1]
        self._compiled.gate(
            gate=self._rows(gate, width),
            up=self._rows(up, width),
            y=self._address(y, (self.rows, width)),
            rows=self.rows,
            width=width,
            activation=ACTIVATIONS[activation],
            dtype=DTYPES[self.dtype],
        )

    def soft_cap(self, x: Tensor, softcap: float) -> None:
        """x [rows, width] = softcap * tanh(x / softcap), in place."""
        address = self._address(x, (self.rows, x.shape[-1]))
        self._compiled.soft_cap(x=address, rows=self.rows, width=x.shape[-1], softcap=softcap, dtype=DTYPES[self.dtype])

    def choose(self, scores: Tensor, tokens: Tensor) -> None:
        """tokens, int64 [rows], = scores.argmax(-1) for scores [rows, width]; the first of several that are equal."""
        self._compiled.choose(
            scores=self._address(scores, (self.rows, scores.shape[-1])),
            tokens=self._address(tokens, (self.rows,), torch.int64),
            rows=self.rows,
            width=scores.shape[-1],
            dtype=DTYPES[self.dtype],
        )

    def _address(self, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> int:
        """Where a contiguous tensor lies, once it is what it must be."""
        dtype = dtype or self.dtype
        if tensor.device.type != "cpu" or tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
            raise BadInput(
                f"a step needs {dtype} {list(shape)} on the CPU here, not {tensor.dtype} {list(tensor.shape)} on "
                f"{tensor.device}"
            )
        if not tensor.is_contiguous() or 0 in tensor.shape:
            raise BadInput(f"a step needs contiguous tensors that are not empty, not strides {tensor.stride()}")
        self._kept.append(tensor.detach())
        return tensor.data_ptr()

    def _rows(self, tensor: Tensor, width: int) -> tuple[int, int]:
        """Where rows [rows, width] of adjacent elements lie, and how far apart."""
        if tensor.dim() != 2 or tensor.shape[0] != self.rows:
            raise BadInput(f"a step of {self.rows} rows was given {list(tensor.shape)}")
        self._address(tensor[0], (width,))
        return tensor.data_ptr(), tensor.stride(0)

    def _norm(self, norm: Norm | None, width: int) -> tuple[int, float, float]:
        return (0, 0.0, 0.0) if norm is None else (self._address(norm.weight, (width,)), norm.eps, norm.offset)

    def _scales(self, scales: Tensor | None, shape: Sequence[int]) -> int:
        return 0 if scales is None else self._address(scales, shape[:3], torch.float32)
