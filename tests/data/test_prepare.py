import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ncn.data import encoding, sources
from ncn.data import prepare as prepare_module
from ncn.data.dataset import TokenDataset
from ncn.data.manifest import Manifest
from ncn.data.prepare import prepare
from ncn.data.sources import BUNDLED_SOURCES, open_source
from ncn.data.tokenizer import SEPARATOR, Tokenizer
from ncn.errors import UserError

SAMPLE = lzma.decompress(BUNDLED_SOURCES["tinystories-sample-valid"].read_bytes()).decode()
ASSETS = BUNDLED_SOURCES["tinystories-sample"].parent
DOCUMENTS = [text.strip("\n") for text in SAMPLE.split(f"\n{SEPARATOR}\n")][:300]
BYTES = sum(len(text.encode()) for text in DOCUMENTS)


def joined(documents: list[str]) -> str:
    return "".join(f"{text}\n{SEPARATOR}\n" for text in documents)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def documents_of(folder: Path) -> list[str]:
    """The documents of a prepared folder, decoded."""
    dataset = TokenDataset.open(folder)
    tokens = [
        token
        for shard in dataset.manifest.shards
        for token in memoryview((folder / shard.name).read_bytes()).cast("H" if dataset.vocab_size <= 65535 else "I")
    ]
    borders = [i for i, token in enumerate(tokens) if token == dataset.separator_id]
    assert borders[0] == 0
    tokenizer = dataset.tokenizer()
    return [tokenizer.decode(tokens[begin + 1 : end]) for begin, end in zip(borders, [*borders[1:], None], strict=True)]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text(joined(DOCUMENTS), encoding="utf-8")
    return path


def write_parquet(path: Path, documents: list[str | None]) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    parquet.write_table(pyarrow.table({"text": documents, "number": list(range(len(documents)))}), path)


