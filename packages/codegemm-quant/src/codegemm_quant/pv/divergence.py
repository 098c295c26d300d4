"""What tuning lowers: the divergence of the student's predictions from the dense model's, or its loss on the text.

The output head and the softmax are taken for a chunk of tokens at a time and computed again in the backward pass, so
that never more than a chunk's logits are in memory.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from codegemm_kernels import BadInput
from codegemm_quant.blocks import find_blocks
from codegemm_quant.pv.processes import Processes
from codegemm_quant.resampling import predicted, resampled

MAX_LOGITS = 1 << 27
"""Logits in a chunk: 512 MB in fp32, of which the loss holds about five copies."""

_LOGIT_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Settings of models that do more than multiply by the head."""


class Teacher:
    """The dense model. Its blocks are sharded over the processes; embedding, last norm and head are in each of them."""

    def __init__(self, model: Any, processes: Processes) -> None:
        self.model = model.requires_grad_(False).eval()
        if processes.mesh is not None:
            base, blocks = model.base_model, find_blocks(model)[1]
            for block in blocks:
                fully_shard(block, mesh=processes.mesh)
            inside = {id(parameter) for parameter in blocks.parameters()}
            ends = {parameter for parameter in model.parameters() if id(parameter) not in inside}
            fully_shard(base, mesh=processes.mesh, ignored_params=ends)
            for parameter in ends:
                parameter.data = parameter.data.to(processes.device)
        model.to(processes.device)

    @torch.no_grad()
    def hidden(self, tokens: Tensor) -> Tensor:
        """Last hidden states [batch, tokens, hidden] for token ids [batch, tokens]."""
        return last_hidden(self.model, tokens)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, vocabulary]."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits

    @torch.no_grad()
    def resampled(self, tokens: Tensor, chances: Tensor, share: float) -> Tensor:
        """Token ids [batch, tokens], a share of them replaced by the model's own; chances [batch, 2, tokens]."""
        which, where = chances.to(tokens.device).unbind(1)
        hidden = self.hidden(tokens).flatten(0, 1)
        chunk = max(1, MAX_LOGITS // self.model.config.get_text_config().vocab_size)
        pieces = zip(hidden.split(chunk), which.flatten().split(chunk), strict=True)
        guesses = torch.cat([predicted(self.logits(some), chance) for some, chance in pieces])
        return resampled(tokens, guesses.view_as(tokens), where, share)


class Learner(nn.Module):
    """The student and its loss as one module: its parameters are gathered once for both."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, teacher: Teacher | None) -> Tensor:
        """Token ids [batch, tokens] -> fp32 [2]: mean divergence from the teacher and mean loss on the text, in nats.

        The divergence is KL(teacher || student) over all positions, without a teacher 0; the loss on the text is over
        all tokens but each window's first.
        """
        hidden = last_hidden(self.model, tokens).flatten(0, 1)
        expected = None if teacher is None else teacher.hidden(tokens).flatten(0, 1)
        following = functional.pad(tokens[:, 1:], (0, 1), value=-1).flatten()
        head = self.model.get_output_embeddings()

        def sums(some: Tensor, reference: Tensor | None, targets: Tensor) -> Tensor:
            actual = head(some).float().log_softmax(-1)
            picked = actual.gather(1, targets.clamp_min(0)[:, None])[:, 0]
            nll = -torch.where(targets >= 0, picked, 0.0).sum()
            if reference is None or teacher is None:
                return torch.stack([torch.zeros_like(nll), nll])
            target = teacher.logits(reference).float().log_softmax(-1)
            return torch.stack([functional.kl_div(actual, target, reduction="sum", log_target=True), nll])

        chunk = max(1, MAX_LOGITS // head.weight.shape[0])
        total = torch.zeros(2, device=tokens.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            pieces = (hidden[part], None if expected is None else expected[part], following[part])
            if len(hidden) <= chunk or not torch.is_grad_enabled():
                total = total + sums(*pieces)
            else:
                total = total + checkpoint(sums, *pieces, use_reentrant=False)
        batch, length = tokens.shape
        return total / torch.tensor([batch * length, batch * (length - 1)], device=tokens.device)


def last_hidden(model: Any, tokens: Tensor) -> Tensor:
    """What the output head of a causal model is given, [batch, tokens, hidden]."""
    hidden: Tensor = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """Matrix products in bf16 from fp32 weights; nothing where products are computed in fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def check_model(model: Any) -> None:
    """Raise BadInput for a model whose predictions are not its head times its last hidden states."""
    config = model.config.get_text_config()
    for name in _LOGIT_CHANGES:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise BadInput(f"{type(model).__name__} changes its logits after the head ({name}): it cannot be tuned")


def check_pair(student: Any, teacher: Any) -> None:
    """Raise BadInput for models whose predictions cannot be compared, naming the difference."""
    check_model(teacher)
    ours, theirs = (int(model.config.get_text_config().vocab_size) for model in (student, teacher))
    if ours != theirs:
        raise BadInput(
            f"the quantised model knows {ours} tokens and the teacher {theirs}: give the dense model it was made from"
        )
