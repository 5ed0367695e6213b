"""The columns of a dataset's documents, in two files beside its shards.

`columns.safetensors` holds the numbers of each column, (documents,), NaN where there is none;
`instructions.safetensors` the tokens of all instructions, one after the other, and where each document's end. They are
read in a second pass over the sources, so that a preparation that is killed makes them anew, with equal bytes.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors
from safetensors.numpy import load_file, save

from ncn.data.columns import Columns
from ncn.data.dataset import TokenDataset
from ncn.data.manifest import Manifest, token_dtype
from ncn.data.sources import Source
from ncn.data.tokenizer import Tokenizer
from ncn.errors import UserError
from ncn.machine.files import write_atomically
from ncn.machine.progress import ProgressReport

NUMBERS, INSTRUCTIONS = "columns.safetensors", "instructions.safetensors"
_OF = "of"
"""The key under which both files say which data they belong to."""
_BATCH = 4096


def write_columns(folder: Path, sources: Iterable[Source], columns: Columns, progress: bool) -> None:
    """Read `columns` of the documents of a finished dataset, and write their files, unless they are there already.

    Raises `UserError` for a column without a single value.
    """
    if not columns.names or _are_there(folder, columns):
        return
    manifest, opened = Manifest.read(folder), list(sources)
    numbers = np.full((manifest.documents, len(columns.sliders)), np.nan)
    words: list[str] = []
    document = 0
    with ProgressReport("columns", sum(source.size for source in opened), progress) as report:
        for source in opened:
            for piece in source.pieces():
                if piece.first:
                    numbers[document] = piece.beside.numbers
                    words.append(piece.beside.instruction)
                    document += 1
                report.update(sum(source.consumed for source in opened), document)
    for name, values in zip(columns.sliders, numbers.T, strict=True):
        if np.isnan(values).all():
            raise UserError(f"the column {name!r} holds no number at all: there is nothing to make a slider of")
    if columns.sliders:
        tensors = {name: np.ascontiguousarray(column) for name, column in zip(columns.sliders, numbers.T, strict=True)}
        write_atomically(folder / NUMBERS, save(tensors, {_OF: manifest.hash}))
    if columns.instruction is not None:
        if not any(words):
            raise UserError(f"the column {columns.instruction!r} holds no instruction at all")
        found = _tokens(Tokenizer.load(folder), words)
        write_atomically(folder / INSTRUCTIONS, save(found, {_OF: f"{manifest.hash} {columns.instruction}"}))


def read_numbers(dataset: TokenDataset) -> dict[str, npt.NDArray[np.float64]]:
    """The numbers of a dataset's documents by column; empty where it was prepared without."""
    path = dataset.folder / NUMBERS
    return load_file(path) if _says(path) == dataset.fingerprint else {}


def read_instructions(dataset: TokenDataset) -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.int64]]:
    """The tokens of all instructions, and where each document's end: where that of the one before does, if it has none.

    Raises `UserError` where the dataset has no instructions.
    """
    path = dataset.folder / INSTRUCTIONS
    said = _says(path)
    if said is None:
        raise UserError(f"{dataset.folder} has no instructions: prepare it with --instruction COLUMN")
    if said.partition(" ")[0] != dataset.fingerprint:
        raise UserError(f"the instructions in {dataset.folder} are of other data: prepare it with --instruction again")
    found = load_file(path)
    return found["tokens"], found["ends"]


def _tokens(tokenizer: Tokenizer, words: list[str]) -> dict[str, npt.NDArray[np.generic]]:
    ids: list[list[int]] = []
    for first in range(0, len(words), _BATCH):
        ids += tokenizer.encode_batch(words[first : first + _BATCH])
    flat = [token for instruction in ids for token in instruction]
    return {
        "tokens": np.array(flat, dtype=token_dtype(tokenizer.vocab_size)),
        "ends": np.cumsum([len(instruction) for instruction in ids], dtype=np.int64),
    }


def _are_there(folder: Path, columns: Columns) -> bool:
    data = Manifest.read(folder).hash
    if columns.sliders:
        if _says(folder / NUMBERS) != data:
            return False
        with safetensors.safe_open(folder / NUMBERS, framework="numpy") as file:
            if set(file.keys()) != set(columns.sliders):
                return False
    return columns.instruction is None or _says(folder / INSTRUCTIONS) == f"{data} {columns.instruction}"


def _says(path: Path) -> str | None:
    """Which data a file belongs to; None where there is no such file, or one that cannot be read."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            said: str | None = (file.metadata() or {}).get(_OF)
            return said
    except (OSError, safetensors.SafetensorError):
        return None
