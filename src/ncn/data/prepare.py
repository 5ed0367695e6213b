"""From documents to a dataset folder: `ncn prepare`.

One thread reads documents and writes shards, in order; others encode. A shard ends with the document that fills it,
and after each shard `progress.json` notes where the next one begins, so that a preparation that was stopped at any
moment, by Ctrl-C or by a kill, goes on from its last finished shard. Equal requests give equal bytes, for any number
of workers and interruptions.
"""

import hashlib
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from ncn.data.columns import Columns
from ncn.data.dataset import TokenDataset
from ncn.data.document_columns import write_columns
from ncn.data.encoding import Place, encode_in_order, placed_pieces
from ncn.data.manifest import JOURNAL, MANIFEST, Manifest, Record, Request, ShardRecord, TaskRecord, token_dtype
from ncn.data.shards import ShardWriter
from ncn.data.sources import Source, open_source
from ncn.data.tokenizer import MINIMUM_VOCAB_SIZE, Tokenizer
from ncn.errors import UserError
from ncn.machine.devices import usable_cores
from ncn.machine.files import PART_SUFFIX, file_sha256, write_atomically
from ncn.machine.progress import ProgressReport

SHARD_TOKENS = 1 << 26
"""Tokens after which a shard is closed: 128 MiB of uint16."""

TRAINING_BYTES = 64 << 20
"""A tokenizer is trained on the first documents of each source, this many bytes of text in all, an equal share each."""

_OWN_FILE = re.compile(
    r"shard-\d+\.bin|manifest\.json|progress\.json|tokenizer\.json|tokenizer_config\.json|attributes\.(json|safetensors)|(columns|instructions)\.safetensors|.*\.part"
)


class _Shard(Record):
    """A finished shard, how many documents of each source it holds, and the place of the document after it: `document`
    documents into source number `source`."""

    shard: ShardRecord
    documents: tuple[int, ...]
    text_bytes: int
    source: int
    document: int


class _Journal(Record):
    request: Request
    shards: tuple[_Shard, ...] = ()


def prepare(
    sources: list[str],
    out: Path,
    *,
    vocab_size: int | None = None,
    tokenizer: str | None = None,
    field: str = "text",
    split: str = "train",
    tasks: Sequence[str] = (),
    sliders: Sequence[str] = (),
    instruction: str | None = None,
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    progress: bool = False,
) -> Manifest:
    """Tokenise documents into a dataset folder for `TokenDataset.open`.

    Running it again after an interruption goes on where it stopped; on a finished folder it checks the shards and
    returns.

    Args:
        sources: files (.txt, .jsonl, each perhaps with .gz or .xz, .parquet), `hf:owner/name` for a dataset of the
            Hugging Face hub, or `tinystories-sample` and `tinystories-sample-valid`, which ship with the package.
            Order matters.
        out: the folder to write; new, empty, or one that the same request began.
        vocab_size: train a byte-level byte-pair tokenizer of this many tokens on the documents (see TRAINING_BYTES).
        tokenizer: or use this one: "gpt2", a `tokenizer.json`, a folder that holds one, or the name of a repository on
            the Hugging Face hub ("owner/name") that does.
        field: the key (JSON lines) or column (Parquet, hub) that holds the text.
        split: the split of a hub dataset.
        tasks: names of the tasks that the documents belong to, one for each source, in order; or none.
        sliders: keys or columns of numbers, which `ncn.steering.attributes.write_attributes` makes sliders of. A
            missing value is unset.
        instruction: the key or column that holds an instruction in words; a document may have none.
        workers: encoding threads; by default one for each core that the process may use.
        shard_tokens: a shard is closed by the document with which it reaches this many tokens.
        progress: show a progress bar on standard error, or now and then a line where that is not a terminal.

    Raises:
        UserError: a source, the tokenizer, an option or the folder is not usable. If no shard was finished by then,
            the folder is left as it was.
        KeyboardInterrupt: after Ctrl-C, with a line on standard error that says how to go on.
    """
    if (vocab_size is None) == (tokenizer is None):
        raise UserError("give either a vocabulary size, to train a tokenizer, or a tokenizer, and not both")
    if vocab_size is not None and vocab_size < MINIMUM_VOCAB_SIZE:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small: 256 bytes and the separator need {MINIMUM_VOCAB_SIZE}"
        )
    workers = usable_cores() if workers is None else workers
    if workers < 1 or shard_tokens < 1:
        raise UserError(f"workers and shard_tokens must be at least 1, not {workers} and {shard_tokens}")
    if not sources:
        raise UserError("no sources given: name at least one file, hub dataset or bundled sample")
    if tasks and len(tasks) != len(sources):
        raise UserError(
            f"{len(tasks)} --task for {len(sources)} sources: give one for each source, in the same order, or none"
        )
    given = Tokenizer.load(tokenizer) if tokenizer is not None else None
    columns = Columns(tuple(sliders), instruction)
    opened = [open_source(name, field, split, columns) for name in sources]
    request = Request(
        sources=tuple(source.record() for source in opened),
        tokenizer_sha256=given.fingerprint if given else None,
        vocab_size=vocab_size,
        field=field,
        split=split,
        shard_tokens=shard_tokens,
        tasks=tuple(tasks),
    )
    out_existed = out.exists()
    finished = _check_folder(out, request)
    if finished:
        write_columns(out, opened, columns, progress)
        return finished
    try:
        preparation = _Preparation(opened, out, request)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    try:
        with ProgressReport("prepare", sum(source.size for source in opened), enabled=progress) as report:
            manifest = preparation.run(given, workers, report)
        write_columns(out, opened, columns, progress)
        return manifest
    except UserError:
        if not preparation.journal.shards:
            _clear(out, remove_folder=not out_existed)
        raise
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror}; mend it and run the same command again") from None
    except KeyboardInterrupt:
        count = len(preparation.journal.shards)
        print(
            f"Interrupted: {count} finished shard{'' if count == 1 else 's'} kept in {out}; "
            "run the same command again to go on.",
            file=sys.stderr,
        )
        raise


