"""The engine's tokens against transformers' own generate with dense weights, family by family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from codegemm_kernels import BadInput, NumericalError
from codegemm_runtime import load_model
from codegemm_runtime.engine import Engine, Request, Sampling, Unsupported, memory
from codegemm_runtime.engine.cache import KVCache
from codegemm_runtime.engine.forward import step
from codegemm_runtime.engine.recorded import RecordedStep
from codegemm_runtime.replace import restore_linears
from codegemm_runtime.rounding import round_linear

PROMPTS = [[0, 17, 200, 31, 5, 99, 140, 3], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27]]
SIZES = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 1,
}
ROPE = {"rope_theta": 100.0}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama-bias": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=24),
    "llama3-rope": lambda: transformers.LlamaConfig(
        **SIZES,
        rope_parameters=ROPE
        | {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "linear-rope": lambda: transformers.LlamaConfig(
        **SIZES, rope_parameters=ROPE | {"rope_type": "linear", "factor": 4.0}
    ),
    "yarn-rope": lambda: transformers.Qwen3Config(
        **SIZES,
        head_dim=16,
        rope_parameters=ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "mistral-window": lambda: transformers.MistralConfig(**SIZES, sliding_window=9),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen2-windows": lambda: transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
    "phi3": lambda: transformers.Phi3Config(**SIZES, bos_token_id=0, eos_token_id=1, sliding_window=11),
    "phi3-partial": lambda: transformers.Phi3Config(
        **SIZES,
        bos_token_id=0,
        eos_token_id=1,
        rope_parameters=ROPE | {"rope_type": "default", "partial_rotary_factor": 0.5},
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES,
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=3.0,
        tie_word_embeddings=False,
    ),
}


def dense(name: str, device: str = "cpu") -> Any:
    """A random model whose biases and norms are random too, so that a forgotten one shows."""
    torch.manual_seed(0)
    # Not sdpa: with it, transformers 5.17 forgets the soft-capping of Gemma2.
    model = transformers.AutoModelForCausalLM.from_config(
        CONFIGS[name](), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
        if "q_proj" in key or "qkv_proj" in key:
            parameter.data *= 3  # scores large enough for soft-capping and rotation to show
    model.generation_config.eos_token_id = None
    return model.to(device)


def tokens_of(engine: Engine, prompts: list[list[int]], request: Request) -> list[list[int]]:
    """All tokens of all sequences."""
    made: list[list[int]] = [[] for _ in range(len(prompts) * request.sequences)]
    for one_step in engine.generate(prompts, request):
        for sequence, token in one_step:
            made[sequence].append(token)
    return made


def expected(model: Any, prompt: list[int], count: int, **options: Any) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None, **options
    )
    tokens: list[int] = made[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_transformers(name: str, device: str) -> None:
    model = dense(name, device)
    engine = Engine(model, batch=3)
    made = tokens_of(engine, PROMPTS, Request(30))
    assert made == [expected(model, prompt, 30) for prompt in PROMPTS]
    assert len({token for tokens in made for token in tokens}) > 10  # not one token over and over


def test_codes_give_the_tokens_of_the_dense_weights(make_checkpoint: Callable[..., Any], device: str) -> None:
    for architecture in ("llama", "qwen3"):
        checkpoint = make_checkpoint(architecture, name=architecture)
        model = load_model(checkpoint.folder, device)
        made = tokens_of(Engine(model, batch=2), PROMPTS, Request(20))  # three sequences, two at a time
        restore_linears(model)
        assert made == [expected(model, prompt, 20) for prompt in PROMPTS]


def test_a_prompt_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from codegemm_runtime.engine import engine as module

    monkeypatch.setattr(module, "PREFILL_CHUNK", 5)
    for name in ("llama-tied", "mistral-window", "gemma2"):
        model = dense(name)
        assert tokens_of(Engine(model), PROMPTS[2:], Request(12)) == [expected(model, PROMPTS[2], 12)]


def test_int8_cache_stays_close() -> None:
    model = dense("llama-tied")
    exact, rounded = Engine(model), Engine(model, int8_cache=True)
    assert rounded.cache.keys.dtype == torch.int8
    logits = []
    for engine in (exact, rounded):
        tokens = tokens_of(engine, PROMPTS[2:], Request(2))
        engine.steps.feed(torch.tensor([9]))
        logits.append(step(engine.decoder, engine.cache, engine.steps.tokens[:1], engine.steps.lengths[:1]))
        assert len(tokens[0]) == 2
    error = (logits[0] - logits[1]).norm() / logits[0].norm()
    assert 0 < error < 0.03  # entries are rounded to 1/254 of the largest of 24


def test_several_sequences_of_a_prompt_share_its_reading() -> None:
    engine = Engine(dense("llama-tied"), batch=4)
    greedy = tokens_of(engine, PROMPTS[:2], Request(10, sequences=2))
    assert greedy[0] == greedy[1] != greedy[2] == greedy[3]
    sampling = Sampling(temperature=1.5, seed=3)
    sampled = tokens_of(engine, PROMPTS[:1], Request(10, sampling, sequences=3))
    assert len({tuple(tokens) for tokens in sampled}) == 3
    assert sampled == tokens_of(engine, PROMPTS[:1], Request(10, sampling, sequences=3))
    many = tokens_of(engine, PROMPTS[:1], Request(10, sampling, sequences=9))  # in three rounds
    assert len({tuple(tokens) for tokens in many}) == 9


def with_some_codes(model: Any) -> Any:
    """Codes in the place of every other linear layer, so that products of both kinds meet in a group."""
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for name in names[::2]:
        packed = round_linear(model.get_submodule(name), 8)
        packed.tile()
        model.set_submodule(name, packed)
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    ("dtype", "int8", "batch"),
    [(torch.float32, False, 1), (torch.float32, True, 2), (torch.bfloat16, False, 2), (torch.float16, False, 7)],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_recorded_step_is_that_of_torch(name: str, dtype: torch.dtype, int8: bool, batch: int) -> None:
    """Slots of several lengths, one of them beyond the capacity, as spare ones get there."""
    decoder = Engine(with_some_codes(dense(name).to(dtype))).decoder
    caches = [KVCache(decoder, 8, 40, int8) for _ in range(2)]
    for entries in ("keys", "values"):
        one, other = (getattr(cache, entries) for cache in caches)
        other.copy_(one.random_(-127, 128) if int8 else one.normal_())
    for cache in caches:
        cache.key_scales.fill_(0.01)
        cache.value_scales.fill_(0.01)
    tokens = torch.randint(0, decoder.vocabulary, (batch,))
    lengths = torch.tensor([13, 47, 0, 39, 2, 30, 21][:batch], dtype=torch.int32)
    recorded = RecordedStep(decoder, caches[0], tokens, lengths)
    recorded.run()
    expected = step(decoder, caches[1], tokens, lengths)
    tolerance = 2e-2 if int8 else {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    assert (recorded.logits - expected).norm() < tolerance * expected.norm()
    assert torch.equal(recorded.best, recorded.logits.argmax(-1))
    for one, other in zip(*(cache.read(1, slice(0, batch), 40) for cache in caches), strict=True):
        assert (one - other).norm() < tolerance * other.norm()


def test_a_recorded_step_sees_weights_that_change() -> None:
    model = with_some_codes(dense("qwen3"))
    computed = model.model.layers[1].mlp.gate_proj  # its weight is another tensor at every use
    torch.nn.utils.parametrize.register_parametrization(computed, "weight", torch.nn.Identity())
    engine = Engine(model)
    for change in (
        lambda: computed.parametrizations.weight.original.mul_(-1),
        lambda: model.model.layers[0].self_attn.q_proj.codebooks.mul_(-1),  # codes, read when a request begins
        lambda: model.model.layers[1].self_attn.k_norm.weight.mul_(-1),
        lambda: replace_weight(model.model.layers[2].mlp.up_proj, torch.randn(96, 64) / 4),
        lambda: replace_weight(model.model.layers[0].mlp.up_proj, torch.randn(64, 96).t() / 4),  # torch multiplies it
    ):
        before = tokens_of(engine, PROMPTS[:1], Request(12))
        change()
        after = tokens_of(engine, PROMPTS[:1], Request(12))
        assert after != before
        assert after == tokens_of(Engine(model), PROMPTS[:1], Request(12))


def test_a_recorded_step_serves_either_mode_and_any_default_device() -> None:
    model = with_some_codes(dense("gemma2"))  # its embedding stays a call of torch between recorded parts
    engine = Engine(model, batch=4)
    with torch.inference_mode(), torch.device("meta"):
        first = tokens_of(engine, PROMPTS[:1], Request(6))
    assert tokens_of(engine, PROMPTS[:1], Request(6)) == first == tokens_of(Engine(model), PROMPTS[:1], Request(6))


def replace_weight(linear: torch.nn.Linear, weight: torch.Tensor) -> None:
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)


@pytest.mark.parametrize("name", ["llama-bias", "qwen3", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_half_precision_are_close(name: str, dtype: torch.dtype, device: str) -> None:
    model = dense(name, device).to(dtype)
    engine = Engine(model)
    first, second = tokens_of(engine, PROMPTS[2:], Request(2))[0]
    ids = torch.tensor([[*PROMPTS[2], first]], device=device)
    exact = dense(name, device)(ids).logits[0, -1]
    theirs = model(ids).logits[0, -1].float()
    engine.steps.feed(torch.tensor([first], device=device))
    engine.steps.set_lengths([len(PROMPTS[2])])
    with torch.no_grad():
        ours = step(engine.decoder, engine.cache, engine.steps.tokens[:1], engine.steps.lengths[:1])[0].float()
    assert second == int(ours.argmax())
    assert (ours - exact).norm() < 1.3 * (theirs - exact).norm() + 1e-3 * exact.norm()


def test_repetition_penalty_is_that_of_transformers() -> None:
    model = dense("qwen2")
    request = Request(20, Sampling(repetition_penalty=1.4))
    made = tokens_of(Engine(model, batch=2), PROMPTS[:2], request)
    assert made == [expected(model, prompt, 20, repetition_penalty=1.4) for prompt in PROMPTS[:2]]


def test_a_sequence_ends_at_its_token_and_others_go_on() -> None:
    engine = Engine(dense("llama-bias"), batch=2)
    whole = tokens_of(engine, PROMPTS[:2], Request(20))
    end = whole[0][4]
    made = tokens_of(engine, PROMPTS[:2], Request(20, ends=frozenset({end})))
    assert made[0] == whole[0][: whole[0].index(end) + 1]
    assert made[1] == (whole[1][: whole[1].index(end) + 1] if end in whole[1] else whole[1])
    steps = engine.generate(PROMPTS[:2], Request(20))
    assert len(next(steps)) == 2
    engine.stop(1)
    assert [sequence for sequence, _ in next(steps)] == [0]


@pytest.mark.parametrize(
    ("prompts", "request_", "message"),
    [
        ([[]], Request(4), "the prompt has no tokens"),
        ([[1], [2] * 60], Request(5), "prompt 2 has 60 tokens and 5 new ones .* holds 64"),
        ([[1, 258]], Request(4), "token 258, but the model knows 258"),
        ([[1]], Request(0), "at least 1, not 0"),
        ([[1]], Request(4, sequences=0), "at least 1, not 0"),
    ],
)
def test_a_refused_request_leaves_the_engine_working(prompts: list[list[int]], request_: Request, message: str) -> None:
    engine = Engine(dense("qwen3"))
    before = tokens_of(engine, PROMPTS[:1], Request(5))
    with pytest.raises(BadInput, match=message):
        tokens_of(engine, prompts, request_)
    assert tokens_of(engine, PROMPTS[:1], Request(5)) == before


def test_no_tokens_are_made_of_nan() -> None:
    model = dense("qwen3")
    engine = Engine(model)
    kept = model.get_input_embeddings().weight.data[7].clone()
    model.get_input_embeddings().weight.data[7] = float("nan")
    with pytest.raises(NumericalError, match="logits are NaN"):
        tokens_of(engine, [[3, 7]], Request(5))
    model.get_input_embeddings().weight.data[7] = kept
    assert tokens_of(engine, [[3, 7]], Request(5)) == [expected(model, [3, 7], 5)]


def test_memory_is_asked_for_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense("qwen3")
    monkeypatch.setattr(memory, "free_memory", lambda device: 1 << 20)
    with pytest.raises(BadInput, match=r"32 sequences of 64 tokens need .* GiB .* 0.0 GiB are free"):
        Engine(model, batch=32)
    with pytest.raises(BadInput, match="1 to 32 sequences"):
        Engine(model, batch=33)
    with pytest.raises(BadInput, match="at least 1 token, not -1"):
        Engine(model, context=-1)


def test_models_that_are_refused(make_checkpoint: Callable[..., Any]) -> None:
    with pytest.raises(Unsupported, match="is of type opt"):
        Engine(load_model(make_checkpoint("opt").folder, "cpu"))
    model = dense("qwen2")
    model.model.layers[1].mlp.register_forward_hook(lambda *arguments: None)
    with pytest.raises(Unsupported, match=r"hook on layers\.1\.mlp"):
        Engine(model)
    model = dense("qwen2")
    model.model.norm.half()
    with pytest.raises(Unsupported, match=r"mixes torch\.float16, torch\.float32"):
        Engine(model)
    model = dense("qwen2")
    model.config.hidden_act = "relu"
    with pytest.raises(Unsupported, match="activation relu"):
        Engine(model)


def test_rotation_that_depends_on_the_length_keeps_to_its_first_context() -> None:
    factors = [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    config = transformers.Phi3Config(
        **SIZES | {"max_position_embeddings": 128},
        bos_token_id=0,
        eos_token_id=1,
        original_max_position_embeddings=32,
        rope_parameters=ROPE
        | {
            "rope_type": "longrope",
            "short_factor": [1.5] * 8,
            "long_factor": factors,
            "original_max_position_embeddings": 32,
        },
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    engine = Engine(model)
    assert engine.context == 32
    assert tokens_of(engine, PROMPTS[:1], Request(20)) == [expected(model, PROMPTS[0], 20)]
