"""A conversation with a model, through its chat template or, without one, as plain text that goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from codegemm_kernels.errors import BadInput, CheckpointError, NumericalError
from codegemm_runtime.generation import Generation, Sampling, check_prompt, check_text, generate_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise BadInput when the model was not trained to chat."""
    if not tokenizer.chat_template:
        raise BadInput(
            f"{tokenizer.name_or_path} has no chat template, so it was not trained to chat: give --plain to have the "
            "text of the conversation continued, or use `codegemm-runtime generate`"
        )


@dataclass
class Chat:
    """A conversation. Raises BadInput for a model without a chat template, unless it is `plain`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    max_new_tokens: int
    messages: list[dict[str, str]] = field(default_factory=list)
    """What was said, oldest first, as chat templates take it."""
    plain: bool = False
    """Continue the text of all messages, a line each, instead of using the chat template."""

    def __post_init__(self) -> None:
        if not self.plain:
            check_chat_template(self.tokenizer)

    def answer(self, question: str, write: Callable[[str], object]) -> Generation:
        """Ask and stream the answer; the oldest turns are dropped when the context is full. Ctrl-C ends the answer.

        Raises BadInput when the question is no text or alone does not fit, NumericalError for NaN; the conversation is
        then as before.
        """
        check_text(question, "the question")
        before = list(self.messages)
        self.messages.append({"role": "user", "content": question})
        try:
            ids = self._fitting_ids()
            generation = generate_text(
                self.model, self.tokenizer, ids, self.max_new_tokens, self.sampling, write, keep_on_interrupt=True
            )
        except (BadInput, NumericalError):
            self.messages = before
            raise
        self.messages.append({"role": "assistant", "content": generation.text})
        return generation

    def _fitting_ids(self) -> torch.Tensor:
        while True:
            ids = self._ids()
            try:
                check_prompt(self.model, ids, self.max_new_tokens)
                return ids
            except BadInput:
                turns = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
                if len(turns) < 2:
                    raise
                del self.messages[turns[0] : turns[1]]
                print("(the context is full: the oldest turn is forgotten)", file=sys.stderr)

    def _ids(self) -> torch.Tensor:
        """Token ids [1, length] of the whole conversation."""
        if self.plain:
            text = "\n".join(message["content"] for message in self.messages)
            encoded = self.tokenizer(text, return_tensors="pt")
        else:
            try:
                encoded = self.tokenizer.apply_chat_template(
                    self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            except Exception as error:  # a template is a program of the checkpoint's, run in jinja's sandbox
                name = self.tokenizer.name_or_path
                raise CheckpointError(f"the chat template of {name} fails ({error}): give --plain") from error
        ids: torch.Tensor = encoded["input_ids"]
        return ids