class _Preparation:
    """The state of one run: what is on disk already, and the shard being written."""

    def __init__(self, sources: list[Source], out: Path, request: Request) -> None:
        self.sources, self.out = sources, out
        self.hash = hashlib.sha256()
        out.mkdir(parents=True, exist_ok=True)
        if (out / JOURNAL).is_file():
            self.journal = self._resume(request)
        else:
            self.journal = _Journal(request=request)
            self._note()

    def run(self, given: Tokenizer | None, workers: int, report: ProgressReport) -> Manifest:
        tokenizer = given or self._trained_tokenizer()
        if not (self.out / "tokenizer.json").is_file():
            tokenizer.save(self.out)
        self._write_shards(tokenizer, workers, report)
        shards = self.journal.shards
        dtype = token_dtype(tokenizer.vocab_size)
        documents = [sum(counts) for counts in zip(*(done.documents for done in shards), strict=True)]  # of each source
        manifest = Manifest(
            tokens=sum(done.shard.tokens for done in shards),
            documents=sum(documents),
            text_bytes=sum(done.text_bytes for done in shards),
            dtype="uint16" if dtype.itemsize == 2 else "uint32",
            vocab_size=tokenizer.vocab_size,
            separator_id=tokenizer.separator_id,
            tokenizer_sha256=tokenizer.fingerprint,
            hash=self.hash.hexdigest(),
            shards=tuple(done.shard for done in shards),
            request=self.journal.request,
            tasks=tuple(
                TaskRecord(name=name, documents=count)
                for name, count in zip(self.journal.request.tasks, documents, strict=False)  # no tasks, or one each
            ),
        )
        write_atomically(self.out / MANIFEST, manifest.to_json())
        (self.out / JOURNAL).unlink()
        return manifest

    def _resume(self, request: Request) -> _Journal:
        """The journal up to the first shard that is missing or damaged; that one and those after it are made again."""
        path = self.out / JOURNAL
        try:
            journal = _Journal.model_validate_json(path.read_bytes())
        except ValueError:
            raise UserError(f"{path} cannot be read: delete the folder {self.out} and prepare it anew") from None
        _check_same(self.out, journal.request, request)
        good: list[_Shard] = []
        for done in journal.shards:
            path, before = self.out / done.shard.name, self.hash.copy()
            if not path.is_file() or file_sha256(path, self.hash) != done.shard.sha256:
                self.hash = before
                break
            good.append(done)
        return _Journal(request=request, shards=tuple(good))

    def _note(self) -> None:
        write_atomically(self.out / JOURNAL, self.journal.to_json())

    def _trained_tokenizer(self) -> Tokenizer:
        """The tokenizer of an earlier, interrupted run, or one trained now: the same either way."""
        if (self.out / "tokenizer.json").is_file():
            return Tokenizer.load(self.out)
        assert self.journal.request.vocab_size is not None
        share = TRAINING_BYTES // len(self.sources)
        texts = chain.from_iterable(_first_texts(source, share) for source in self.sources)
        return Tokenizer.train(texts, self.journal.request.vocab_size)

    def _write_shards(self, tokenizer: Tokenizer, workers: int, report: ProgressReport) -> None:
        start = Place(0, 0)
        if self.journal.shards:
            start = Place(self.journal.shards[-1].source, self.journal.shards[-1].document)
        dtype, limit = token_dtype(tokenizer.vocab_size), self.journal.request.shard_tokens
        tokens = sum(done.shard.tokens for done in self.journal.shards)
        writer = ShardWriter(self.out, len(self.journal.shards), dtype, self.hash)
        end = start
        try:
            for batch, (encoded, ends) in encode_in_order(
                tokenizer, dtype, placed_pieces(self.sources, start), workers
            ):
                written = 0
                for index, (place, piece) in enumerate(batch):
                    begin = ends[index - 1] if index else 0
                    if piece.first and writer.tokens + begin - written >= limit:
                        writer.append(encoded[written:begin])
                        self._finish_shard(writer, place)
                        writer = ShardWriter(self.out, len(self.journal.shards), dtype, self.hash)
                        written = begin
                    writer.documents[place.source] += piece.first
                    writer.text_bytes += piece.bytes
                    end = Place(place.source, place.document + 1)
                writer.append(encoded[written:])
                tokens += len(encoded)
                report.update(sum(source.consumed for source in self.sources), tokens)
            if writer.tokens:
                self._finish_shard(writer, end)
        finally:
            writer.close()

    def _finish_shard(self, writer: "ShardWriter", following: Place) -> None:
        done = _Shard(
            shard=writer.finish(),
            documents=tuple(writer.documents[number] for number in range(len(self.sources))),
            text_bytes=writer.text_bytes,
            source=following.source,
            document=following.document,
        )
        self.journal = _Journal(request=self.journal.request, shards=(*self.journal.shards, done))
        self._note()


