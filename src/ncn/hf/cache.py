"""The core's cache inside a transformers cache, so that one object travels through `generate`.

Keys and values lie where transformers keeps them, in whatever layers it was given (dynamic, static, quantised). All
else that the core remembers (salience, phasic inputs, segments, positions) rides on the first of these layers: its
class is swapped for a subclass that moves this state too when the cache is reordered, cropped, repeated or reset.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import Cache as TransformersCache

from ncn.core.cache import Cache


class HostedCache(Cache):
    """For one forward pass: a core cache whose slots lie in the transformers cache `host`."""

    def __init__(self, host: TransformersCache) -> None:
        super().__init__()
        self._host = host
        self._state = state_of(host)
        self._slots, self.length = self._state._slots, self._state.length

    def write_keys_values(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As in the core; a host that was allocated in advance returns free slots as well, which are left out."""
        end = self.length + keys.shape[1]
        # transformers has heads before slots
        all_keys, all_values = self._host.update(keys.transpose(1, 2), values.transpose(1, 2), layer)
        return all_keys[:, :, :end].transpose(1, 2), all_values[:, :, :end].transpose(1, 2)

    def advance(self, tokens: int) -> None:
        super().advance(tokens)
        self._state.length = self.length


def state_of(host: TransformersCache) -> Cache:
    """The state that rides on a transformers cache, put there if need be."""
    if not host.layers and host.layer_class_to_replicate is not None:
        host.layers.append(host.layer_class_to_replicate())  # as the host itself does at its first update
    layer: Any = host.layers[0]
    if not hasattr(layer, "ncn_state"):
        if host.get_seq_length():
            raise ValueError(
                f"past_key_values holds {int(host.get_seq_length())} tokens that this model has not seen; start with "
                "an empty cache, since keys and values alone do not tell the controller what came before"
            )
        put_state(host, Cache())
    state: Cache = layer.ncn_state
    return state


def put_state(host: TransformersCache, state: Cache) -> None:
    """Let a state ride on a transformers cache that has none."""
    layer: Any = host.layers[0]
    layer.__class__ = _with_state(type(layer))  # type: ignore[arg-type]
    layer.ncn_state = state


@functools.cache
def _with_state(base: type[Any]) -> type[Any]:
    """`base`, a class of cache layers, with the state moving along. A single base keeps the object's layout."""

    class WithState(base):  # type: ignore[misc]
        ncn_state: Cache

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self.ncn_state.reorder(beam_idx)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self.ncn_state.repeat(repeats)

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            rows = indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices
            self.ncn_state.reorder(rows)

        def crop(self, tokens_to_remove: int) -> None:
            super().crop(tokens_to_remove)
            if tokens_to_remove:
                self.ncn_state.crop(tokens_to_remove)

        def reset(self) -> None:
            super().reset()
            self.ncn_state = Cache()

    WithState.__name__ = WithState.__qualname__ = f"{base.__name__}WithState"
    return WithState
