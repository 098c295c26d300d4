"""Registration with transformers the moment it is imported (entry point of the group `torch.backends`).

transformers 5 has no plugin group of its own, and for a quantisation method it does not know it warns and goes on with
random weights. torch calls every entry point of `torch.backends` at the end of `import torch`, so a plain
`from_pretrained`, lm_eval or `transformers serve` works with this package merely installed.

Rules that follow from running inside somebody else's import: no import of transformers, no exception, well under 1 ms.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

REGISTRY = "transformers.quantizers.auto"
_LAST_NAME_IN_REGISTRY = "get_hf_quantizer"


class _RegistryWatcher(MetaPathFinder):
    """Registers as soon as the module that holds transformers' quantiser registry has run."""

    registered = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The registry's own spec with registration appended to its execution; None for every other module."""
        if not fullname.startswith("transformers."):
            return None
        if fullname != REGISTRY:
            # When the registry itself triggered `import torch` it was half-run at installation and could not be
            # wrapped: look again at each later import from transformers.
            self.register_if_ready()
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._append_registration(spec.loader)
        return spec

    def _append_registration(self, loader: Any) -> None:
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            self.register_if_ready()

        # A loader that takes no attributes is left alone: a later import from transformers registers.
        with suppress(AttributeError):
            loader.exec_module = execute_and_register

    def register_if_ready(self) -> None:
        """Register once the registry has run to its end. Never raises."""
        if self.registered or not hasattr(sys.modules.get(REGISTRY), _LAST_NAME_IN_REGISTRY):
            return
        self.registered = True
        try:
            integration = import_module("codegemm_runtime.hf")
            if hasattr(integration, "register"):
                integration.register()
            # Without it, that module is what imported the registry: it is half-run itself and registers at its end.
        except Exception as error:  # an exception here would make `import torch` or `import transformers` fail
            logging.getLogger(__name__).warning(
                "codegemm checkpoints cannot be loaded: registration with transformers failed (%r)", error
            )


def install() -> None:
    """Make transformers know the `codegemm` quantisation method as soon as it is imported. Idempotent."""
    watcher = next((finder for finder in sys.meta_path if isinstance(finder, _RegistryWatcher)), None)
    if watcher is None:
        watcher = _RegistryWatcher()
        sys.meta_path.insert(0, watcher)
    watcher.register_if_ready()
