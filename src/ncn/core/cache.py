"""The state of decoding: keys and values, salience, phasic inputs and segments, all held by *slot*.

Every entry is a tensor (batch, slots, ...) with one slot for each position processed so far, also the salience state,
which is kept for every position and not only the last (about 2 % of the bytes of keys and values). So whatever is done
to a cache is done to all of it alike: cropping forgets the last slots, reordering picks rows of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from ncn.errors import UserError


class Cache:
    """Slot-wise storage by name, growing as needed. Decoding without padding never copies what is already held."""

    def __init__(self, capacity: int = 0) -> None:
        """`capacity` is the number of slots to allocate at first; a cache grows beyond it by doubling."""
        self.length = 0
        """Slots held before the tokens at hand; `advance` moves it once all layers have written."""
        self._capacity = capacity
        self._slots: dict[str, Tensor] = {}

    def write(self, name: str, new: Tensor) -> Tensor:
        """Put `new` (batch, tokens, ...) behind the slots held; returns all of them: (batch, length + tokens, ...)."""
        end = self.length + new.shape[1]
        buffer = self._slots.get(name)
        if buffer is None or buffer.shape[1] < end:
            self._capacity = max(self._capacity, end if buffer is None else 2 * end)
            grown = new.new_zeros(new.shape[0], self._capacity, *new.shape[2:])
            if buffer is not None:
                grown[:, : self.length] = buffer[:, : self.length]
            self._slots[name] = buffer = grown
        buffer[:, self.length : end] = new
        return buffer[:, :end]

    def write_keys_values(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put a layer's new keys and values (batch, tokens, kv_heads, head_dim) behind those held; all of both."""
        return self.write(f"keys.{layer}", keys), self.write(f"values.{layer}", values)

    def begin_segments(self, batch: int, device: torch.device) -> None:
        """Start the entries of segments and positions late: what is held so far was one document, from position 0."""
        segments = torch.ones(batch, self.length, dtype=torch.long, device=device)
        self._slots |= {"segments": segments, "positions": segments.cumsum(1) - 1}

    def check_batch(self, batch: int) -> None:
        """Raises `UserError` if the cache holds another number of sequences."""
        held = next((len(buffer) for buffer in self._slots.values()), batch)
        if self.length and held != batch:
            raise UserError(
                f"the cache holds {held} sequences and is continued with {batch}; use a cache for each batch"
            )

    def last(self, name: str, count: int) -> Tensor | None:
        """The last `count` slots held under `name` (fewer if there are fewer), or None if there are none."""
        buffer = self._slots.get(name)
        if buffer is None or not self.length:
            return None
        return buffer[:, max(self.length - count, 0) : self.length]

    def advance(self, tokens: int) -> None:
        """Say that `tokens` slots have been written under every name."""
        self.length += tokens

    def crop(self, length: int) -> None:
        """Forget all slots from `length` on; a negative `length` forgets that many of the last ones."""
        length = self.length + length if length < 0 else length
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a cache of {self.length} slots to {length}")
        self.length = length
        if not length:
            self._slots.clear()

    def reorder(self, rows: Int[Tensor, " rows"]) -> None:
        """Replace the batch by its `rows`, which may repeat: the step between two tokens of a beam search."""
        self._slots = {name: buffer.index_select(0, rows.to(buffer.device)) for name, buffer in self._slots.items()}

    def repeat(self, times: int) -> None:
        """Repeat each row of the batch `times` times, copies side by side."""
        self._slots = {name: torch.repeat_interleave(buffer, times, 0) for name, buffer in self._slots.items()}

    def forget_first(self, slots: int) -> None:
        """Forget the first slots, which are padding in every row."""
        self._slots = {name: buffer[:, slots : self.length].clone() for name, buffer in self._slots.items()}
        self.length -= slots

    @classmethod
    def joined(cls, caches: Sequence[Cache]) -> Cache:
        """One cache with the rows of all, their ends side by side. Before a shorter row there is padding."""
        joined = cls()
        joined.length = max(cache.length for cache in caches)
        padded = any(cache.length < joined.length for cache in caches)
        if padded or any("segments" in cache._slots for cache in caches):
            for cache in caches:
                if "segments" not in cache._slots:
                    some = next(iter(cache._slots.values()))
                    cache.begin_segments(len(some), some.device)
        joined._slots = {
            name: torch.cat([_padded(cache._slots[name][:, : cache.length], joined.length) for cache in caches])
            for name in caches[0]._slots
        }
        return joined

    @property
    def nbytes(self) -> int:
        """Bytes of the slots held."""
        return sum(buffer[:, : self.length].nbytes for buffer in self._slots.values())


def _padded(held: Tensor, slots: int) -> Tensor:
    """(batch, slots, ...) with zeros in front: segment 0 is padding, which nothing looks at."""
    return F.pad(held, (0, 0) * (held.ndim - 2) + (slots - held.shape[1], 0))
