"""What goes wrong, in two kinds, and how every console script says it."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any


class BadInput(ValueError):
    """The caller gave something that cannot work: the message names it and says what to do. Exit status 2."""


class CheckpointError(BadInput):
    """A checkpoint folder that must not be trusted: the message names the file, the tensor and the fault."""


class NumericalError(ArithmeticError):
    """Values that stopped being finite, with the layer or step they appeared in. Exit status 1."""


def run_command(command: Callable[[], Mapping[str, Any] | None], *, debug: bool = False) -> int:
    """Run a console script: its result is one JSON object on the last line of stdout.

    Returns the exit status: 0, 2 for BadInput, 1 for any other failure, 130 after Ctrl-C. Failures are one
    sentence on stderr; `debug` adds the traceback.
    """
    if not debug:  # transformers' own many-line reports would bury the sentence; read when it is first imported
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        result = command()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # the one place where every failure becomes a sentence and a status
        if debug:
            traceback.print_exc()
        kind = "" if isinstance(error, BadInput | NumericalError) else f"{type(error).__name__}: "
        sentence = " ".join(str(error).split())  # with names from files, which may hold commands to a terminal
        told = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in sentence)
        print(f"error: {kind}{told}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    if result is not None:
        print(json.dumps(result), flush=True)
    return 0
