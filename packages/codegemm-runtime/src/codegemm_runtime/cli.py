"""The command `codegemm-runtime`: generate, chat, inspect, convert. The only module that needs tyro."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from codegemm_kernels.errors import BadInput, NumericalError, run_command


@dataclass(frozen=True)
class Generate:
    """Continue one prompt, streaming the text to stdout, or many, as JSON lines; the last line is JSON."""

    model: tyro.conf.Positional[str]
    """Checkpoint folder (dense, codegemm or published) or hub name."""
    prompt: str | None = None
    """Text to continue; - reads it from stdin."""
    prompts: str | None = None
    """File of prompts to continue all: one a line, or .jsonl with strings or {"prompt": ...}; - for stdin."""
    out: Path | None = None
    """File for the JSON lines of --prompts, where an interrupted run goes on; default: stdout."""
    batch: int = 8
    """Prompts continued at a time."""
    max_new_tokens: int = 128
    """Largest number of new tokens."""
    temperature: float = 0.0
    """0 takes the most likely token; higher is more varied."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0 for all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that occurred already become less likely."""
    stop: tuple[str, ...] = ()
    """Strings before the first of which a text ends."""
    seed: int = 0
    """Seed of the sampling."""
    device: str | None = None
    """cpu, cuda, cuda:0 or auto; without it the GPU when there is one."""
    head_bits: int | None = None
    """Round a dense output head to 8 or 4 bits: on a CPU it is read as slowly as all layers together."""
    debug: bool = False
    """Show the traceback of a failure."""

    def run(self) -> Mapping[str, Any]:
        """Load, generate and return the JSON object."""
        from codegemm_runtime.loading import load_model, load_tokenizer

        if (self.prompt is None) == (self.prompts is None):
            raise BadInput("give either --prompt TEXT or --prompts FILE")
        if self.out is not None and self.prompts is None:
            raise BadInput("--out needs --prompts")
        prompt = sys.stdin.read().removesuffix("\n") if self.prompt == "-" else self.prompt
        if prompt == "":
            raise BadInput("the prompt is empty: give at least one character")
        tokenizer = load_tokenizer(self.model)
        from codegemm_runtime import prompts
        from codegemm_runtime.generation import Sampling, generate_text

        sampling = Sampling(self.temperature, self.top_p, self.seed, self.top_k, self.repetition_penalty)
        several = [] if self.prompts is None else prompts.read_prompts(self.prompts)
        answered = 0 if self.out is None else prompts.count_answered(several, self.out)
        model = load_model(self.model, self.device, head_bits=self.head_bits)
        if prompt is None:
            answers = prompts.continue_prompts(
                model, tokenizer, several, self.max_new_tokens, sampling, self.batch, self.stop, answered
            )
            return prompts.write_answers(answers, len(several) - answered, self.out)
        generation = generate_text(model, tokenizer, prompt, self.max_new_tokens, sampling, _write, stops=self.stop)
        print(flush=True)
        return generation.summary()


