"""A decode step on the CPU as one call of compiled code, recorded once a batch size: `forward.step` without torch.

Layers, norms, attention, gates, head and greedy choice are recorded. Products with more rows than their kernels are
for or with weights whose elements do not lie side by side, and embeddings that do more than look up, stay calls of
torch between recorded parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from codegemm_kernels.step import MAX_DENSE_ROWS, Cache, Step, max_product_rows
from codegemm_runtime.engine.cache import KVCache
from codegemm_runtime.engine.decoder import Decoder, Norm, Product
from codegemm_runtime.linear import CodebookLinear


class RecordedStep:
    """`run` reads `tokens` [batch] and `lengths` [batch]; then `logits` and `best`, their argmax, are the step's."""

    def __init__(self, decoder: Decoder, cache: KVCache, tokens: Tensor, lengths: Tensor) -> None:
        """Raises BadInput for a dtype without kernels."""
        self._decoder, self._cache = decoder, cache
        self._tokens, self._lengths = tokens, lengths
        self._parts: list[Step | Callable[[], object]] = []
        self._buffers: dict[tuple[str, int], Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():  # buffers serve requests of either mode
            self.best = torch.zeros_like(tokens)
            self.logits = self._record()
        self._places = list(_places(decoder))
        self._prepare()

    def refresh(self) -> bool:
        """Take over weights that were changed in place; False if some are elsewhere now and recording must be anew."""
        if self._places != list(_places(self._decoder)):
            return False
        self._prepare()
        return True

    def run(self) -> None:
        """One step of slots 0 .. batch - 1."""
        for part in self._parts:
            if isinstance(part, Step):
                part.run()
            else:
                part()

    def _prepare(self) -> None:
        for part in self._parts:
            if isinstance(part, Step):
                part.prepare()

    def _record(self) -> Tensor:
        """Append all operations of `forward.step`; the logits."""
        decoder = self._decoder
        residual, normed = self._buffer("residual", decoder.hidden), self._buffer("normed", decoder.hidden)
        mixed = self._buffer("mixed", decoder.heads * decoder.head_dim)
        product = self._buffer("gated", decoder.intermediate)
        self._embed(residual)
        branch: Tensor | None = None
        branch_norm: Norm | None = None
        for index, layer in enumerate(decoder.layers):
            self._step().add_norm(residual, branch, branch_norm, layer.before_attention, normed)
            q, k, v = self._product(layer.qkv, normed, "qkv")
            self._step().attend(q, k, v, mixed, self._cache_of(index))
            (branch,) = self._product(layer.output, mixed, "output")
            self._step().add_norm(residual, branch, layer.after_attention, layer.before_mlp, normed)
            gate, up = self._product(layer.gate_up, normed, "gate_up")
            self._step().gate(gate, up, decoder.activation, product)
            (branch,) = self._product(layer.down, product, "down")
            branch_norm = layer.after_mlp
        self._step().add_norm(residual, branch, branch_norm, decoder.final_norm, normed)
        (logits,) = self._product(decoder.head, normed, "logits")
        if decoder.logit_softcap is not None:
            self._step().soft_cap(logits, decoder.logit_softcap)
        self._step().choose(logits, self.best)
        return logits

    def _step(self) -> Step:
        """The recorded part to append to."""
        last = self._parts[-1] if self._parts else None
        if isinstance(last, Step):
            return last
        step = Step(self._tokens.shape[0], self._decoder.dtype)
        self._parts.append(step)
        return step

    def _buffer(self, name: str, width: int) -> Tensor:
        """Memory [batch, width] of this name, the same in every layer."""
        key = (name, width)
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(
                self._tokens.shape[0], width, dtype=self._decoder.dtype, device=self._tokens.device
            )
        return self._buffers[key]

    def _embed(self, residual: Tensor) -> None:
        embedding, tokens = self._decoder.embedding, self._tokens
        plain = type(embedding).forward is nn.Embedding.forward
        if isinstance(embedding, nn.Embedding) and plain and _is_plain(embedding):
            self._step().embed(embedding.weight, tokens, residual)
        else:
            self._parts.append(lambda: residual.copy_(embedding(tokens)))

    def _product(self, product: Product, x: Tensor, name: str) -> list[Tensor]:
        """Append x [batch, K] times the matrices of a product; its outputs, as calling it would return them."""
        linears = product.linears
        ys = [self._buffer(f"{name}{i}", linear.out_features) for i, linear in enumerate(linears)]
        pairs = list(zip(linears, ys, strict=True))
        coded = [(linear, y) for linear, y in pairs if isinstance(linear, CodebookLinear)]
        if coded and x.shape[0] <= max_product_rows() and all(_is_plain(linear) for linear, _ in coded):
            self._step().products(
                x,
                [linear.codes for linear, _ in coded],
                [linear.codebooks for linear, _ in coded],
                [linear.scales for linear, _ in coded],
                [linear.bias for linear, _ in coded],
                [y for _, y in coded],
            )
            pairs = [(linear, y) for linear, y in pairs if not isinstance(linear, CodebookLinear)]
        for linear, y in pairs:
            self._linear(linear, x, y)
        return ys if product.sizes is None else list(ys[0].split(list(product.sizes), dim=-1))

    def _linear(self, linear: nn.Module, x: Tensor, y: Tensor) -> None:
        if isinstance(linear, nn.Linear) and x.shape[0] <= MAX_DENSE_ROWS and _is_plain(linear):
            self._step().dense(x, linear.weight, linear.bias, y)
        else:
            one = Product([linear])
            self._parts.append(lambda: y.copy_(one(x)[0]))

    def _cache_of(self, index: int) -> Cache:
        decoder, cache, layer = self._decoder, self._cache, self._decoder.layers[index]
        return Cache(
            keys=cache.keys[index],
            values=cache.values[index],
            key_scales=cache.key_scales[index] if cache.int8 else None,
            value_scales=cache.value_scales[index] if cache.int8 else None,
            lengths=self._lengths,
            cos=decoder.cos,
            sin=decoder.sin,
            scale=decoder.attention_scale,
            softcap=decoder.attention_softcap,
            window=layer.window,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
        )


def _is_plain(module: nn.Module) -> bool:
    """Whether its parameters are what they seem: memory of their own with elements side by side, not computed."""
    parameters = list(module.parameters(recurse=False))
    memory = all(type(each) is nn.Parameter and each.is_contiguous() for each in parameters)
    return memory and not is_parametrized(module)


def _places(decoder: Decoder) -> Iterator[int]:
    """Where all weights lie."""
    linears = [*decoder.head.linears]
    norms: list[Norm | None] = [decoder.final_norm]
    for layer in decoder.layers:
        for product in (layer.qkv, layer.output, layer.gate_up, layer.down):
            linears += product.linears
        norms += [layer.before_attention, layer.q_norm, layer.k_norm, layer.after_attention, layer.before_mlp]
        norms.append(layer.after_mlp)
    for module in (decoder.embedding, *linears):
        yield from (parameter.data_ptr() for parameter in module.parameters(recurse=False))
    yield from (norm.weight.data_ptr() for norm in norms if norm is not None)
