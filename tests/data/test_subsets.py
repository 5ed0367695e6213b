"""Chosen documents as a dataset of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ncn.data import subsets
from ncn.data.dataset import TokenDataset
from ncn.data.prepare import prepare
from ncn.data.subsets import stretches, subset
from ncn.errors import UserError
from tiny import stories


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """Documents of two tasks."""
    folder = tmp_path_factory.mktemp("whole")
    for name, text in (("a", stories(0, 6_000)), ("b", stories(9_000, 14_000))):
        (folder / f"{name}.txt").write_text(text, "utf-8")
    sources = [str(folder / "a.txt"), str(folder / "b.txt")]
    prepare(sources, folder / "data", vocab_size=300, tasks=["first", "second"], progress=False)
    return TokenDataset.open(folder / "data")


def test_documents_become_stretches() -> None:
    assert stretches([(0, 5), (5, 9), (12, 13)]) == [(0, 9), (12, 13)]
    assert stretches([]) == []


def test_the_bounds_of_documents_cover_the_stream(whole: TokenDataset) -> None:
    bounds = whole.document_bounds()
    assert (bounds[0][0], bounds[-1][1], len(bounds)) == (0, whole.tokens, whole.documents)
    assert all(whole.read(start, 1)[0] == whole.separator_id for start, _ in bounds)
    assert sum(whole.document_bytes(bounds)) == whole.text_bytes


@pytest.mark.parametrize("shard_tokens", [100, 1 << 20])
def test_scattered_documents_keep_tokens_tasks_and_bytes(
    whole: TokenDataset, tmp_path: Path, shard_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subsets, "SHARD_TOKENS", shard_tokens)
    bounds = whole.document_bounds()
    start, end = bounds[-1]
    chosen = [bounds[0], bounds[1], bounds[3], (start, end - 2)]
    part = subset(whole, tmp_path / "part", chosen)
    expected = np.concatenate([whole.read(a, b - a) for a, b in chosen])
    assert (part.read(0, part.tokens) == expected).all()
    assert (len(part.manifest.shards) == 1) == (shard_tokens > len(expected))
    assert all(shard.tokens <= shard_tokens for shard in part.manifest.shards)
    part.verify()
    assert part.documents == 4
    assert part.document_tasks(part.tasks).tolist() == [0, 0, 0, 1]
    decode = whole.tokenizer().decode
    assert part.text_bytes == sum(len(decode(whole.read(a + 1, b - a - 1).tolist()).encode()) for a, b in chosen)


def test_a_folder_with_other_documents_is_refused(whole: TokenDataset, tmp_path: Path) -> None:
    bounds = whole.document_bounds()
    first = subset(whole, tmp_path / "part", bounds[:2])
    assert subset(whole, tmp_path / "part", bounds[:2]).fingerprint == first.fingerprint
    with pytest.raises(UserError, match="part was made from other data than"):
        subset(whole, tmp_path / "part", bounds[:3])
