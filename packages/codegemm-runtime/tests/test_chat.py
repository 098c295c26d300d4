"""Conversations: history, templates, and Ctrl-C on a real terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from codegemm_kernels import BadInput, NumericalError
from codegemm_runtime import generation, load_model, load_tokenizer
from codegemm_runtime.chat import Chat
from codegemm_runtime.generation import Sampling, generate_text

TEMPLATE = "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}|{% endfor %}"


@pytest.fixture
def loaded(make_checkpoint: Callable[..., Any], write_tokenizer: Callable[..., None]) -> Any:
    checkpoint = make_checkpoint("qwen2")
    write_tokenizer(checkpoint.folder, TEMPLATE)
    model = load_model(checkpoint.folder, "cpu")
    model.generation_config.eos_token_id = None  # random weights may end a text at any time
    return model, load_tokenizer(checkpoint.folder)


def test_chat_remembers_and_forgets_the_oldest(loaded: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = loaded
    chat = Chat(model, tokenizer, Sampling(), 8, [{"role": "system", "content": "S"}])
    seen: list[str] = []
    chat.answer("one", seen.append)
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    assert chat.messages[-1]["content"] == "".join(seen)
    for _ in range(5):
        chat.answer("another", seen.append)
    assert chat.messages[0]["content"] == "S"
    assert chat.messages[1]["content"] == "another"
    assert "forgotten" in capsys.readouterr().err
    before = list(chat.messages)
    with pytest.raises(BadInput, match="holds 64"):
        chat.answer("x" * 80, seen.append)
    assert chat.messages[0] == before[0]
    assert "x" * 80 not in [message["content"] for message in chat.messages]


def test_interrupting_an_answer_keeps_what_was_said(loaded: Any) -> None:
    model, tokenizer = loaded
    chat = Chat(model, tokenizer, Sampling(), 30)
    written: list[str] = []
    original = generation._Stream.put

    def interrupt_after_five(self: Any, value: torch.Tensor) -> None:
        original(self, value)
        if len(self.tokens) == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation._Stream, "put", interrupt_after_five)
        result = chat.answer("hello", written.append)
        assert result.interrupted
        assert (result.tokens, "".join(written)) == (5, result.text)
        assert chat.messages[-1] == {"role": "assistant", "content": result.text}
        with pytest.raises(KeyboardInterrupt):
            generate_text(model, tokenizer, "hello", 30)
    assert not chat.answer("again", written.append).interrupted


def test_model_without_a_chat_template(loaded: Any) -> None:
    model, tokenizer = loaded
    tokenizer.chat_template = None
    with pytest.raises(BadInput, match=r"no chat template.*generate"):
        Chat(model, tokenizer, Sampling(), 8)
    plain = Chat(model, tokenizer, Sampling(), 8, plain=True)
    first = plain.answer("hello", lambda text: None).text
    assert first == generate_text(model, tokenizer, "hello", 8).text
    second = plain.answer("more", lambda text: None).text
    assert second == generate_text(model, tokenizer, f"hello\n{first}\nmore", 8).text


def test_a_failed_answer_leaves_the_conversation_as_it_was(loaded: Any) -> None:
    model, tokenizer = loaded
    chat = Chat(model, tokenizer, Sampling(), 8)
    chat.answer("one", lambda text: None)
    before = list(chat.messages)
    weight = model.get_input_embeddings().weight
    sound = weight.data.clone()
    weight.data.fill_(float("nan"))
    with pytest.raises(NumericalError):
        chat.answer("two", lambda text: None)
    assert chat.messages == before
    weight.data.copy_(sound)
    assert chat.answer("two", lambda text: None).tokens == 8


@pytest.fixture
def terminal(make_checkpoint: Callable[..., Any], write_tokenizer: Callable[..., None]) -> Iterator[Any]:
    """`codegemm-runtime chat` on a pseudo-terminal of its own, with a model that never stops by itself."""
    checkpoint = make_checkpoint(name="long")
    checkpoint.edit_config(max_position_embeddings=100_000)
    settings = checkpoint.folder / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": None}))
    write_tokenizer(checkpoint.folder, TEMPLATE)
    script = "import sys; from codegemm_runtime.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "chat", str(checkpoint.folder), "--device", "cpu"]
    child, descriptor = pty.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores it for what runs behind it
        os.execve(sys.executable, [*command, "--max-new-tokens", "50000"], os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        yield child, descriptor
    finally:
        os.close(descriptor)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def read_until(descriptor: int, pattern: str, seconds: float = 60) -> str:
    """What the terminal shows until `pattern` comes up."""
    shown, end = b"", time.monotonic() + seconds
    while not re.search(pattern, text := shown.decode(errors="replace")):
        assert time.monotonic() < end, text
        if select.select([descriptor], [], [], 0.1)[0]:
            shown += os.read(descriptor, 4096)
    return text


def test_ctrl_c_on_a_terminal(terminal: Any) -> None:
    """It stops an answer, gives up a line, and never ends the program; Ctrl-D does."""
    child, descriptor = terminal
    read_until(descriptor, r"> $")
    for question in (b"hi", b"again"):
        os.write(descriptor, question + b"\n")
        # Well into the answer: among the terminal's own characters, 20 may come before the first token.
        assert "[stopped]" not in read_until(descriptor, r"(?s)hi.{200}|again.{200}")
        os.write(descriptor, b"\x03")
        read_until(descriptor, r"(?s)\[stopped\].*> $")
        os.write(descriptor, b"half a line")
        read_until(descriptor, "half a line$")
        time.sleep(0.5)  # Python misses a signal between the echo and its wait for the next key
        os.write(descriptor, b"\x03")
        read_until(descriptor, r"(?s)Ctrl-D or an empty line ends the chat.*> $")
    os.write(descriptor, b"\x04")
    summary = json.loads(re.findall(r"\{.*\}", read_until(descriptor, r"\}\s*$"))[-1])
    assert summary["turns"] == 2
    assert 0 < summary["tokens"] < 50_000
    ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    assert (ended.si_code, ended.si_status) == (os.CLD_EXITED, 0)
