"""`transformers serve` on the quantised bundled model, over real HTTP."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("uvicorn", reason="comes with transformers[serving]")

PROMPT = "import unittest\n\n\nclass Test"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(road, tmp_path_factory):
    """The quantised bundled model with a chat template, which a model of Python code has none of."""
    folder = tmp_path_factory.mktemp("serve") / "model"
    shutil.copytree(road["checkpoint"], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """Address of a running server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("home")
    (home / "hub").mkdir()
    command = [Path(sys.executable).parent / "transformers", "serve", folder, "--device", "cpu"]
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    log = home / "log.txt"
    with log.open("w") as stream:
        environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([*command, *options], stdout=stream, stderr=stream, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"{address}/health", timeout=10).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def continuation(folder):
    """What the model says greedily in this process."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def post(address, path, **body):
    request = urllib.request.Request(
        f"{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read().decode()


def chat(folder, **options):
    message = {"role": "user", "content": PROMPT}
    return {"model": str(folder), "messages": [message], "max_tokens": 12, "temperature": 0, **options}


def test_completion(server, folder, continuation):
    body = {"model": str(folder), "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    answer = json.loads(post(server, "/v1/completions", **body))
    assert answer["choices"][0]["text"] == continuation
    assert len(continuation.strip()) > 3


def test_chat_completion(server, folder, continuation):
    answer = json.loads(post(server, "/v1/chat/completions", **chat(folder)))
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": continuation}
    assert answer["usage"]["completion_tokens"] == 12


def test_streamed_chat_completion(server, folder, continuation):
    lines = post(server, "/v1/chat/completions", **chat(folder, stream=True)).splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(pieces) == continuation
    assert sum(map(bool, pieces)) > 3


def test_a_failed_request_leaves_the_server_running(server, folder, continuation):
    with pytest.raises(urllib.error.HTTPError) as failure:
        post(server, "/v1/chat/completions", **chat(folder, messages="no list"))
    assert failure.value.code in (400, 422, 500)
    test_completion(server, folder, continuation)