@dataclass(frozen=True)
class Chat:
    """Talk to a model. Ctrl-C stops an answer, Ctrl-D or an empty line ends the program."""

    model: tyro.conf.Positional[str]
    """Checkpoint folder (dense, codegemm or published) or hub name."""
    system: str | None = None
    """System message that opens the conversation."""
    plain: bool = False
    """Without chat template: continue the text of the conversation."""
    max_new_tokens: int = 512
    """Largest number of tokens in an answer."""
    temperature: float = 0.7
    """0 takes the most likely token; higher is more varied."""
    top_p: float = 0.9
    """Sample from the most likely tokens that together have this probability."""
    seed: int = 0
    """Seed of the sampling."""
    device: str | None = None
    """cpu, cuda, cuda:0 or auto; without it the GPU when there is one."""
    head_bits: int | None = None
    """Round a dense output head to 8 or 4 bits: on a CPU it is read as slowly as all layers together."""
    debug: bool = False
    """Show the traceback of a failure."""

    def run(self) -> Mapping[str, Any]:
        """Run the conversation and return the JSON object."""
        from codegemm_runtime.loading import load_model, load_tokenizer

        tokenizer = load_tokenizer(self.model)
        from codegemm_runtime import chat
        from codegemm_runtime.generation import Sampling

        sampling = Sampling(self.temperature, self.top_p, self.seed)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        # The model comes second: a missing template is known before minutes of loading.
        if not self.plain:
            chat.check_chat_template(tokenizer)
        model = load_model(self.model, self.device, head_bits=self.head_bits)
        conversation = chat.Chat(model, tokenizer, sampling, self.max_new_tokens, messages, self.plain)
        turns = tokens = 0
        while question := _ask():
            try:
                answer = conversation.answer(question, _write)
            except (BadInput, NumericalError) as error:
                print(f"error: {error}", file=sys.stderr)
                continue
            print(" [stopped]" if answer.interrupted else "", flush=True)
            turns, tokens = turns + 1, tokens + answer.tokens
        return {"turns": turns, "tokens": tokens}


@dataclass(frozen=True)
class Inspect:
    """Show scheme, bits, bytes and per-layer table of a checkpoint, and what would not load and why."""

    model: tyro.conf.Positional[str]
    """Checkpoint folder or hub name."""
    verify: bool = False
    """Also read every tensor and report NaN and inf."""
    debug: bool = False
    """Show the traceback of a failure."""

    def run(self) -> Mapping[str, Any]:
        """Print the table on stderr and return the JSON object."""
        from codegemm_runtime.inspection import inspect_folder

        inspection = inspect_folder(self.model, self.verify)
        print(inspection.table(), file=sys.stderr)
        return inspection.summary()


@dataclass(frozen=True)
class Convert:
    """Import a published or AQLM checkpoint, or export one of ours as AQLM or as dense weights."""

    source: tyro.conf.Positional[str]
    """Folder or hub name: published, AQLM (Hugging Face format), ours, or published layer checkpoints ({i}.pth)."""
    out: tyro.conf.Positional[Path]
    """Folder to write; must not exist."""
    to: Literal["codegemm", "aqlm", "dense"] = "codegemm"
    """What to write."""
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """What floats are stored in; auto is what the source declares."""
    base: str | None = None
    """For layer checkpoints: the original model, which has the config and the tokenizer."""
    allow_pickle: bool = False
    """Read layer checkpoints, which are pickles, in a process of its own that finds no function but torch's tensors."""
    debug: bool = False
    """Show the traceback of a failure."""

    def run(self) -> Mapping[str, Any]:
        """Convert and return the JSON object."""
        import torch

        from codegemm_runtime.convert.conversion import convert_folder

        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        return convert_folder(self.source, self.out, self.to, dtype, self.base, self.allow_pickle)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _ask() -> str:
    """The next question; empty at the end of input. Ctrl-C gives up the line, not the program."""
    while True:
        try:
            if sys.stdin.isatty() and sys.stdout.isatty():
                import readline  # noqa: F401  (importing it gives input() line editing and a history)

                return input("> ").strip()
            print("> ", end="", file=sys.stderr, flush=True)
            return sys.stdin.readline().strip()
        except EOFError:
            print()
            return ""
        except KeyboardInterrupt:
            print("\n(Ctrl-D or an empty line ends the chat)", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    command: Generate | Chat | Inspect | Convert = tyro.cli(
        Annotated[Generate, tyro.conf.subcommand("generate")]
        | Annotated[Chat, tyro.conf.subcommand("chat")]
        | Annotated[Inspect, tyro.conf.subcommand("inspect")]
        | Annotated[Convert, tyro.conf.subcommand("convert")],
        prog="codegemm-runtime",
        args=arguments,
    )
    status = 0

    def run() -> Mapping[str, Any]:
        nonlocal status
        result = command.run()
        status = 2 if result.get("problems") or result.get("failed") else 0
        return result

    return run_command(run, debug=command.debug) or status
