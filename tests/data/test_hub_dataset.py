"""A dataset of the Hugging Face hub, through the real `datasets` library: only its place on the network is replaced."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ncn.data.dataset import TokenDataset
from ncn.data.prepare import prepare
from ncn.data.tokenizer import SEPARATOR
from ncn.errors import UserError

datasets = pytest.importorskip("datasets", reason="datasets is not installed")
DOCUMENTS = [f"The cat sat {n} times on the mat.\nThen it ran." for n in range(300)]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is asked of the hub for "someone/stories", which is a folder of Parquet files here."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "stories"
    folder.mkdir()
    for name, documents in (("train-0", DOCUMENTS[:200]), ("train-1", DOCUMENTS[200:]), ("validation-0", ["One."])):
        table = pyarrow.table({"story": [*documents, None, "  "], "calm": [0.5] * (len(documents) + 2)})
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=64)
    found: list[dict[str, Any]] = []
    load = datasets.load_dataset

    def load_dataset(name: str, *, revision: str, **options: Any) -> Any:
        assert (name, revision) == ("someone/stories", COMMIT)
        found.append(options)
        return load(str(folder), **options)

    def dataset_info(self: object, repository: str, **options: Any) -> SimpleNamespace:
        assert repository == "someone/stories"
        return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return found


def documents_of(folder: Path) -> list[str]:
    data = TokenDataset.open(folder)
    assert data.vocab_size < 1 << 16
    tokens = [
        token for shard in data.manifest.shards for token in memoryview((folder / shard.name).read_bytes()).cast("H")
    ]
    return data.tokenizer().decode(tokens).split(SEPARATOR)[1:]


def test_a_dataset_of_the_hub_is_streamed_at_its_revision(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    options: dict[str, Any] = {"field": "story", "sliders": ["calm"]}
    manifest = prepare(["hf:someone/stories"], tmp_path / "data", vocab_size=300, shard_tokens=3000, **options)
    assert documents_of(tmp_path / "data") == DOCUMENTS
    assert manifest.documents == len(DOCUMENTS)
    assert [(source.name, source.version) for source in manifest.request.sources] == [("someone/stories", COMMIT)]
    assert all(each == {"split": "train", "streaming": True} for each in asked)
    prepare(["hf:someone/stories"], tmp_path / "valid", tokenizer=str(tmp_path / "data"), split="validation", **options)
    assert documents_of(tmp_path / "valid") == ["One."]


def test_what_it_does_not_have_is_one_line(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    for options, words in (
        ({}, "hf:someone/stories, row 1: no field 'text'; "),
        ({"field": "story", "split": "tset"}, "hf:someone/stories cannot be read: ValueError: .*tset"),
    ):
        with pytest.raises(UserError, match=words) as error:
            prepare(["hf:someone/stories"], tmp_path / "out", tokenizer="gpt2", **options)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()