def write_lines(path: Path, documents: list[str | None]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n\n" for text in documents), encoding="utf-8")


FORMATS: dict[str, Callable[[Path], Any]] = {
    "a.txt": lambda path: path.write_text(joined(DOCUMENTS), encoding="utf-8"),
    "a.txt.gz": lambda path: path.write_bytes(gzip.compress(joined(DOCUMENTS).encode())),
    "a.txt.xz": lambda path: path.write_bytes(lzma.compress(joined(DOCUMENTS).encode())),
    "a.jsonl": lambda path: write_lines(path, [*DOCUMENTS]),
    "a.jsonl.gz": lambda path: path.write_bytes(
        gzip.compress("\n".join(json.dumps({"text": text}) for text in DOCUMENTS).encode())
    ),
    "a.parquet": lambda path: write_parquet(path, [*DOCUMENTS]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_documents_back(tmp_path: Path, name: str) -> None:
    FORMATS[name](tmp_path / name)
    manifest = prepare([str(tmp_path / name)], tmp_path / "out", tokenizer="gpt2", shard_tokens=9000)
    assert documents_of(tmp_path / "out") == DOCUMENTS
    assert (manifest.documents, manifest.text_bytes) == (len(DOCUMENTS), BYTES)
    assert len(manifest.shards) > 3
    dataset = TokenDataset.open(tmp_path / "out")
    dataset.verify()
    assert (dataset.tokens, dataset.vocab_size, dataset.separator_id) == (manifest.tokens, 50257, 50256)
    assert sum(shard.tokens for shard in manifest.shards) == manifest.tokens


def test_what_a_document_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(
        b"\xef\xbb\xbf\n\n  one\r\n\nmore \r\n" + SEPARATOR.encode() + b"  \r\n \n\n"
        b"<|endoftext|>\nsays <|endoftext|>\nhere\n<|endoftext|>\n<|endoftext|>\n\xc3\xa9"
    )
    manifest = prepare([str(path)], tmp_path / "out", tokenizer="gpt2")
    expected = ["  one\r\n\nmore ", "says <|endoftext|>\nhere", "é"]
    assert documents_of(tmp_path / "out") == expected
    assert manifest.text_bytes == sum(len(text.encode()) for text in expected)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_separator_inside_a_row_is_text(tmp_path: Path, name: str) -> None:
    rows = [f"a\n{SEPARATOR}\nb", None, " \n", SEPARATOR, "\nc\n"]
    (write_lines if name == "a.jsonl" else write_parquet)(tmp_path / name, rows)
    prepare([str(tmp_path / name)], tmp_path / "out", tokenizer="gpt2")
    assert documents_of(tmp_path / "out") == [f"a\n{SEPARATOR}\nb", SEPARATOR, "c"]


def test_long_documents_are_read_in_pieces_without_changing_a_token(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [text.replace(". ", ".\n") for text in DOCUMENTS]
    text_file.write_text(joined(documents), encoding="utf-8")
    whole = prepare([str(text_file)], tmp_path / "whole", tokenizer="gpt2")
    monkeypatch.setattr(sources, "PIECE_BYTES", 600)
    assert max(piece.bytes for piece in open_source(str(text_file), "text", "train").pieces()) <= 600
    pieces = prepare([str(text_file)], tmp_path / "pieces", tokenizer="gpt2")
    assert (pieces.hash, pieces.documents, pieces.text_bytes) == (whole.hash, whole.documents, whole.text_bytes)
    write_lines(tmp_path / "a.jsonl", [*documents])
    assert prepare([str(tmp_path / "a.jsonl")], tmp_path / "lines", tokenizer="gpt2").hash == whole.hash


def test_a_cut_where_there_is_no_line_end_keeps_characters_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 101)
    text = "🐉é" * 400
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    write_lines(tmp_path / "a.jsonl", [text])
    for name in ("a.txt", "a.jsonl"):
        pieces = list(open_source(str(tmp_path / name), "text", "train").pieces())
        assert "".join(piece.text for piece in pieces) == text
        assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)


def test_the_bytes_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_BATCH_PIECES", 7)
    for workers in (1, 2, 5):
        prepare([str(text_file)], tmp_path / str(workers), vocab_size=400, workers=workers, shard_tokens=5000)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "5")


def test_a_shard_ends_with_the_document_that_fills_it(tmp_path: Path, text_file: Path) -> None:
    folder = tmp_path / "out"
    manifest = prepare([str(text_file)], folder, tokenizer="gpt2", shard_tokens=2000)
    for shard in manifest.shards:
        tokens = memoryview((folder / shard.name).read_bytes()).cast("H")
        assert tokens[0] == 50256
        last = max(i for i, token in enumerate(tokens) if token == 50256)
        assert last < 2000
        if shard is not manifest.shards[-1]:
            assert shard.tokens >= 2000
    assert manifest.hash == prepare([str(text_file)], tmp_path / "one", tokenizer="gpt2").hash


def test_a_trained_tokenizer_comes_from_a_share_of_each_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "TRAINING_BYTES", 20_000)
    names = []
    for index, part in enumerate((DOCUMENTS[:150], DOCUMENTS[150:])):
        names.append(str(tmp_path / f"{index}.txt"))
        Path(names[-1]).write_text(joined(part), encoding="utf-8")
    prepare(names, tmp_path / "out", vocab_size=300)
    seen = []
    for part in (DOCUMENTS[:150], DOCUMENTS[150:]):
        size = 0
        for text in part:
            seen.append(text)
            size += len(text.encode())
            if size >= 10_000:
                break
    assert TokenDataset.open(tmp_path / "out").tokenizer().fingerprint == Tokenizer.train(seen, 300).fingerprint
    assert documents_of(tmp_path / "out") == DOCUMENTS


