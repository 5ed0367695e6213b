"""Reading documents: text, gzip, xz, JSON lines, Parquet and Hugging Face datasets, each as one stream of text.

A document is its text without the newlines at either end; one that holds nothing but white space is left out. In a
plain text file documents are separated by lines that hold `<|endoftext|>` and nothing else but white space. Everywhere
else, and inside a line, that string is ordinary text.
"""

import codecs
import difflib
import gzip
import io
import json
import lzma
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from ncn.data.columns import NO_COLUMNS, Beside, Columns, beside, missing_field
from ncn.data.manifest import SourceRecord
from ncn.data.tokenizer import SEPARATOR
from ncn.errors import UserError
from ncn.machine.files import ASSETS, file_sha256

PIECE_BYTES = 4 << 20
"""A document longer than this is handed on in pieces, so that memory stays bounded whatever a text file holds."""

BUNDLED_SOURCES = {
    "tinystories-sample": ASSETS / "tinystories_train.txt.xz",
    "tinystories-sample-valid": ASSETS / "tinystories_valid.txt.xz",
}

_TEXT_ENDINGS, _LINE_ENDINGS = (".txt", ".text", ".md"), (".jsonl", ".ndjson")
_SEPARATOR_LINE = SEPARATOR.encode()
_BLOCK = 1 << 20
_HUB_TIMEOUT_SECONDS = 10


class Piece(NamedTuple):
    """A document's text, or a part of it when it is long. `first` marks the piece that begins a document."""

    text: str
    bytes: int
    first: bool
    beside: Beside = Beside()


class Source(ABC):
    """Something that documents are read from.

    Attributes:
        name: as the user wrote it.
        size: bytes to read, 0 where that is not known.
        consumed: bytes read so far.
    """

    def __init__(self, name: str, size: int, field: str, columns: Columns) -> None:
        self.name, self.size, self.consumed, self.field, self.columns = name, size, 0, field, columns
        self._missing = set(columns.names)

    @abstractmethod
    def record(self) -> SourceRecord:
        """What identifies the source's content."""

    @abstractmethod
    def _read(self) -> Iterator[Piece]: ...

    def pieces(self, skip: int = 0) -> Iterator[Piece]:
        """The pieces of the documents after the first `skip`, in order.

        Raises:
            UserError: the source cannot be read, or holds no documents at all.
        """
        documents = 0
        for piece in self._read():
            documents += piece.first
            if documents > skip:
                yield piece
        if documents == 0:
            raise UserError(f"{self.name} holds no documents: expected text that is more than white space")
        for column in sorted(self._missing):
            raise missing_field(self.name, column, self._present)

    def _row(self, row: dict[str, Any], place: str) -> Iterator[Piece]:
        """The document in one row of a table; a missing value counts as an empty document."""
        self._present = row.keys()
        self._missing -= row.keys()
        for piece in _row_pieces(row, self.field, place):
            yield piece._replace(beside=beside(row, self.columns, place)) if piece.first else piece


