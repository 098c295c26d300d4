"""A transformers model as the engine sees it: layers of products, norms and attention, found in its module tree.

Nothing is copied: products and norms hold the model's own parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from codegemm_kernels import ops
from codegemm_runtime.linear import CodebookLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2"})
"""Model types whose layers do what `forward.run_layers` does; the tests compare each with transformers."""
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Frequencies of these change with the length of the text beyond the original context, while keys stay as they are.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class Unsupported(Exception):
    """The model is none that the engine can run; the message says what about it, for a sentence that begins with it."""


@dataclass(frozen=True)
class Norm:
    """RMSNorm: x / rms(x) * (weight + offset), computed in fp32."""

    weight: Tensor
    eps: float
    offset: float
    """1 where the stored weight is a difference from 1 (Gemma), else 0."""


class Product:
    """Linear layers with one input: a single launch where they are codes, `F.linear` where they are not."""

    def __init__(self, linears: Sequence[nn.Module], sizes: Sequence[int] | None = None) -> None:
        """`sizes` splits the output of a single layer. Raises Unsupported for a layer that is no plain product."""
        self.sizes = sizes
        self.linears: list[Any] = list(linears)
        for linear in self.linears:
            plain = isinstance(linear, CodebookLinear) or (
                isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
            )
            if not plain:
                raise Unsupported(f"has a {type(linear).__name__} with a behaviour of its own among its linear layers")

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """x [rows, in features] to one [rows, out features] a layer, or a part."""
        first = self.linears[0]
        if len(self.linears) == 1:
            y = self._one(first, x)
            return [y] if self.sizes is None else y.split(list(self.sizes), dim=-1)
        if not all(isinstance(linear, CodebookLinear) for linear in self.linears):
            return [self._one(linear, x) for linear in self.linears]
        ys: list[Tensor] = ops.gemm_grouped(
            x,
            [linear.codes for linear in self.linears],
            [linear.codebooks for linear in self.linears],
            [linear.scales for linear in self.linears],
            [linear.bias for linear in self.linears],
        )
        return ys

    @staticmethod
    def _one(linear: Any, x: Tensor) -> Tensor:
        if isinstance(linear, CodebookLinear):
            y: Tensor = ops.gemm(x, linear.codes, linear.codebooks, linear.scales, linear.bias)
            return y
        return nn.functional.linear(x, linear.weight, linear.bias)


@dataclass(frozen=True)
class Layer:
    """One decoder layer."""

    before_attention: Norm
    qkv: Product
    q_norm: Norm | None
    """Over each head, before rotation (Qwen3)."""
    k_norm: Norm | None
    window: int | None
    """Keys a query sees, itself included; None for all."""
    output: Product
    after_attention: Norm | None
    """Of the branch, before it is added (Gemma2)."""
    before_mlp: Norm
    gate_up: Product
    down: Product
    after_mlp: Norm | None


@dataclass(frozen=True)
class Decoder:
    """All the engine needs of a model."""

    embedding: nn.Module
    layers: list[Layer]
    final_norm: Norm
    head: Product
    heads: int
    kv_heads: int
    head_dim: int
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    activation: str
    """A value of ACTIVATIONS."""
    context: int
    """Tokens the model was built for."""
    vocabulary: int
    hidden: int
    intermediate: int
    cos: Tensor
    """[context, rotated pairs], fp32; `sin` likewise. A pair is elements i and i + pairs of a head."""
    sin: Tensor
    dtype: torch.dtype
    device: torch.device


def read_decoder(model: PreTrainedModel) -> Decoder:
    """Find the parts of `model`. Raises Unsupported for a model that the engine cannot run as transformers would."""
    config = model.config.get_text_config()
    body: Any = model.get_decoder()
    _check_model(model, config, body)
    attention = body.layers[0].self_attn
    kv_heads = config.num_key_value_heads
    heads, head_dim = config.num_attention_heads, attention.head_dim
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    intermediate = config.intermediate_size
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    if name not in ACTIVATIONS:
        raise Unsupported(f"uses the activation {name}, which the engine has not")
    head: Any = model.get_output_embeddings()
    cos, sin, context = _rotation(body.rotary_emb, config, model.device)
    softcap = getattr(config, "attn_logit_softcapping", None)
    return Decoder(
        embedding=body.embed_tokens,
        layers=[_read_layer(layer, config, sizes, intermediate) for layer in body.layers],
        final_norm=_read_norm(body.norm),
        head=Product([head]),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        attention_scale=attention.scaling,
        attention_softcap=softcap,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        activation=ACTIVATIONS[name],
        context=context,
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=intermediate,
        cos=cos,
        sin=sin,
        dtype=body.norm.weight.dtype,
        device=model.device,
    )


def _check_model(model: PreTrainedModel, config: Any, body: Any) -> None:
    """Raise Unsupported for what would come out wrong without a word."""
    if config.model_type not in FAMILIES:
        raise Unsupported(f"is of type {config.model_type}, and the engine knows {', '.join(sorted(FAMILIES))}")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        raise Unsupported(f"is spread over {', '.join(sorted(map(str, devices)))}, and the engine needs one device")
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(dtypes) != 1:
        raise Unsupported(f"mixes {', '.join(sorted(map(str, dtypes)))}, and the engine needs one floating type")
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise Unsupported("has an adapter on it")
    hooked = [name for name, module in body.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    if hooked:
        raise Unsupported(f"has a hook on {hooked[0] or 'its body'}")


def _read_layer(layer: Any, config: Any, sizes: list[int], intermediate: int) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    if hasattr(attention, "qkv_proj"):
        qkv = Product([attention.qkv_proj], sizes)
    else:
        qkv = Product([attention.q_proj, attention.k_proj, attention.v_proj])
    if hasattr(mlp, "gate_up_proj"):
        gate_up = Product([mlp.gate_up_proj], [intermediate, intermediate])
    else:
        gate_up = Product([mlp.gate_proj, mlp.up_proj])
    # Families with two kinds of layers keep the window in the layer, the others in the config.
    window = attention.sliding_window if hasattr(attention, "sliding_window") else _config_window(config)
    four_norms = hasattr(layer, "pre_feedforward_layernorm")
    return Layer(
        before_attention=_read_norm(layer.input_layernorm),
        qkv=qkv,
        q_norm=_read_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        k_norm=_read_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        window=window,
        output=Product([attention.o_proj]),
        after_attention=_read_norm(layer.post_attention_layernorm) if four_norms else None,
        before_mlp=_read_norm(layer.pre_feedforward_layernorm if four_norms else layer.post_attention_layernorm),
        gate_up=gate_up,
        down=Product([mlp.down_proj]),
        after_mlp=_read_norm(layer.post_feedforward_layernorm) if four_norms else None,
    )


def _config_window(config: Any) -> int | None:
    window: int | None = getattr(config, "sliding_window", None)
    return window


def _read_norm(module: Any) -> Norm:
    """A norm that was just made scales by one, so its first weight tells what is added to a stored one."""
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    fresh: Tensor = type(module)(1).weight
    return Norm(module.weight, float(eps), 1.0 - fresh.item())


def _rotation(rotary: Any, config: Any, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Cosines and sines [context, pairs] of the model's own rotary module, so that every scaling is transformers'."""
    parameters = config.rope_parameters
    context: int = config.max_position_embeddings
    if parameters["rope_type"] in _LENGTH_DEPENDENT_ROPE:
        original = parameters.get("original_max_position_embeddings")
        original = original or getattr(config, "original_max_position_embeddings", None)
        context = min(context, original or context)
    positions = torch.arange(context, device=device)[None]
    with torch.no_grad():
        cos, sin = rotary(torch.empty(1, dtype=torch.float32, device=device), positions)
    pairs = cos.shape[-1] // 2
    return cos[0, :, :pairs].contiguous(), sin[0, :, :pairs].contiguous(), context
