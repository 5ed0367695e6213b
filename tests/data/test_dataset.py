import hashlib
import itertools
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ncn.config.training import IGNORED
from ncn.data.dataset import TokenDataset
from ncn.data.manifest import Manifest, Request, ShardRecord, token_dtype
from ncn.data.prepare import prepare
from ncn.data.tokenizer import Tokenizer
from ncn.errors import UserError


def write_dataset(folder: Path, sizes: list[int], vocab_size: int = 60000) -> TokenDataset:
    """A dataset whose token at position i is i, so that a token tells where it was read."""
    dtype, start, whole = token_dtype(vocab_size), 0, b""
    shards = []
    for number, size in enumerate(sizes):
        content = np.arange(start, start + size).astype(dtype).tobytes()
        name = f"shard-{number:05d}.bin"
        (folder / name).write_bytes(content)
        shards.append(ShardRecord(name=name, tokens=size, sha256=hashlib.sha256(content).hexdigest()))
        start, whole = start + size, whole + content
    manifest = Manifest(
        tokens=start,
        documents=1,
        text_bytes=start,
        dtype="uint16" if dtype.itemsize == 2 else "uint32",
        vocab_size=vocab_size,
        separator_id=0,
        tokenizer_sha256="0" * 64,
        hash=hashlib.sha256(whole).hexdigest(),
        shards=tuple(shards),
        request=Request(
            sources=(), tokenizer_sha256=None, vocab_size=None, field="text", split="train", shard_tokens=1
        ),
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return TokenDataset.open(folder)


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    return write_dataset(tmp_path, [40, 1, 63])


def epoch_rows(dataset: TokenDataset, seed: int, epoch: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All windows of an epoch, one a step."""
    windows = dataset.epoch_windows(context)
    batches = [dataset.batch(seed, epoch * windows + index, 1, context) for index in range(windows)]
    return torch.cat([batch.inputs for batch in batches]), torch.cat([batch.targets for batch in batches])


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 1),
    context=st.integers(1, 130),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 3),
)
def test_every_token_is_a_target_once_an_epoch(sizes: list[int], context: int, seed: int, epoch: int) -> None:
    with TemporaryDirectory() as folder:
        dataset = write_dataset(Path(folder), sizes)
        inputs, targets = epoch_rows(dataset, seed, epoch, context)
        kept = targets != IGNORED
        assert sorted(targets[kept].tolist()) == list(range(dataset.tokens))
        assert torch.equal((inputs[kept] + 1) % dataset.tokens, targets[kept])
        # A window is consecutive tokens of the circle, the masked end included.
        assert torch.equal((inputs[:, :-1] + 1) % dataset.tokens, inputs[:, 1:])


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 1),
    context=st.integers(1, 60),
    batch_size=st.integers(1, 7),
)
def test_windows_cover_the_file_once_and_in_order(sizes: list[int], context: int, batch_size: int) -> None:
    with TemporaryDirectory() as folder:
        dataset = write_dataset(Path(folder), sizes)
        batches = list(dataset.windows(context, batch_size))
        targets = torch.cat([batch.targets for batch in batches])
        inputs = torch.cat([batch.inputs for batch in batches])
        kept = targets != IGNORED
        assert targets[kept].tolist() == list(range(1, dataset.tokens))
        assert inputs[kept].tolist() == list(range(dataset.tokens - 1))
        assert all(len(batch.inputs) == batch_size for batch in batches[:-1])
        assert inputs.shape == targets.shape == (-(-(dataset.tokens - 1) // context), context)


def test_a_batch_depends_on_its_arguments_alone(dataset: TokenDataset) -> None:
    steps = [0, 9, 3, 40, 3, 0, 7]
    expected = {step: TokenDataset.open(dataset.folder).batch(5, step, 3, 8) for step in set(steps)}
    for step in steps:
        dataset.batch(6, step, 3, 8)
        dataset.batch(5, step, 2, 10)
        batch = dataset.batch(5, step, 3, 8)
        assert torch.equal(batch.inputs, expected[step].inputs)
        assert torch.equal(batch.targets, expected[step].targets)


def test_seeds_and_epochs_differ_in_order_and_offset(dataset: TokenDataset) -> None:
    drawn = [epoch_rows(dataset, seed, epoch, 8)[0] for seed in range(3) for epoch in range(3)]
    assert len({tuple(inputs[:, 0].tolist()) for inputs in drawn}) == 9
    assert len({int(inputs.min(dim=1).values.sort().values[1]) % 8 for inputs in drawn}) > 1


def test_the_parts_of_a_batch_are_int64_and_contiguous(dataset: TokenDataset) -> None:
    for part in dataset.batch(0, 0, 2, 5):
        assert part.dtype == torch.int64
        assert part.is_contiguous()
        assert part.shape == (2, 5)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_ranks_of_a_step_make_up_the_batch_of_one_process(dataset: TokenDataset, world_size: int) -> None:
    for step in range(12):
        whole = dataset.batch(1, step, 2 * world_size, 8)
        ranks = [dataset.batch(1, step, 2, 8, rank, world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat([batch.inputs for batch in ranks]), whole.inputs)
        assert torch.equal(torch.cat([batch.targets for batch in ranks]), whole.targets)


def test_batches_run_on_over_the_border_of_an_epoch(dataset: TokenDataset) -> None:
    windows = dataset.epoch_windows(8)
    assert windows % 4 != 0
    rows = torch.cat([dataset.batch(2, step, 4, 8).targets for step in range(windows)])
    for epoch in range(4):
        targets = rows[epoch * windows : (epoch + 1) * windows]
        assert Counter(targets[targets != IGNORED].tolist()) == Counter(range(dataset.tokens))


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path: Path) -> None:
    assert token_dtype(65535).itemsize == 2
    assert token_dtype(65536).itemsize == 4
    dataset = write_dataset(tmp_path, [70000], vocab_size=70000)
    assert int(torch.cat([batch.targets for batch in dataset.windows(1000, 70)]).max()) == 69999


@pytest.mark.parametrize(("size", "word"), [(70, "truncated"), (90, "too long")])
def test_a_shard_of_the_wrong_size_is_named(dataset: TokenDataset, size: int, word: str) -> None:
    path = dataset.folder / "shard-00000.bin"
    path.write_bytes(bytes(size))
    with pytest.raises(UserError, match=rf"shard-00000\.bin is {word}: expected 80 bytes, found {size}"):
        TokenDataset.open(dataset.folder)
    path.unlink()
    with pytest.raises(UserError, match=r"shard-00000\.bin is missing: expected 80 bytes"):
        TokenDataset.open(dataset.folder)


def test_verify_finds_a_changed_byte(dataset: TokenDataset) -> None:
    dataset.verify()
    path = dataset.folder / "shard-00002.bin"
    path.write_bytes(b"\x07" + path.read_bytes()[1:])
    with pytest.raises(UserError, match=r"shard-00002\.bin is damaged"):
        TokenDataset.open(dataset.folder).verify()


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no prepared data: make it with ncn prepare"):
        TokenDataset.open(tmp_path)
    (tmp_path / "progress.json").write_text("{}")
    with pytest.raises(UserError, match="preparation was interrupted; run the same ncn prepare again"):
        TokenDataset.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"tokens": "many"}')
    with pytest.raises(UserError, match=r"manifest\.json cannot be read \(tokens: "):
        TokenDataset.open(tmp_path)


def test_a_foreign_tokenizer_is_refused(dataset: TokenDataset) -> None:
    Tokenizer.train(["a"], 257).save(dataset.folder)
    with pytest.raises(UserError, match="is not the tokenizer that made this data"):
        dataset.tokenizer()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, 1, 1), "seed and step must be at least 0"),
        ((0, -1, 1, 1), "seed and step must be at least 0"),
        ((0, 0, 0, 1), "batch_size must be at least 1, not 0"),
        ((0, 0, 1, 0), "context must be at least 1, not 0"),
        ((0, 0, 1, 1, 2, 2), "rank must be from 0 to 1 for a world size of 2, not 2"),
    ],
)
def test_arguments_out_of_range_are_refused(dataset: TokenDataset, arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataset.batch(*arguments)


def test_documents_are_found_and_read_where_they_begin(tmp_path: Path) -> None:
    texts = ["One day.", "A red ball, a blue ball.", "The end."]
    source = tmp_path / "text.txt"
    source.write_text("\n<|endoftext|>\n".join(texts), "utf-8")
    prepare([str(source)], tmp_path / "data", vocab_size=257, shard_tokens=10, workers=1)
    dataset = TokenDataset.open(tmp_path / "data")
    assert len(dataset.manifest.shards) > 1
    bounds = [*dataset.document_starts().tolist(), dataset.tokens]
    assert bounds == [0, 9, 34, 43]
    decode = dataset.tokenizer().decode
    pieces = [dataset.read(a, b - a).tolist() for a, b in itertools.pairwise(bounds)]
    assert [decode(ids[1:]) for ids in pieces] == texts
    assert all(ids[0] == dataset.separator_id for ids in pieces)
