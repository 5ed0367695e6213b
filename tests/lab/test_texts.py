"""The tuning split: whole documents off the end of the training text, nothing lost and nothing twice."""

from pathlib import Path

import numpy as np
import pytest

from ncn.data.dataset import TokenDataset
from ncn.data.subsets import TUNING_TOKENS, first_documents, hold_out
from ncn.errors import UserError
from ncn.lab.texts import make_splits
from tiny import prepare_text, stories


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    return prepare_text(tmp_path_factory.mktemp("whole") / "data", stories(0, 60_000), vocab_size=400)


def test_the_two_parts_are_the_whole(whole: TokenDataset, tmp_path: Path) -> None:
    train, tuning = hold_out(whole, tmp_path / "train", tmp_path / "tuning")
    tokens = np.concatenate([part.read(0, part.tokens) for part in (train, tuning)])
    assert (tokens == whole.read(0, whole.tokens)).all()
    for count in ("tokens", "documents", "text_bytes"):
        assert getattr(train, count) + getattr(tuning, count) == getattr(whole, count)
    for part in (train, tuning):
        part.verify()
        assert len(part.document_starts()) == part.documents
        assert part.document_starts()[0] == 0
        assert part.tokenizer().fingerprint == whole.tokenizer().fingerprint
    text = "".join(tuning.tokenizer().decode(tuning.read(0, tuning.tokens).tolist()).split("<|endoftext|>"))
    assert len(text.encode()) == tuning.text_bytes
    wanted = max(TUNING_TOKENS[0], round(0.05 * whole.tokens))
    assert wanted <= tuning.tokens < wanted + 1000


def test_the_first_documents_are_whole_ones(whole: TokenDataset, tmp_path: Path) -> None:
    part = first_documents(whole, tmp_path / "part", 2_000)
    assert (part.read(0, part.tokens) == whole.read(0, part.tokens)).all()
    assert whole.document_starts()[part.documents] == part.tokens
    assert whole.document_starts()[part.documents - 1] < 2_000 <= part.tokens
    texts = part.tokenizer().decode(part.read(0, part.tokens).tolist()).split("<|endoftext|>")[1:]
    assert len(texts) == part.documents
    assert len("".join(texts).encode()) == part.text_bytes
    part.verify()
    assert first_documents(whole, tmp_path / "all", whole.tokens) is whole


def test_again_it_is_the_same_and_other_data_is_refused(whole: TokenDataset, tmp_path: Path) -> None:
    folders = tmp_path / "train", tmp_path / "tuning"
    first = [part.fingerprint for part in hold_out(whole, *folders)]
    assert [part.fingerprint for part in hold_out(whole, *folders)] == first
    other = prepare_text(tmp_path / "other", stories(90_000, 150_000), tokenizer=str(whole.folder))
    with pytest.raises(UserError, match="tuning was made from other data than"):
        hold_out(other, *folders)


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    little = prepare_text(tmp_path / "little", stories(0, 3_000), vocab_size=300)
    with pytest.raises(UserError, match="too few to hold a tuning split of 2,048 tokens out; give more text"):
        hold_out(little, tmp_path / "train", tmp_path / "tuning")


def test_sources_are_prepared_and_folders_are_taken_as_they_are(whole: TokenDataset, tmp_path: Path) -> None:
    text = tmp_path / "valid.txt"
    text.write_text(stories(70_000, 75_000), "utf-8")
    made = make_splits(tmp_path / "data", str(whole.folder), str(text), 400, progress=False)
    assert made.validation.manifest.tokenizer_sha256 == whole.manifest.tokenizer_sha256
    again = make_splits(tmp_path / "data", str(whole.folder), str(made.validation.folder), 400, progress=False)
    assert again.validation.folder == made.validation.folder
    foreign = prepare_text(tmp_path / "foreign", stories(0, 3_000), vocab_size=300)
    with pytest.raises(UserError, match="different tokenizers"):
        make_splits(tmp_path / "data", str(whole.folder), str(foreign.folder), 400, progress=False)


def test_a_comparison_may_be_measured_on_the_first_documents_alone(whole: TokenDataset, tmp_path: Path) -> None:
    splits = make_splits(tmp_path / "data", str(whole.folder), str(whole.folder), 400, progress=False)
    assert splits.measured_on(whole.tokens, tmp_path / "all") == splits
    assert not (tmp_path / "all").exists()
    part = splits.measured_on(500, tmp_path / "part")
    assert (part.train, part.tuning) == (splits.train, splits.tuning)
    read = part.validation
    starts = whole.document_starts().tolist()
    assert read.tokens == next(start for start in starts if start >= 500)
    assert read.documents == starts.index(read.tokens)
    assert (read.read(0, read.tokens) == whole.read(0, read.tokens)).all()
