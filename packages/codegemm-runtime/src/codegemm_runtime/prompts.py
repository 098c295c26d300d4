"""Many prompts at once: reading them, continuing them in batches, one JSON object a prompt."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from codegemm_kernels.errors import BadInput
from codegemm_kernels.untrusted import parse_json, read_utf8
from codegemm_runtime.engine.choice import find_engine, request_for, turn_of
from codegemm_runtime.engine.text import TextStream
from codegemm_runtime.generation import Sampling, check_prompt, check_text, generation_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def read_prompts(source: str) -> list[str]:
    """The prompts of a file, `-` for stdin: one a line, or in a .jsonl file strings or objects with a `prompt`.

    Raises BadInput for a file that cannot be read, a line that is no prompt, and when there are none.
    """
    try:
        text = sys.stdin.read() if source == "-" else read_utf8(Path(source))
    except OSError as error:
        raise BadInput(f"the prompts in {source} cannot be read: {error}") from error
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise BadInput(f"{source} holds no prompts: write one a line")
    if not source.endswith(".jsonl"):
        prompts = [line.removesuffix("\r") for _, line in lines]
    else:
        prompts = [_prompt_of(line, f"line {i} of {source}") for i, line in lines]
    for (i, _), prompt in zip(lines, prompts, strict=True):
        check_text(prompt, f"line {i} of {source}")
    return prompts


def _prompt_of(line: str, where: str) -> str:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise BadInput(f"{where} is not valid JSON ({error})") from error
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise BadInput(f"{where} is neither a string nor an object with a string called prompt")
    return prompt


def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    batch: int,
    stops: Sequence[str] = (),
    answered: int = 0,
) -> Iterator[dict[str, Any]]:
    """Continue every prompt, `batch` at a time; yields {"prompt", "text", "tokens"} for each, in order.

    The first `answered` are left out. A text ends before the first of the strings `stops`. A prompt that cannot be
    continued gives {"prompt", "error"} and stops nobody else.
    """
    if batch < 1 or max_new_tokens < 1:
        raise BadInput(f"the batch ({batch}) and the number of new tokens ({max_new_tokens}) must be at least 1")
    for start in range(answered, len(prompts), batch):
        part = prompts[start : start + batch]
        results: list[dict[str, Any]] = []
        sound: dict[int, list[int]] = {}
        for i, prompt in enumerate(part):
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            try:
                check_prompt(model, ids, max_new_tokens)
                sound[i] = ids[0].tolist()
                results.append({"prompt": prompt})
            except BadInput as error:
                results.append({"prompt": prompt, "error": str(error)})
        # Another seed for each batch: equal prompts of two batches would get equal answers.
        varied = replace(sampling, seed=sampling.seed + start)
        streams = [TextStream(tokenizer, stops) for _ in sound]
        with turn_of(model):
            counts = _continue(model, list(sound.values()), max_new_tokens, varied, streams) if sound else []
        for i, stream, count in zip(sound, streams, counts, strict=True):
            stream.finish()
            results[i] |= {"text": stream.text, "tokens": count}
        yield from results


def count_answered(prompts: Sequence[str], out: Path) -> int:
    """How many of `prompts` an interrupted run has answered in `out`, from which a line cut short is removed.

    Raises BadInput for a file of anything else and for one that cannot be there.
    """
    if out.is_dir() or not out.parent.is_dir():
        raise BadInput(f"{out} cannot be written: name a file in a folder that exists")
    if not out.is_file():  # not there yet, or a device
        return 0
    whole, newline, rest = out.read_bytes().rpartition(b"\n")
    lines = whole.split(b"\n") if newline else []
    starts = [_answer_starts(prompt) for prompt in prompts[: len(lines) + 1]]
    for i, line in enumerate([*lines, rest] if rest else lines):
        cut = i == len(lines)
        if i >= len(starts) or not any(line.startswith(s) or (cut and s.startswith(line)) for s in starts[i]):
            raise BadInput(f"line {i + 1} of {out} is no answer to prompt {i + 1}: choose another --out")
    if rest:
        os.truncate(out, len(whole) + len(newline))
    return len(lines)


def _answer_starts(prompt: str) -> tuple[bytes, bytes]:
    """How the line of an answer to `prompt` begins in `write_answers`, with text or with an error."""
    start = json.dumps({"prompt": prompt}, ensure_ascii=False).removesuffix("}")
    return f'{start}, "text": '.encode(), f'{start}, "error": '.encode()


def write_answers(answers: Iterable[dict[str, Any]], total: int, out: Path | None) -> dict[str, Any]:
    """Append each answer as a JSON line to `out`, or print it, as it comes; returns the totals."""
    failed = tokens = 0
    start = time.perf_counter()
    with (
        out.open("a", encoding="utf-8") if out else nullcontext(sys.stdout) as stream,
        tqdm(total=total, desc="generate", unit="prompt", dynamic_ncols=True) as progress,
    ):
        for answer in answers:
            print(json.dumps(answer, ensure_ascii=False), file=stream, flush=True)
            failed += "error" in answer
            tokens += answer.get("tokens", 0)
            progress.set_postfix(tokens=tokens, failed=failed)
            progress.update()
    seconds = time.perf_counter() - start
    totals = {"prompts": total, "failed": failed, "tokens": tokens, "seconds": seconds}
    return totals | {"tokens_per_second": tokens / seconds, "out": None if out is None else str(out)}


def _continue(
    model: PreTrainedModel, ids: list[list[int]], max_new_tokens: int, sampling: Sampling, streams: list[TextStream]
) -> list[int]:
    """Push the new tokens of each sequence into its stream; returns their numbers, with the one that ended it."""
    counts = [0] * len(ids)
    request = request_for(model, sampling, max_new_tokens)
    engine = find_engine(model, max(map(len, ids)) + max_new_tokens, len(ids))
    if engine is not None:
        for step in engine.generate(ids, request):
            for sequence, token in step:
                streams[sequence].push(token)
                counts[sequence] += 1
                if streams[sequence].stopped:
                    engine.stop(sequence)
        return counts
    config = generation_config(model, sampling, max_new_tokens)
    padding = 0 if config.pad_token_id is None else config.pad_token_id
    width = max(map(len, ids))
    padded = torch.tensor([[padding] * (width - len(each)) + each for each in ids])
    mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in ids])
    torch.manual_seed(sampling.seed)
    out: Tensor = model.generate(
        padded.to(model.device), attention_mask=mask.to(model.device), generation_config=config
    )
    for sequence, tokens in enumerate(out[:, width:].tolist()):
        for token in tokens:
            streams[sequence].push(token)
            counts[sequence] += 1
            if token in request.ends or streams[sequence].stopped:
                break
    return counts