def test_a_vocabulary_over_65535_is_written_in_four_bytes(tmp_path: Path, text_file: Path) -> None:
    definition = json.loads(lzma.decompress((ASSETS / "gpt2_tokenizer.json.xz").read_bytes()))
    definition["model"]["vocab"] |= {f"unused {i}": i for i in range(50257, 65536)}
    definition["model"]["vocab"][SEPARATOR] = 65999
    definition["added_tokens"][0]["id"] = 65999
    (tmp_path / "big.json").write_text(json.dumps(definition))
    manifest = prepare([str(text_file)], tmp_path / "out", tokenizer=str(tmp_path / "big.json"))
    assert (manifest.dtype, manifest.vocab_size, manifest.separator_id) == ("uint32", 66000, 65999)
    assert (tmp_path / "out" / "shard-00000.bin").stat().st_size == 4 * manifest.tokens
    assert documents_of(tmp_path / "out") == DOCUMENTS


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from ncn.prepare import prepare
names, out, seed = sys.argv[1:3], Path(sys.argv[3]), int(sys.argv[4])
def work():
    prepare(names, out, vocab_size=500, workers=2, shard_tokens=4000)
generator, kills, seconds = random.Random(seed), 0, 0.08
for _ in range(200):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    time.sleep(generator.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] == 0:
        break
    kills += 1
    seconds *= 1.08
print(kills)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path: Path, text_file: Path, seed: int) -> None:
    write_lines(tmp_path / "more.jsonl", [*reversed(DOCUMENTS)])
    names = [str(text_file), str(tmp_path / "more.jsonl")]
    prepare(names, tmp_path / "whole", vocab_size=500, workers=1, shard_tokens=4000)
    command = [sys.executable, "-c", KILLER, *names, str(tmp_path / "killed"), str(seed)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) >= 3, "the kills came too late to test anything"
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