class FileSource(Source):
    """A file on disk."""

    def __init__(self, name: str, path: Path, field: str, columns: Columns) -> None:
        super().__init__(name, path.stat().st_size, field, columns)
        self.path = path

    def record(self) -> SourceRecord:
        return SourceRecord(name=self.path.name, bytes=self.size, version=file_sha256(self.path))

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Lines of the unpacked file, each with the offset of its first byte; one over PIECE_BYTES comes in parts."""
        offset = noted = 0
        with self.path.open("rb") as raw, io.BufferedReader(_unpacked(raw, self.path), _BLOCK) as stream:
            try:
                while line := stream.readline(PIECE_BYTES):
                    if offset == 0 and line.startswith(codecs.BOM_UTF8):
                        offset, line = len(codecs.BOM_UTF8), line.removeprefix(codecs.BOM_UTF8)
                    yield offset, line
                    offset += len(line)
                    if offset - noted >= _BLOCK:
                        self.consumed, noted = raw.tell(), offset
            except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError):
                raise UserError(
                    f"{self.name} is truncated or corrupted: unpacking failed after {offset} bytes; get it again"
                ) from None
        self.consumed = self.size

    def _decode(self, content: bytes, offset: int) -> str:
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.name} is not UTF-8: byte 0x{content[error.start]:02x} at offset {offset + error.start}; "
                "convert it first, for example with iconv"
            ) from None


class TextSource(FileSource):
    """A plain text file, perhaps packed. A file without separator lines is one document."""

    def _read(self) -> Iterator[Piece]:
        first = True
        for offset, content, last in self._chunks():
            text = self._decode(content, offset)
            text = text.lstrip("\r\n") if first else text
            text = text.rstrip("\r\n") if last else text
            if text and not (first and text.isspace()):
                yield Piece(text, len(text.encode()), first)
                first = False
            first = first or last

    def _chunks(self) -> Iterator[tuple[int, bytes, bool]]:
        """The text between separator lines, as (offset, content, whether the document ends with it)."""
        held: list[bytes] = []
        start = size = 0
        line_begins = True
        for offset, line in self._lines():
            separates = line_begins and len(line) < 80 and line.strip() == _SEPARATOR_LINE
            line_begins = line.endswith(b"\n")
            if separates:
                yield start, b"".join(held), True
                held, start, size = [], offset + len(line), 0
                continue
            held.append(line)
            size += len(line)
            while size > PIECE_BYTES:
                content = b"".join(held)
                cut = _cut_before(content, PIECE_BYTES)
                yield start, content[:cut], False
                held, start, size = [content[cut:]], start + cut, size - cut
        yield start, b"".join(held), True


class LinesSource(FileSource):
    """JSON lines: one object a line, its text under `field`."""

    def _read(self) -> Iterator[Piece]:
        parts: list[bytes] = []
        number, start = 1, 0
        for offset, line in self._lines():
            start = start if parts else offset
            parts.append(line)
            if line.endswith(b"\n"):
                yield from self._line(b"".join(parts), start, number)
                parts, number = [], number + 1
        yield from self._line(b"".join(parts), start, number)

    def _line(self, content: bytes, offset: int, number: int) -> Iterator[Piece]:
        if not content.strip():
            return
        place = f"{self.name}, line {number}"
        text = self._decode(content, offset)
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not JSON ({_first_line(error)}); expected one object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: expected an object with a field '{self.field}', found {type(row).__name__}")
        yield from self._row(row, place)


class ParquetSource(FileSource):
    """A Parquet file, its text in the column `field`."""

    def _read(self) -> Iterator[Piece]:
        try:
            import pyarrow  # type: ignore[import-untyped]
            import pyarrow.parquet  # type: ignore[import-untyped]
        except ImportError:
            raise UserError(f"{self.name} needs pyarrow to be read: pip install pyarrow") from None
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                wanted = [self.field, *self.columns.names]
                for name in wanted:
                    if name not in file.schema_arrow.names:
                        raise missing_field(self.name, name, file.schema_arrow.names)
                number = 0
                for batch in file.iter_batches(batch_size=256, columns=wanted, use_threads=False):
                    for row in batch.to_pylist():
                        number += 1
                        yield from self._row(row, f"{self.name}, row {number}")
                    self.consumed = self.size * number // file.metadata.num_rows
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{self.name} is truncated or corrupted: {_first_line(error)}; get it again") from None


class HubSource(Source):
    """A dataset of the Hugging Face hub, streamed at the revision that it has when preparation begins."""

    def __init__(self, name: str, field: str, split: str, columns: Columns) -> None:
        super().__init__(name, 0, field, columns)
        self.split = split
        self.repository = name.removeprefix("hf:")
        self.revision: str | None = None

    def record(self) -> SourceRecord:
        try:
            import datasets  # noqa: F401 - its absence shows before any work is done
            from huggingface_hub import HfApi
        except ImportError:
            raise UserError(f"{self.name} needs the datasets library: pip install datasets") from None
        try:
            self.revision = HfApi().dataset_info(self.repository, timeout=_HUB_TIMEOUT_SECONDS).sha or ""
        except Exception as error:  # the hub's client raises its own, its HTTP library's and plain errors
            raise UserError(
                f"{self.name} cannot be had from the Hugging Face hub ({type(error).__name__}: {_first_line(error)}): "
                "check the name and the connection, or name files on disk"
            ) from None
        return SourceRecord(name=self.repository, bytes=0, version=self.revision)

    def _read(self) -> Iterator[Piece]:
        import datasets

        try:
            rows = datasets.load_dataset(self.repository, split=self.split, streaming=True, revision=self.revision)
            for number, row in enumerate(rows, start=1):
                yield from self._row(row, f"{self.name}, row {number}")
        except UserError:
            raise
        except Exception as error:  # whatever a loader, a file format or the network raises
            raise UserError(f"{self.name} cannot be read: {type(error).__name__}: {_first_line(error)}") from None


def open_source(name: str, field: str, split: str, columns: Columns = NO_COLUMNS) -> Source:
    """The source that a name stands for: `hf:owner/name`, a bundled sample, or a file by its ending.

    Raises:
        UserError: there is no such file, it is empty, its ending is not known, or it is plain text and has no columns.
    """
    if name.startswith("hf:"):
        return HubSource(name, field, split, columns)
    path = BUNDLED_SOURCES.get(name, Path(name))
    if path.is_dir():
        raise UserError(f"{name} is a folder: name the files in it, for example {name}/*.jsonl")
    if not path.is_file():
        near = difflib.get_close_matches(name, BUNDLED_SOURCES, n=1)
        raise UserError(f"no such file: {name}" + (f" (did you mean {near[0]}?)" if near else ""))
    inner = Path(path.stem) if path.suffix.lower() in (".gz", ".xz") else path
    ending = inner.suffix.lower()
    if ending == ".parquet" and inner is path:
        kind: type[FileSource] = ParquetSource
    elif ending in _TEXT_ENDINGS:
        kind = TextSource
    elif ending in _LINE_ENDINGS:
        kind = LinesSource
    else:
        known = ", ".join([*_TEXT_ENDINGS, *_LINE_ENDINGS])
        raise UserError(
            f"{name}: unknown file ending; expected one of {known} (each may be packed: .gz, .xz), .parquet"
        )
    if path.stat().st_size == 0:
        raise UserError(f"{name} is empty: expected documents")
    if columns.names and kind is TextSource:
        raise UserError(f"{name} is plain text and has no column {columns.names[0]!r}: use JSON lines or Parquet")
    return kind(name, path, field, columns)


def _unpacked(raw: IO[bytes], path: Path) -> Any:
    match path.suffix.lower():
        case ".gz":
            return gzip.GzipFile(fileobj=raw)
        case ".xz":
            return lzma.LZMAFile(raw)
    return raw


def _row_pieces(row: dict[str, Any], field: str, place: str) -> Iterator[Piece]:
    if field not in row:
        raise missing_field(place, field, row)
    text = row[field]
    if text is None:
        return
    if not isinstance(text, str):
        raise UserError(f"{place}: field '{field}' holds {type(text).__name__}, expected text")
    text = text.strip("\r\n")
    if not text or text.isspace():
        return
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: half of a surrogate pair at character {error.start}, which is not text") from None
    first = True
    while len(content) > PIECE_BYTES:
        cut = _cut_before(content, PIECE_BYTES)
        yield Piece(content[:cut].decode(), cut, first)
        content, first = content[cut:], False
    yield Piece(content.decode(), len(content), first)


def _cut_before(content: bytes, limit: int) -> int:
    """Where to cut UTF-8 text at or before `limit`: after a line end with something visible on both sides of it.

    Tokenizers of the GPT family never join characters across such a place, so that a cut there changes no token. Text
    without one is cut at `limit`, or as little before it as keeps a character whole.
    """
    end = limit
    while (newline := content.rfind(b"\n", 1, end)) > 0:
        if not content[newline - 1 : newline].isspace() and not content[newline + 1 : newline + 2].isspace():
            return newline + 1
        end = newline
    cut = limit
    while cut > max(limit - 3, 1) and content[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
