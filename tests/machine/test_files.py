"""Files and tensors on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ncn.machine.files import file_sha256, flat
from ncn.machine.tensors import write_tensors


def test_nested_names_are_joined() -> None:
    nested = {"a": {"b": 1, "c": {"d": [2]}}, "e": 3}
    assert flat(nested) == {"a.b": 1, "a.c.d": [2], "e": 3}
    assert flat(nested, "/") == {"a/b": 1, "a/c/d": [2], "e": 3}


def test_a_hash_is_that_of_the_file_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"one")
    (tmp_path / "two").write_bytes(b"two")
    whole = hashlib.sha256()
    assert file_sha256(tmp_path / "one") == hashlib.sha256(b"one").hexdigest()
    assert [file_sha256(tmp_path / name, whole) for name in ("one", "two")][1] == hashlib.sha256(b"two").hexdigest()
    assert whole.hexdigest() == hashlib.sha256(b"onetwo").hexdigest()


def test_tensors_come_back_with_what_is_said_of_them(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.arange(6.0).view(2, 3).T}, {"facts": "some"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"facts": "some"}
        assert torch.equal(file.get_tensor("a"), torch.arange(6.0).view(2, 3).T)
    write_tensors(path, {"a": torch.zeros(1)})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [found.name for found in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"nowhere/x\.safetensors"):
        write_tensors(tmp_path / "nowhere" / "x.safetensors", {"a": torch.zeros(1)})
