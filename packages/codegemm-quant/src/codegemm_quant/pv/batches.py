"""Which windows of a text a step trains on, and which are kept for evaluation."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from codegemm_kernels import BadInput
from codegemm_quant.pv.config import TokenizeConfig, TuneConfig
from codegemm_quant.pv.processes import Processes
from codegemm_quant.pv.student import Student
from codegemm_quant.pv.tokens import ABOUT_FILE, TokenCache, tokenize, vocabulary_fingerprint
from codegemm_quant.resampling import chances

HELD_OUT = 16
"""One window in so many is left out of training when there is no other text to evaluate on."""


@dataclass(frozen=True)
class Batches:
    """Windows by number. What a step trains on follows from its number alone, on any number of processes."""

    config: TuneConfig
    text: TokenCache
    training: list[int]
    """Numbers of the windows to train on."""
    judged: TokenCache
    evaluated: list[int]
    """Numbers of the windows to evaluate on, in `judged`."""
    _orders: dict[int, list[int]] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Tells texts apart."""
        ends = torch.cat([self.text.stream[:4096], self.text.stream[-4096:]])
        return sha256(ends.numpy().tobytes() + str(len(self.text.stream)).encode()).hexdigest()[:16]

    def train(self, number: int, processes: Processes) -> Tensor:
        """This process's windows of step `number` (from 1), int64 [windows, tokens].

        The windows of a pass over the text are in an order of its own; a step may reach from one pass into the next.
        """
        count, chosen = len(self.training), []
        for place in self._places(number, processes):
            turn, index = divmod(place, count)
            chosen.append(self.training[self._order(turn)[index]])
        return self.text.windows(chosen, self.config.sequence_length)

    def chances(self, number: int, processes: Processes) -> Tensor:
        """Uniform numbers [windows, 2, tokens] for what `train` gives in the same step."""
        start = self.config.seed * 1_000_003_000_003
        return chances([start + place for place in self._places(number, processes)], self.config.sequence_length)

    def evaluation(self, size: int, processes: Processes) -> Iterator[tuple[Tensor, int]]:
        """Windows to evaluate on, `size` at a time, and how many of them count: all processes get as many batches.

        A batch that does not count repeats the first one.
        """
        pieces = [self.evaluated[start : start + size] for start in range(0, len(self.evaluated), size)]
        rounds = -(-len(pieces) // processes.size)
        for turn in range(rounds):
            index = turn * processes.size + processes.rank
            numbers = pieces[index] if index < len(pieces) else pieces[0]
            yield self.judged.windows(numbers, self.config.sequence_length), len(numbers) * (index < len(pieces))

    def _places(self, number: int, processes: Processes) -> range:
        """Which windows of the endless sequence of passes are this process's in a step."""
        share = self.config.batch_size // processes.size
        first = (number - 1) * self.config.batch_size + processes.rank * share
        return range(first, first + share)

    def _order(self, turn: int) -> list[int]:
        if turn not in self._orders:
            self._orders.clear()
            chance = torch.Generator().manual_seed(self.config.seed * 1_000_003 + turn)
            self._orders[turn] = torch.randperm(len(self.training), generator=chance).tolist()
        return self._orders[turn]


def open_batches(config: TuneConfig, student: Student, work: Path, processes: Processes) -> Batches:
    """The windows of `config.data`, tokenised below `work` unless it is a folder of tokens already.

    Raises BadInput when there is too little text, or its tokens are another tokenizer's.
    """
    length = config.sequence_length
    text = _tokens(config.data, student, work / "tokens", config.resume, processes)
    count = text.count(length)
    if config.eval_data is None:
        judged, evaluated = text, list(range(0, count, HELD_OUT))[: config.eval_windows]
    else:
        judged = _tokens(config.eval_data, student, work / "eval-tokens", config.resume, processes)
        evaluated = list(range(min(judged.count(length), config.eval_windows)))
    left_out = set(evaluated) if config.eval_data is None else set()
    training = [number for number in range(count) if number not in left_out]
    for name, numbers, tokens in (("train", training, text), ("evaluate", evaluated, judged)):
        if not numbers:
            raise BadInput(
                f"{tokens.about['data']} is too short to {name} on: it has {len(tokens.stream)} tokens, and windows "
                f"have {length}; give more text or lower sequence_length"
            )
    return Batches(config, text, training, judged, evaluated)


def _tokens(data: str, student: Student, folder: Path, resume: bool, processes: Processes) -> TokenCache:
    if (Path(data) / ABOUT_FILE).exists():
        folder = Path(data)
    elif processes.leads and not (resume and folder.exists()):
        shutil.rmtree(folder, ignore_errors=True)
        tokenize(TokenizeConfig(data, str(student.folder), str(folder)))
    processes.wait()
    cache = TokenCache.open(folder)
    if cache.about["tokenizer"] != vocabulary_fingerprint(student.tokenizer):
        raise BadInput(f"the tokens in {folder} are another tokenizer's: tokenise with that of {student.folder}")
    return cache
