"""The cache: slots by name that grow, are cropped, reordered and repeated together."""

import pytest
import torch
from torch import Tensor

from ncn.core.cache import Cache


def numbers(batch: int, tokens: int, start: int = 0) -> Tensor:
    return (torch.arange(start, start + tokens) + 100 * torch.arange(batch)[:, None])[..., None].float()


def filled(tokens: int = 5, batch: int = 2, capacity: int = 0) -> Cache:
    cache = Cache(capacity)
    cache.write("a", numbers(batch, tokens))
    cache.write("b", -numbers(batch, tokens))
    cache.advance(tokens)
    return cache


@pytest.mark.parametrize("capacity", [0, 3, 100])
@pytest.mark.parametrize("pieces", [(1,) * 20, (7, 1, 1, 11), (20,)])
def test_writing_appends_and_returns_all(capacity: int, pieces: tuple[int, ...]) -> None:
    cache = Cache(capacity)
    for piece in pieces:
        start = cache.length
        held = cache.write("a", numbers(2, piece, start))
        assert torch.equal(held, numbers(2, start + piece))
        cache.advance(piece)
    assert cache.length == 20


def test_within_its_capacity_a_cache_does_not_copy() -> None:
    cache = Cache(64)
    places = set()
    for step in range(64):
        places.add(cache.write("a", numbers(1, 1, step)).data_ptr())
        cache.advance(1)
    assert len(places) == 1


def test_beyond_its_capacity_a_cache_copies_seldom() -> None:
    cache, copies, place = Cache(), -1, 0
    for step in range(1000):
        new = cache.write("a", numbers(1, 1, step)).data_ptr()
        copies, place = copies + (new != place), new
        cache.advance(1)
    assert copies <= 12


def test_the_last_slots() -> None:
    cache = filled(5)
    assert torch.equal(cache.last("a", 2), numbers(2, 2, 3))
    assert torch.equal(cache.last("a", 9), numbers(2, 5))
    assert cache.last("c", 1) is None
    assert Cache().last("a", 1) is None


def test_the_last_slots_are_those_before_the_tokens_at_hand() -> None:
    cache = filled(5)
    cache.write("a", numbers(2, 3, 50))
    assert torch.equal(cache.last("a", 1), numbers(2, 1, 4))
    cache.advance(3)
    assert torch.equal(cache.last("a", 1), numbers(2, 1, 52))


@pytest.mark.parametrize(("asked", "left"), [(3, 3), (-2, 3), (5, 5), (0, 0), (-5, 0)])
def test_cropping(asked: int, left: int) -> None:
    cache = filled(5)
    cache.crop(asked)
    assert cache.length == left
    assert torch.equal(cache.write("a", numbers(2, 1, 70)), torch.cat([numbers(2, left), numbers(2, 1, 70)], 1))


@pytest.mark.parametrize("asked", [6, -6])
def test_cropping_to_more_than_there_is(asked: int) -> None:
    cache = filled(5)
    with pytest.raises(ValueError, match="cannot crop a cache of 5 slots"):
        cache.crop(asked)
    assert cache.length == 5


def test_an_emptied_cache_takes_another_batch_size() -> None:
    cache = filled(5, batch=2)
    cache.crop(0)
    assert torch.equal(cache.write("a", numbers(3, 4)), numbers(3, 4))


def test_reordering_and_repeating_move_everything() -> None:
    cache = filled(5)
    cache.reorder(torch.tensor([1, 1, 0]))
    assert torch.equal(cache.last("a", 5), numbers(2, 5)[[1, 1, 0]])
    assert torch.equal(cache.last("b", 5), -numbers(2, 5)[[1, 1, 0]])
    cache.repeat(2)
    assert torch.equal(cache.last("b", 5), -numbers(2, 5)[[1, 1, 1, 1, 0, 0]])
    assert cache.length == 5


def test_copies_after_repeating_are_independent() -> None:
    cache = filled(5, capacity=10)
    cache.repeat(2)
    cache.write("a", torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1))
    cache.advance(1)
    assert cache.last("a", 1).flatten().tolist() == [1, 2, 3, 4]


def test_bytes_count_what_is_held() -> None:
    cache = filled(5, capacity=50)
    assert cache.nbytes == 2 * 2 * 5 * 4
    cache.crop(2)
    assert cache.nbytes == 2 * 2 * 2 * 4
    assert Cache(50).nbytes == 0


def test_caches_are_joined_with_their_ends_side_by_side() -> None:
    long, short = Cache(capacity=9), Cache()
    for cache, rows, tokens in ((long, 2, 5), (short, 1, 2)):
        cache.write("keys.0", torch.arange(rows * tokens * 3.0).view(rows, tokens, 3) + 1)
        cache.advance(tokens)
    joined = Cache.joined([long, short])
    keys, segments, positions = (joined.last(name, 5) for name in ("keys.0", "segments", "positions"))
    assert joined.length == 5
    assert torch.equal(keys[:2], long.last("keys.0", 5))
    assert torch.equal(keys[2, 3:], short.last("keys.0", 2)[0])
    assert not keys[2, :3].any()
    assert segments.tolist() == [[1] * 5, [1] * 5, [0, 0, 0, 1, 1]]  # 0 is padding
    assert positions[2, 3:].tolist() == [0, 1]
    joined.reorder(torch.tensor([2]))
    joined.forget_first(3)
    assert joined.length == 2
    assert torch.equal(joined.last("keys.0", 9), short.last("keys.0", 2))
    joined.write("keys.0", torch.zeros(1, 4, 3))
    assert torch.equal(joined.last("keys.0", 2), short.last("keys.0", 2))


def test_caches_of_one_length_are_joined_without_padding() -> None:
    caches = [Cache(), Cache()]
    for number, cache in enumerate(caches):
        cache.write("values.0", torch.full((1, 3, 2), float(number)))
        cache.advance(3)
    joined = Cache.joined(caches)
    assert joined.last("values.0", 3)[:, :, 0].tolist() == [[0.0] * 3, [1.0] * 3]
    assert joined.last("segments", 1) is None
