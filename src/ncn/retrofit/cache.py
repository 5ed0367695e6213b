"""The cache of a base with a controller: a transformers cache, on which the controller's own state rides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from ncn.core.cache import Cache
from ncn.hf.cache import put_state, state_of


class BaseCache(Cache):
    """Holds nothing itself but the length: everything is in `base`, which moves the controller's state along."""

    def __init__(self, base: DynamicCache) -> None:
        super().__init__()
        self.base = base

    def real_slots(self) -> Tensor | None:
        """Which of the slots held are no padding, (batch, length); None: all."""
        segments = None if not self.length else state_of(self.base).last("segments", self.length)
        return None if segments is None else segments > 0

    def crop(self, length: int) -> None:
        before = self.length
        super().crop(length)
        if self.length < before:
            if self.length:
                self.base.crop(self.length - before)
            else:
                self.base = DynamicCache()

    def reorder(self, rows: Tensor) -> None:
        self.base.reorder_cache(rows)  # type: ignore[arg-type]

    def repeat(self, times: int) -> None:
        self.base.batch_repeat_interleave(times)

    def forget_first(self, slots: int) -> None:
        for layer in cast("list[Any]", self.base.layers):
            layer.keys, layer.values = (kept[:, :, slots:].clone() for kept in (layer.keys, layer.values))
        state_of(self.base).forget_first(slots)
        self.length -= slots

    @classmethod
    def joined(cls, caches: Sequence[Cache]) -> BaseCache:
        """As in the core; keys and values of padding are zeros."""
        own = cast("Sequence[BaseCache]", caches)
        joined = cls(DynamicCache())
        joined.length = max(cache.length for cache in own)
        for index in range(len(own[0].base.layers)):
            layers = [cast("Any", cache.base.layers[index]) for cache in own]
            keys, values = (
                torch.cat([_padded(getattr(layer, name), joined.length) for layer in layers])
                for name in ("keys", "values")
            )
            joined.base.update(keys, values, index)
        put_state(joined.base, Cache.joined([state_of(cache.base) for cache in own]))
        return joined

    @property
    def nbytes(self) -> int:
        """Bytes of the slots held."""
        layers = cast("list[Any]", self.base.layers)
        return state_of(self.base).nbytes + int(sum(layer.keys.nbytes + layer.values.nbytes for layer in layers))


def _padded(held: Tensor, slots: int) -> Tensor:
    """(batch, heads, slots, width) with zeros in front."""
    return F.pad(held, (0, 0, slots - held.shape[2], 0))
