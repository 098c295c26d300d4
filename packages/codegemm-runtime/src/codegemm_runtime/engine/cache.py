"""Keys and values of the sequences in flight, allocated once."""

from __future__ import annotations

import torch
from torch import Tensor

from codegemm_runtime.engine.decoder import Decoder

MAX_SPLITS = 32
"""Parts that the keys of one sequence and head are read in at most; more would cost more to combine than they save."""
_PROGRAMS = 264  # two for each multiprocessor of a large GPU


def splits_for(batch: int, kv_heads: int) -> int:
    """Parts in which a batch's keys are read: a power of two that fills the GPU."""
    splits = 1
    while splits < MAX_SPLITS and 2 * splits * batch * kv_heads <= _PROGRAMS:
        splits *= 2
    return splits


class KVCache:
    """`keys` and `values` [layers, slots, kv heads, capacity, head dim] in the model's dtype, or int8 with scales.

    int8 entries carry one fp32 scale a token and head, `key_scales` and `value_scales` [layers, slots, kv heads,
    capacity]. A slot is the place of one sequence.
    """

    def __init__(self, decoder: Decoder, slots: int, capacity: int, int8: bool = False) -> None:
        self.slots, self.capacity, self.int8 = slots, capacity, int8
        self.dtype = decoder.dtype
        rows = (len(decoder.layers), slots, decoder.kv_heads, capacity)
        dtype = torch.int8 if int8 else decoder.dtype
        # Zeros, since what lies beyond a sequence is multiplied by a probability of 0, and 0 * NaN is NaN.
        self.keys = torch.zeros((*rows, decoder.head_dim), dtype=dtype, device=decoder.device)
        self.values = torch.zeros((*rows, decoder.head_dim), dtype=dtype, device=decoder.device)
        self.key_scales = self.value_scales = torch.empty(0, device=decoder.device)
        if int8:
            self.key_scales = torch.zeros(rows, device=decoder.device)
            self.value_scales = torch.zeros(rows, device=decoder.device)
        # Where the parts of one product meet: sums [.., head dim], maximum and weight, and a count of parts done.
        parts = max(batch * splits_for(batch, decoder.kv_heads) for batch in range(1, slots + 1)) * decoder.heads
        self.partial = torch.empty(parts, decoder.head_dim, device=decoder.device)
        self.weights = torch.empty(parts, 2, device=decoder.device)
        self.arrived = torch.zeros(slots * decoder.kv_heads, dtype=torch.int32, device=decoder.device)

    @staticmethod
    def nbytes(decoder: Decoder, slots: int, capacity: int, int8: bool = False) -> int:
        """Bytes that a cache of this size takes."""
        entry = decoder.head_dim + 4 if int8 else decoder.head_dim * decoder.dtype.itemsize
        return 2 * len(decoder.layers) * slots * decoder.kv_heads * capacity * entry

    def write(self, layer: int, slots: Tensor | int, positions: Tensor | slice, keys: Tensor, values: Tensor) -> None:
        """Store entries [..., kv heads, head dim] at slots and positions, which index together."""
        pairs = ((self.keys, self.key_scales, keys), (self.values, self.value_scales, values))
        for stored, scales, entries in pairs:
            if not self.int8:
                _at(stored[layer], slots, positions, entries)
                continue
            scale = (entries.float().abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)
            codes = torch.floor(entries.float() / scale + 0.5).to(torch.int8)
            _at(stored[layer], slots, positions, codes)
            _at(scales[layer], slots, positions, scale[..., 0])

    def read(self, layer: int, slots: slice, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` keys and values of slots, [slots, kv heads, length, head dim] in the model's dtype."""
        keys, values = self.keys[layer, slots, :, :length], self.values[layer, slots, :, :length]
        if not self.int8:
            return keys, values
        key_scales, value_scales = (t[layer, slots, :, :length, None] for t in (self.key_scales, self.value_scales))
        return (keys * key_scales).to(self.dtype), (values * value_scales).to(self.dtype)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Make the first `length` entries of one slot those of another."""
        for tensor in (self.keys, self.values, self.key_scales, self.value_scales):
            if tensor.numel():
                tensor[:, target, :, :length] = tensor[:, source, :, :length]


def _at(stored: Tensor, slots: Tensor | int, positions: Tensor | slice, entries: Tensor) -> None:
    """stored [slots, kv heads, capacity, ...] with the position last among the indices."""
    if isinstance(positions, slice):
        stored[slots, :, positions] = entries.transpose(0, 1)
    else:
        stored[slots, :, positions] = entries
