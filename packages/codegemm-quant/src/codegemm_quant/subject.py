"""What a run works on: the dense model, the linears chosen in it, its calibration windows and what it all fits into."""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codegemm_kernels import BadInput, CodebookScheme
from codegemm_quant.blocks import find_blocks, linear_shapes
from codegemm_quant.calibration import calibration_windows
from codegemm_quant.config import Effort, QuantizeConfig
from codegemm_quant.experts import unfuse_experts
from codegemm_quant.frame import place
from codegemm_quant.hidden_states import HiddenStates
from codegemm_quant.loading import check_source, compute_dtype, fingerprint, load_model, load_tokenizer
from codegemm_quant.model_tune import VERSIONS
from codegemm_quant.parallel import Team

MAX_BATCH = 8
MAX_LOGITS = 1 << 27
"""Logits computed at once; longer batches are taken window by window (512 MB in fp32)."""
MAX_ACTIVATIONS = 24 << 30
"""Bytes that the activations of one forward pass through all blocks may take."""
TUNED_WEIGHT = 8
"""Bytes a weight while the whole model is tuned: dense and gradient in bf16, codes, their order, fp32 intermediates."""
TUNED_END = 28
"""Bytes a parameter around the blocks meanwhile: dense in bf16, and in fp32 value, gradient, moments, step, best."""