class StopAfter:
    """Raises an exception in the middle of a preparation: when the given shard has been begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shard: int, error: BaseException) -> None:
        write = prepare_module.ShardWriter.append

        def append(writer: Any, tokens: Any) -> None:
            if writer.path.name == f"shard-{shard:05d}.bin":
                raise error
            write(writer, tokens)

        monkeypatch.setattr(prepare_module.ShardWriter, "append", append)


@pytest.fixture
def interrupted(text_file: Path, tmp_path: Path) -> Path:
    """A folder whose preparation was stopped while its third shard was written."""
    with pytest.MonkeyPatch.context() as patch:
        StopAfter(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prepare([str(text_file)], tmp_path / "out", tokenizer="gpt2", shard_tokens=5000)
    return tmp_path / "out"


def test_an_interrupt_says_how_to_go_on(interrupted: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(contents(interrupted)) == [
        "progress.json",
        "shard-00000.bin",
        "shard-00001.bin",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    with pytest.MonkeyPatch.context() as patch:
        StopAfter(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prepare([str(text_file)], interrupted, tokenizer="gpt2", shard_tokens=5000)
    said = capsys.readouterr().err
    assert said == f"Interrupted: 3 finished shards kept in {interrupted}; run the same command again to go on.\n"


def test_finished_shards_are_kept_and_damaged_ones_made_again(
    interrupted: Path, text_file: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    prepare([str(text_file)], whole, tokenizer="gpt2", shard_tokens=5000)
    kept, damaged = interrupted / "shard-00000.bin", interrupted / "shard-00001.bin"
    before = kept.stat().st_mtime_ns
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    prepare([str(text_file)], interrupted, tokenizer="gpt2", shard_tokens=5000)
    assert contents(interrupted) == contents(whole)
    assert kept.stat().st_mtime_ns == before


def test_another_request_does_not_go_on(interrupted: Path, text_file: Path) -> None:
    with pytest.raises(UserError, match="was begun with shard_tokens 5000, now it is 6000"):
        prepare([str(text_file)], interrupted, tokenizer="gpt2", shard_tokens=6000)
    with pytest.raises(UserError, match=r"was begun with tokenizer_sha256 .*, now it is None"):
        prepare([str(text_file)], interrupted, vocab_size=300, shard_tokens=5000)
    text_file.write_text(joined(DOCUMENTS[::-1]), encoding="utf-8")
    with pytest.raises(UserError, match=r"other sources \(changed: stories.txt\)"):
        prepare([str(text_file)], interrupted, tokenizer="gpt2", shard_tokens=5000)


def test_a_finished_folder_is_checked_and_left_alone(tmp_path: Path, text_file: Path) -> None:
    out = tmp_path / "out"
    first = prepare([str(text_file)], out, vocab_size=300)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare([str(text_file)], out, vocab_size=300) == first == Manifest.read(out)
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    shard = out / "shard-00000.bin"
    shard.write_bytes(b"?" + shard.read_bytes()[1:])
    with pytest.raises(UserError, match=r"shard-00000\.bin is damaged"):
        prepare([str(text_file)], out, vocab_size=300)


def test_a_full_disk_is_one_line_and_can_be_gone_on_from(tmp_path: Path, text_file: Path) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        StopAfter(patch, 1, OSError(28, "No space left on device"))
        with pytest.raises(UserError, match="No space left on device; mend it and run the same command again"):
            prepare([str(text_file)], out, tokenizer="gpt2", shard_tokens=5000)
    prepare([str(text_file)], out, tokenizer="gpt2", shard_tokens=5000)
    assert documents_of(out) == DOCUMENTS


GZIPPED, XZ = gzip.compress(joined(DOCUMENTS).encode()), lzma.compress(joined(DOCUMENTS).encode())
BAD_FILES = {
    "empty": ("a.txt", b"", "a.txt is empty"),
    "blank": ("a.txt", b" \n\n<|endoftext|>\n\n", "a.txt holds no documents"),
    "blank lines": ("a.jsonl", b'{"text": " "}\n', "a.jsonl holds no documents"),
    "latin-1": ("a.txt", b"ok\n<|endoftext|>\ncaf\xe9 au lait", r"a.txt is not UTF-8: byte 0xe9 at offset 20"),
    "latin-1 row": ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "not UTF-8: byte 0xe9 at offset 24"),
    "half a pair": ("a.jsonl", b'{"text": "a\\ud83d"}\n', "a.jsonl, line 1: half of a surrogate pair at character 1"),
    "other field": ("a.jsonl", b'{"text": "a"}\n{"texts": "b"}\n', "line 2: no field 'text'; did you mean 'texts'?"),
    "no field": ("a.jsonl", b'{"body": "b", "id": 1}\n', "line 1: no field 'text'; it has body, id"),
    "not text": ("a.jsonl", b'{"text": 3}\n', "line 1: field 'text' holds int, expected text"),
    "not JSON": ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
    "not an object": ("a.jsonl", b"[1]\n", "line 1: expected an object with a field 'text', found list"),
    "no Parquet": ("a.parquet", b"PAR1 or not", "a.parquet is truncated or corrupted"),
    "short gzip": ("a.txt.gz", GZIPPED[:-2000], "a.txt.gz is truncated or corrupted: unpacking failed after"),
    "bad gzip": ("a.txt.gz", GZIPPED[:5000] + b"????" + GZIPPED[5004:], "a.txt.gz is truncated or corrupted"),
    "no gzip": ("a.txt.gz", b"plain text", "a.txt.gz is truncated or corrupted"),
    "short xz": ("a.txt.xz", XZ[:-2000], "a.txt.xz is truncated or corrupted"),
    "bad xz": ("a.txt.xz", XZ[:5000] + b"????" + XZ[5004:], "a.txt.xz is truncated or corrupted"),
    "ending": ("a.docx", b"text", r"a.docx: unknown file ending; expected one of \.txt"),
    "packed Parquet": ("a.parquet.gz", b"text", "unknown file ending"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_clear_line_and_leaves_nothing_behind(tmp_path: Path, case: str) -> None:
    name, content, message = BAD_FILES[case]
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        prepare([str(tmp_path / name)], tmp_path / "out", tokenizer="gpt2")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_column_names_the_nearest(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["a", "b"])
    with pytest.raises(UserError, match=r"a\.parquet: no field 'txt'; did you mean 'text'\?"):
        prepare([str(tmp_path / "a.parquet")], tmp_path / "out", tokenizer="gpt2", field="txt")
    with pytest.raises(UserError, match="row 1: field 'number' holds int, expected text"):
        prepare([str(tmp_path / "a.parquet")], tmp_path / "out", tokenizer="gpt2", field="number")


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    for name, message in (
        ("nowhere.txt", "no such file: nowhere.txt"),
        ("tinystories-sampel", r"no such file: tinystories-sampel \(did you mean tinystories-sample\?\)"),
        (str(tmp_path), "is a folder: name the files in it"),
    ):
        with pytest.raises(UserError, match=message):
            prepare([name], tmp_path / "out", tokenizer="gpt2")
    with pytest.raises(UserError, match="no sources given"):
        prepare([], tmp_path / "out", tokenizer="gpt2")


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    # The tests run with HF_HUB_OFFLINE=1. Without the datasets library the message is about that.
    with pytest.raises(UserError, match=r"cannot be had from the Hugging Face hub|needs the datasets library") as error:
        prepare(["hf:roneneldan/TinyStories"], tmp_path / "out", tokenizer="gpt2")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either a vocabulary size"),
        ({"vocab_size": 300, "tokenizer": "gpt2"}, "give either a vocabulary size"),
        ({"vocab_size": 256}, "a vocabulary of 256 is too small"),
        ({"tokenizer": "gpt9"}, "no tokenizer at gpt9"),
        ({"tokenizer": "gpt2", "workers": 0}, "workers and shard_tokens must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tmp_path: Path, text_file: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare([str(text_file)], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"holds something else \(thesis.tex\): name a new or an empty folder"):
        prepare([str(text_file)], tmp_path / "out", tokenizer="gpt2")
    with pytest.raises(UserError, match="is a file: name a folder"):
        prepare([str(text_file)], text_file, tokenizer="gpt2")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


def test_the_bundled_sample_is_what_the_notice_says() -> None:
    for name, count in (("tinystories-sample", 11915), ("tinystories-sample-valid", 2500)):
        assert sum(piece.first for piece in open_source(name, "text", "train").pieces()) == count


def test_progress_is_plain_lines_where_there_is_no_terminal(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ncn.machine.progress._LINE_SECONDS", 0.0)
    prepare([str(text_file)], tmp_path / "out", tokenizer="gpt2", progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("prepare: ") and line.endswith(" tokens/s") and "\x1b" not in line for line in lines)
    assert "s left" in lines[-1]


GROWTH = """
import sys
from pathlib import Path
from ncn import prepare as module
def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
source, tokenizer, out, whole = sys.argv[1:]
if whole == "1":
    streamed = module.placed_pieces
    module.placed_pieces = lambda *arguments: iter(list(streamed(*arguments)))
before = resident("VmRSS")
module.prepare([source], Path(out), tokenizer=tokenizer, workers=2)
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="this system does not tell a process's peak memory")
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """It does where all documents are read before the first is encoded, which the same measurement must show."""
    Tokenizer.train(DOCUMENTS, 2000).save(tmp_path)  # a small one, whose loading does not hide what follows

    def growth(copies: int, whole: bool) -> int:
        path, out = tmp_path / f"{copies}.txt", tmp_path / f"{copies}-{whole}"
        path.write_text(joined([f"{number} {text}" for number in range(copies) for text in DOCUMENTS]), "utf-8")
        # getrusage would also count what this process held when it started the other one
        command = [sys.executable, "-c", GROWTH, str(path), str(tmp_path), str(out), str(int(whole))]
        return int(subprocess.run(command, capture_output=True, text=True, timeout=250, check=True).stdout)

    copies = 4_000_000 // BYTES
    small, large, mutant = growth(copies, False), growth(10 * copies, False), growth(10 * copies, True)
    added = 9 * copies * BYTES
    assert added > 30_000_000
    print(small, large, mutant, added)
    assert large - small < 0.15 * added
    assert mutant - small > 0.6 * added