def _first_texts(source: Source, limit: int) -> Iterator[str]:
    """The first documents of a source, up to the one that reaches `limit` bytes."""
    size = 0
    for piece in source.pieces():
        yield piece.text
        size += piece.bytes
        if size >= limit:
            return


def _check_folder(out: Path, request: Request) -> Manifest | None:
    """The manifest if the folder is finished. Raises UserError where `out` holds anything else than this
    preparation."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder to write to")
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    foreign = [name for name in names if not _OWN_FILE.fullmatch(name)]
    begun = MANIFEST in names or JOURNAL in names or all(name.endswith(PART_SUFFIX) for name in names)
    if foreign or not begun:
        raise UserError(f"{out} holds something else ({(foreign or names)[0]}): name a new or an empty folder")
    if MANIFEST not in names:
        return None
    manifest = Manifest.read(out)
    _check_same(out, manifest.request, request)
    dataset = TokenDataset.open(out)
    dataset.verify()
    dataset.tokenizer()
    (out / JOURNAL).unlink(missing_ok=True)
    return manifest


def _check_same(out: Path, old: Request, new: Request) -> None:
    if old.sources != new.sources:
        changed = next((s.name for s in new.sources if s not in old.sources), "their number or order")
        raise UserError(f"{out} was begun from other sources (changed: {changed}): delete it, or name another folder")
    for name, value in new:
        if getattr(old, name) != value:
            raise UserError(
                f"{out} was begun with {name} {getattr(old, name)}, now it is {value}: "
                "use the same options, delete the folder, or name another"
            )


def _clear(out: Path, remove_folder: bool) -> None:
    """Take back what a preparation wrote that failed before its first shard."""
    if remove_folder:
        shutil.rmtree(out)
        return
    for path in out.iterdir():
        if _OWN_FILE.fullmatch(path.name):
            path.unlink()
