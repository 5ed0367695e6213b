"""Which positions may see one another: padding and document borders are the same thing, a change of segment.

Every position has the number of its segment, 0 at padding. Positions see one another only within a segment, and a
position's index counts from the beginning of its segment. So a document computes what it computes alone, wherever in a
window it stands, and a padded sequence what it computes without padding. None stands for "one segment, no padding".
"""

from __future__ import annotations

import torch
from torch import Tensor

from ncn.config.model import NCNConfig
from ncn.core.cache import Cache
from ncn.core.types import AttentionMask, Hidden, Segments, TokenIds
from ncn.errors import UserError


def find_segments(
    config: NCNConfig,
    embeddings: Hidden,
    input_ids: TokenIds | None,
    attention_mask: Tensor | None,
    cache: Cache | None,
) -> Segments | None:
    """Which document each position belongs to, 0 at padding; None when all positions are of one."""
    before = cache.last("segments", 1) if cache is not None else None
    separate = not config.cross_documents
    if before is None and not separate and (attention_mask is None or _all_true(attention_mask)):
        return None
    if cache is not None and cache.length and before is None:
        cache.begin_segments(embeddings.shape[0], embeddings.device)
        before = cache.last("segments", 1)
    shape = embeddings.shape[:2]
    first = torch.zeros(shape[0], 1, dtype=torch.long, device=embeddings.device) if before is None else before
    if separate:
        if input_ids is None:
            raise UserError("this model separates documents, and finds them by input_ids, which are missing")
        # a separator begins a document; so does the first real token, whatever it is
        begins = input_ids == config.separator_id
        segments = first.clamp(min=1) + begins.cumsum(1)
    else:
        segments = first.clamp(min=1).expand(shape)
    if attention_mask is not None:
        _check_padding(attention_mask)
        segments = segments * attention_mask
    if cache is not None:
        cache.write("segments", segments)
    return segments


def positions_in_segment(
    segments: Tensor | None, cache: Cache | None, start: int, tokens: int, device: torch.device
) -> Tensor:
    """Index of each position within its segment, so that neither padding nor an earlier document counts."""
    index = torch.arange(tokens, device=device)[None]
    if segments is None:
        return index + start
    before = cache.last("segments", 1) if cache is not None else None
    before = torch.full_like(segments[:, :1], -1) if before is None else before
    begins = torch.cat([before, segments[:, :-1]], 1) != segments
    latest = torch.where(begins, index, -1).cummax(1).values
    held = cache.last("positions", 1) if cache is not None else None
    continued = index if held is None else held + 1 + index
    positions = torch.where(latest < 0, continued, index - latest)
    if cache is not None:
        cache.write("positions", positions)
    return positions


def attention_mask_of(
    segments: Segments | None, cache: Cache | None, start: int, embeddings: Hidden
) -> AttentionMask | None:
    """Which slots each position may read: those before it in its own segment. None where causality says it all.

    On CPU as a term of the scores, 0 or −∞: fused attention would make one of it in every layer.
    """
    tokens, device = embeddings.shape[1], embeddings.device
    if segments is None and (start == 0 or tokens == 1):
        return None
    slots = torch.arange(start + tokens, device=device)
    visible = (slots <= slots[start:, None])[None, None]
    if segments is not None:
        held = segments
        if cache is not None and start:
            earlier = cache.last("segments", start)
            assert earlier is not None
            held = torch.cat([earlier, segments], 1)
        visible = visible & (segments[:, None, :, None] == held[:, None, None, :])
    if device.type != "cpu":
        return visible
    exact = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    return torch.zeros(visible.shape, dtype=exact).masked_fill_(~visible, -torch.inf)


def _check_padding(mask: Tensor) -> None:
    """Padding may stand before or behind a row's tokens; between them it would silently cut the text in two."""
    if not torch.compiler.is_compiling() and (mask[:, 1:] & ~mask[:, :-1]).sum(1).gt(1 - mask[:, 0].long()).any():
        raise UserError("attention_mask has padding between tokens of one row; move it to the row's left or right end")


def _all_true(mask: Tensor) -> bool:
    # Looking would end a compiled graph, and saves only time.
    return not torch.compiler.is_compiling() and bool(mask.all())