@dataclass(frozen=True)
class Subject:
    """A dense model and everything that is known before the first block."""

    model: Any
    tokenizer: Any
    prefix: str
    """Name of the list of decoder blocks."""
    blocks: nn.ModuleList
    names: dict[str, tuple[int, int]]
    """Full names of the linears to quantise, with their rows and columns."""
    scheme: CodebookScheme
    schemes: Mapping[str, CodebookScheme]
    """Schemes of the linears that have one of their own."""
    windows: Tensor
    """Token ids [windows, tokens]: this process's share of every batch, batch after batch."""
    batch: int
    """Windows in this process's share of a batch."""
    device: torch.device
    stored: torch.dtype
    compute: torch.dtype
    settings: dict[str, Any]
    """What a resumed run must have in common with the interrupted one."""
    effort: Effort
    out: Path

    @property
    def work_folder(self) -> Path:
        """Where finished blocks are kept."""
        return self.out.with_name(f"{self.out.name}.work")

    def dense_block(self, index: int) -> nn.Module:
        """A copy of a dense block where it is worked on, its experts apart."""
        dense = copy.deepcopy(self.blocks[index]).requires_grad_(False)
        unfuse_experts(dense)
        place(dense, self.device, self.compute)
        return dense

    def linears(self, index: int) -> list[str]:
        """The linears to quantise in one block, by name inside it."""
        start = f"{self.prefix}.{index}."
        return [name.removeprefix(start) for name in self.names if name.startswith(start)]

    def scheme_of(self, name: str) -> CodebookScheme:
        """The scheme of a linear by its full name."""
        return self.schemes.get(name, self.scheme)

    def overrides(self) -> dict[str, CodebookScheme]:
        """The schemes that differ from the model's."""
        return {name: scheme for name, scheme in self.schemes.items() if scheme != self.scheme}

    def bits_per_weight(self) -> float:
        """The mean over everything that is quantised."""
        bits = sum(n * k * self.scheme_of(name).bits_per_weight(n, k) for name, (n, k) in self.names.items())
        return bits / self.weights()

    def weights(self) -> int:
        """How many weights are quantised."""
        return sum(n * k for n, k in self.names.values())

    def hidden_states(self) -> HiddenStates:
        """An empty list of hidden states, in host memory if four such lists would take half of the GPU's."""
        if self.device.type != "cuda":
            return HiddenStates(self.device)
        return HiddenStates(self.device, offload=4 * self._states() > torch.cuda.mem_get_info(self.device)[1] // 2)

    def _states(self) -> int:
        """Bytes of the hidden states of all windows."""
        width = int(self.model.config.get_text_config().hidden_size)
        return self.windows.numel() * width * self.compute.itemsize

    def windows_at_once(self) -> int:
        """How many windows may go through the whole model with their activations kept: a divisor of the batch."""
        length, vocabulary = self.windows.shape[1], int(self.model.config.get_text_config().vocab_size)
        kept = 2 * self.compute.itemsize * sum(n + k for n, k in self.names.values())
        most = min(MAX_LOGITS // (length * vocabulary), MAX_ACTIVATIONS // (length * kept))
        return max(size for size in range(1, self.batch + 1) if self.batch % size == 0 and size <= max(1, most))

    def fits_whole(self) -> bool:
        """Whether the blocks can be tuned together on the device; says so when they cannot."""
        if self.device.type != "cuda":
            return True
        there, inside = torch.cuda.mem_get_info(self.device)[1], {id(p) for p in self.blocks.parameters()}
        ends = sum(p.numel() for p in self.model.parameters() if id(p) not in inside)
        kept = TUNED_WEIGHT * self.weights() + TUNED_END * ends
        if not self.hidden_states().offload:
            kept += (VERSIONS + 1) * self._states()
        needed, small = kept + MAX_ACTIVATIONS, kept < there // 8
        if not small and needed > there:
            print(
                f"the whole model is not tuned: that takes {needed >> 30} GB of the GPU's {there >> 30}",
                file=sys.stderr,
            )
            return False
        return True


def open_subject(config: QuantizeConfig, device: torch.device, team: Team, model: Any, tokenizer: Any) -> Subject:
    """Check and load everything a run needs: first what is cheap, the weights last. Raises BadInput."""
    scheme = CodebookScheme.parse(config.scheme)
    effort = config.effort(device.type)
    if team.leads:
        told = ", ".join(f"{name} {value}" for name, value in asdict(effort).items())
        print(f"on {device}: {told}", file=sys.stderr)
    settings = config.settings() | asdict(effort)
    if model is None:
        check_source(config.model)
        model_config, tokenizer = load_tokenizer(config.model)
        settings["model_files"] = fingerprint(config.model, model_config)
    else:
        if tokenizer is None:
            raise BadInput("a loaded model needs its tokenizer: give both")
        model_config = model.config
        sums = [str(float(parameter.detach().double().sum())) for parameter in model.parameters()]
        settings["model_files"] = sha256("".join(sums).encode()).hexdigest()[:16]
    _check_length(model_config, config.sequence_length)
    windows = calibration_windows(config.data, tokenizer, effort.samples, config.sequence_length, config.seed)
    settings["text"] = sha256(windows.numpy().tobytes()).hexdigest()[:16]
    model = load_model(config.model) if model is None else model
    prefix, blocks = find_blocks(model)
    names = chosen_linears(config, scheme, prefix, blocks)
    batch = batch_size(len(windows), team)
    share = [team.own(part) for part in windows.split(batch)]
    return Subject(
        model=model,
        tokenizer=tokenizer,
        prefix=prefix,
        blocks=blocks,
        names=names,
        scheme=scheme,
        schemes={},
        windows=torch.cat(share),
        batch=batch // team.size,
        device=device,
        stored=model.dtype if model.dtype in (torch.float16, torch.bfloat16) else torch.float16,
        compute=compute_dtype(model.dtype, device),
        settings=settings,
        effort=effort,
        out=Path(config.out),
    )


def chosen_linears(
    config: QuantizeConfig, scheme: CodebookScheme, prefix: str, blocks: nn.ModuleList
) -> dict[str, tuple[int, int]]:
    """Full names and shapes of all linears to quantise. Raises BadInput for none or one the scheme does not fit."""
    names: dict[str, tuple[int, int]] = {}
    for index, block in enumerate(blocks):
        for name, shape in linear_shapes(block, f"{prefix}.{index}", config.skip).items():
            if config.bits is None:
                scheme.check_matrix(*shape, f"{prefix}.{index}.{name}")
            names[f"{prefix}.{index}.{name}"] = shape
    if not names:
        raise BadInput(f"{config.model}: every linear layer is skipped, so there is nothing to quantise")
    return names


def batch_size(windows: int, team: Team) -> int:
    """The largest batch up to 8 (or one window a process) that divides the number of windows: all have one mask."""
    sizes = [size for size in range(team.size, max(MAX_BATCH, team.size) + 1) if size % team.size == 0]
    fitting = [size for size in sizes if windows % size == 0]
    if not fitting:
        raise BadInput(f"{windows} samples cannot be shared among {team.size} processes: use a multiple of it")
    return max(fitting)


def check_out(out: Path) -> None:
    """Raise BadInput when the checkpoint could not be written, before hours go into it."""
    if out.exists():
        raise BadInput(f"{out} exists already: choose another --out or delete it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise BadInput(f"cannot write in {out.parent} ({error.strerror}): choose another --out") from error


def _check_length(model_config: Any, sequence_length: int) -> None:
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise BadInput(f"sequence_length {sequence_length} is more than the {longest} positions the model has")
