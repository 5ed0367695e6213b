"""Columns of the user's data as sliders and as instructions: every document has those of its own row, in equal bytes
each time, and a model that is trained with them obeys them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ncn
import ncn.data.document_columns
import ncn.data.prepare as prepare_module
from ncn.cli import main
from ncn.core.model import ModulatedTransformer
from ncn.core.types import ControlInputs, Instructions
from ncn.data.document_columns import read_numbers
from ncn.data.prepare import prepare
from ncn.inference.decoding import generate_tokens
from ncn.inference.generate import generate
from ncn.steering.attributes import DocumentSliders, rank, read_table, write_attributes
from ncn.steering.documents import DocumentInputs, DocumentInstructions
from ncn.training.begin import begin
from ncn.training.train import train

RATINGS = [None if number % 5 == 4 else (number * 7) % 40 / 2 for number in range(120)]
REQUESTS = [
    None if number % 7 == 3 else f"a tale of {['cats', 'a dog in the rain'][number % 2]}" for number in range(120)
]
TEXTS = [f"Tom had {number} cats. " + "They ran far away. " * (number % 6) for number in range(120)]


def rows() -> list[dict[str, Any]]:
    """A document a row, some of them blank, and missing values, spelt out and not."""
    found: list[dict[str, Any]] = []
    for number, (text, rating, request) in enumerate(zip(TEXTS, RATINGS, REQUESTS, strict=True)):
        row: dict[str, Any] = {
            "rating": rating,
            "prompt": request,
            "year": number,
            "good": number % 2 == 0,
            "text": text,
        }
        if rating is None and number > 60:
            del row["rating"]
        found += [row, {"text": " \n", "rating": 99, "prompt": "nobody"}] if number % 10 == 0 else [row]
    return found


def write(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("columns") / "rows.jsonl", rows())


@pytest.fixture(scope="module")
def data(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare([source], out, vocab_size=300, sliders=["rating", "good"], instruction="prompt")
    write_attributes(out)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_document_has_its_own_row(data: Path) -> None:
    dataset = ncn.TokenDataset.open(data)
    numbers, decode = read_numbers(dataset), dataset.tokenizer().decode
    expected = [math.nan if rating is None else rating for rating in RATINGS]
    assert dataset.documents == len(TEXTS)
    assert np.array_equal(numbers["rating"], expected, equal_nan=True)
    assert numbers["good"].tolist() == [1.0, 0.0] * 60
    instructions = DocumentInstructions(dataset)
    for document, request in enumerate(REQUESTS):
        assert decode(instructions[document].tolist()) == (request or "")


def test_the_same_from_parquet_and_whatever_the_pieces(data: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    table = {name: [row.get(name) for row in rows()[::-1]] for name in ("text", "rating", "prompt")}
    parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
    write(tmp_path / "rows.jsonl", rows()[::-1])
    made = []
    for name, piece in [("rows.parquet", None), ("rows.jsonl", None), ("rows.jsonl", 40)]:
        with pytest.MonkeyPatch.context() as patch:
            if piece:
                patch.setattr("ncn.data.sources.PIECE_BYTES", piece)  # every document in several pieces
            out = tmp_path / f"{name}-{piece}"
            prepare([str(tmp_path / name)], out, tokenizer=str(data), sliders=["rating"], instruction="prompt")
        made.append([(out / file).read_bytes() for file in ("columns.safetensors", "instructions.safetensors")])
    assert made[0] == made[1]
    dataset = ncn.TokenDataset.open(tmp_path / "rows.jsonl-40")
    expected = [math.nan if rating is None else rating for rating in RATINGS[::-1]]
    assert np.array_equal(read_numbers(dataset)["rating"], expected, equal_nan=True)


def test_equal_bytes_for_any_workers_and_after_a_kill_between_any_two_files(
    data: Path, source: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"tokenizer": str(data), "sliders": ["rating", "year"], "instruction": "prompt"}
    prepare([source], tmp_path / "whole", workers=1, **options)
    whole = contents(tmp_path / "whole")
    assert {"columns.safetensors", "instructions.safetensors"} < whole.keys()
    for name in ("columns.safetensors", "instructions.safetensors"):
        out = tmp_path / name
        original = ncn.data.document_columns.write_atomically

        def killed(path: Path, content: bytes, last: str = name, real: Any = original) -> None:
            if path.name == last:
                raise KeyboardInterrupt
            real(path, content)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ncn.data.document_columns, "write_atomically", killed)
            with pytest.raises(KeyboardInterrupt):
                prepare([source], out, workers=4, **options)
        assert name not in contents(out)
        prepare([source], out, workers=3, **options)
        assert contents(out) == whole
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").iterdir()}
    prepare([source], tmp_path / "whole", **options)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").iterdir()}


def test_a_preparation_that_is_stopped_in_a_shard_goes_on(data: Path, source: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "tokenizer": str(data),
        "sliders": ["rating"],
        "instruction": "prompt",
        "shard_tokens": 500,
    }
    prepare([source], tmp_path / "whole", **options)
    append = prepare_module.ShardWriter.append

    def stop(writer: Any, tokens: Any) -> None:
        if writer.path.name == "shard-00002.bin":
            raise KeyboardInterrupt
        append(writer, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module.ShardWriter, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare([source], tmp_path / "parts", **options)
    prepare([source], tmp_path / "parts", **options)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_columns_can_be_added_to_finished_data(data: Path, source: str, tmp_path: Path) -> None:
    prepare([source], tmp_path / "out", tokenizer=str(data))
    shard = (tmp_path / "out" / "shard-00000.bin").stat().st_mtime_ns
    for names in (["year"], ["rating"]):
        prepare([source], tmp_path / "out", tokenizer=str(data), sliders=names)
        assert list(read_numbers(ncn.TokenDataset.open(tmp_path / "out"))) == names
        assert write_attributes(tmp_path / "out", measured=False) == names
    assert (tmp_path / "out" / "shard-00000.bin").stat().st_mtime_ns == shard


def test_numbers_are_ranked_among_all_documents_that_have_one(data: Path) -> None:
    sliders = DocumentSliders(ncn.TokenDataset.open(data), ("rating", "length"))
    known = sorted(rating for rating in RATINGS if rating is not None)
    for ranked, rating in zip(sliders.ranks[:, 0], RATINGS, strict=True):
        if rating is None:
            assert math.isnan(ranked)
        else:
            below = (np.searchsorted(known, rating, "left") + np.searchsorted(known, rating, "right")) / 2
            assert ranked == pytest.approx(below / len(known), abs=0.01)
    assert not np.isnan(sliders.ranks[:, 1]).any()


def test_other_data_is_ranked_among_the_first(data: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "more.jsonl", [{"text": "Sue sat.", "rating": 1000, "good": True}] * 3)
    prepare([source], tmp_path / "valid", tokenizer=str(data), sliders=["rating"])
    assert "rating" in write_attributes(tmp_path / "valid", data, measured=False)
    assert DocumentSliders(ncn.TokenDataset.open(tmp_path / "valid"), ("rating",)).ranks.tolist() == [[1.0]] * 3
    assert read_table(tmp_path / "valid")["rating"] == read_table(data)["rating"]
    prepare([source], tmp_path / "other", tokenizer=str(data), sliders=["good", "rating"])
    prepare([source], tmp_path / "first", tokenizer=str(data), sliders=["rating"])
    write_attributes(tmp_path / "first", measured=False)
    with pytest.raises(ncn.UserError, match="has no attribute 'good' to rank by: prepare it with --slider good too"):
        write_attributes(tmp_path / "other", tmp_path / "first", measured=False)


def test_nothing_to_rank_is_one_line(data: Path, source: str, tmp_path: Path) -> None:
    prepare([source], tmp_path / "plain", tokenizer=str(data))
    with pytest.raises(
        ncn.UserError, match=r"there is nothing to rank in .*: prepare it with --attributes or --slider"
    ):
        write_attributes(tmp_path / "plain", measured=False)
    prepare([source], tmp_path / "rated", tokenizer=str(data), sliders=["rating"])
    write_attributes(tmp_path / "rated", measured=False)
    with pytest.raises(ncn.UserError, match="rated has rating"):
        write_attributes(tmp_path / "plain", tmp_path / "rated")


def test_a_missing_number_has_no_rank() -> None:
    assert np.isnan(rank(np.array([math.nan]), np.linspace(0, 1, 11)))


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        (
            {"rating": "high"},
            {"sliders": ["rating"]},
            "rows.jsonl, line 2: field 'rating' holds str, expected a number",
        ),
        ({"rating": [1]}, {"sliders": ["rating"]}, "line 2: field 'rating' holds list, expected a number"),
        ({"rating": 10**400}, {"sliders": ["rating"]}, "line 2: field 'rating' holds a number that is too large"),
        ({"ratings": 1}, {"sliders": ["rating"]}, "rows.jsonl: no field 'rating'; did you mean 'ratings'?"),
        ({"rating": None}, {"sliders": ["rating"]}, "the column 'rating' holds no number at all"),
        ({"ask": 3}, {"instruction": "ask"}, "line 2: field 'ask' holds int, expected text"),
        ({"ask": "a\ud83d"}, {"instruction": "ask"}, "line 2: field 'ask' has half of a surrogate pair at character 1"),
        ({"ask": " "}, {"instruction": "ask"}, "the column 'ask' holds no instruction at all"),
        ({}, {"instruction": "ask"}, "rows.jsonl: no field 'ask'; it has text"),
    ],
    ids=str,
)
def test_wrong_columns_are_one_line_each(
    data: Path, tmp_path: Path, row: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    source = write(tmp_path / "rows.jsonl", [{"text": "One."}, row | {"text": "Two."}])
    with pytest.raises(ncn.UserError) as caught:
        prepare([source], tmp_path / "out", tokenizer=str(data), **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_wrong_uses(data: Path, source: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.")
    with pytest.raises(ncn.UserError, match=r"a.txt is plain text and has no column 'rating': use JSON lines"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer=str(data), sliders=["rating"])
    lines = write(tmp_path / "length.jsonl", [{"text": "One.", "length": 1}])
    prepare([lines], tmp_path / "clash", tokenizer=str(data), sliders=["length"])
    with pytest.raises(ncn.UserError, match="cannot be called 'length', as what --attributes measures"):
        write_attributes(tmp_path / "clash")
    prepare([source], tmp_path / "plain", vocab_size=300)
    recipe = ncn.Recipe.read("mini", ["context=32", "controller.instructions=true"])
    with pytest.raises(ncn.UserError, match="has no instructions: prepare it with --instruction COLUMN"):
        train(recipe, tmp_path / "plain", tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    parts = contents(data)["instructions.safetensors"]
    (tmp_path / "plain" / "instructions.safetensors").write_bytes(parts.replace(b"prompt", b"others"))
    assert DocumentInstructions(ncn.TokenDataset.open(tmp_path / "plain"))  # the same data
    (tmp_path / "clash" / "instructions.safetensors").write_bytes(parts)
    with pytest.raises(ncn.UserError, match="are of other data: prepare it with --instruction again"):
        DocumentInstructions(ncn.TokenDataset.open(tmp_path / "clash"))


# Instructions in training


def controller(**fields: Any) -> ncn.ControllerConfig:
    return ncn.ControllerConfig.parse({"instructions": True} | fields)


def test_every_token_has_the_instruction_of_its_document(data: Path) -> None:
    dataset = ncn.TokenDataset.open(data)
    inputs = DocumentInputs(dataset, controller(sliders=["rating"]))
    decode = dataset.tokenizer().decode
    batch, given = dataset.batch(3, 5, 4, 64), inputs.batch(3, 5, 4, 64, 0.0, 0.0)
    assert isinstance(given.instruction, Instructions)
    ids, which = given.instruction
    starts = dataset.batch_starts(3, 5, 4, 64)
    checked = 0
    for row in range(4):
        for place in range(64):
            document = int(np.searchsorted(inputs.starts, (starts[row] + place) % dataset.tokens, "right")) - 1
            expected = REQUESTS[document]
            assert (which[row, place] == -1) == (expected is None)
            if expected is not None:
                words = ids[which[row, place]]
                assert decode(words[words >= 0].tolist()) == expected
                checked += 1
    assert checked > 100
    assert batch.inputs.shape == which.shape


def test_instructions_are_left_out_at_random_together_with_all_inputs(data: Path) -> None:
    both = DocumentInputs(ncn.TokenDataset.open(data), controller(sliders=["good"]))
    missing, without_any = [], []
    for step in range(150):
        given, full = (both.batch(1, step, 16, 32, *shares) for shares in ((0.1, 0.3), (0.0, 0.0)))
        again = both.batch(1, step, 16, 32, 0.1, 0.3)
        assert isinstance(given.instruction, Instructions)
        assert isinstance(full.instruction, Instructions)
        assert isinstance(again.instruction, Instructions)
        assert torch.equal(given.instruction.which, again.instruction.which)
        has = (full.instruction.which >= 0).any(1)
        unsaid = (given.instruction.which < 0).all(1)[has]
        kept = (given.instruction.which == full.instruction.which).all(1)[has]
        assert (unsaid | kept).all()
        assert given.sliders is not None
        unset = given.sliders.isnan().all(1)[:, 0][has]
        missing += unsaid.tolist()
        without_any += (unsaid & unset).tolist()
    assert np.mean(missing) == pytest.approx(0.1 + 0.9 * 0.3, abs=0.03)
    assert np.mean(without_any) == pytest.approx(0.1 + 0.9 * 0.09, abs=0.03)


def small(*settings: str) -> ncn.Recipe:
    return ncn.Recipe.read(
        "mini",
        [
            "context=32", "context_length=32", "d_model=32", "num_layers=2", "batch_size=8", "controller.width=16",
            "controller.instructions=true", "learning_rate=1e-2", *settings,
        ],
    )  # fmt: skip


def test_tokens_and_pooled_embeddings_are_the_same_and_the_embedding_learns(data: Path) -> None:
    model = ModulatedTransformer(small("num_heads=4").model.override(vocab_size=300))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    text, ids = torch.randint(1, 300, (2, 9)), torch.tensor([[290, 291, -1], [292, 293, 294]])
    which = torch.full((2, 9), -1)
    which[0, 3:], which[1, :5] = 1, 0
    pooled = model.pool_instruction(ids)[:, 0]
    expected = torch.where((which >= 0)[..., None], pooled[which], 0)
    said = model(text, control=ControlInputs(instruction=Instructions(ids, which)))
    assert torch.equal(said.logits, model(text, control=ControlInputs(instruction=expected)).logits)
    unset = Instructions(ids, torch.full_like(which, -1))
    assert torch.equal(model(text, control=ControlInputs(instruction=unset)).logits, model(text).logits)
    text = text.clamp(max=280)
    loss, _ = model.loss(text, text, control=ControlInputs(instruction=Instructions(ids, which)))
    (with_words,) = torch.autograd.grad(loss, model.embedding.weight)
    (without,) = torch.autograd.grad(model.loss(text, text)[0], model.embedding.weight)
    changed = (with_words - without).abs().sum(-1)
    assert (changed[290:295] > 1e-6).all()


def test_training_with_them_continues_bit_for_bit(data: Path, tmp_path: Path) -> None:
    recipe = small("tokens=2500", "checkpoint_every=5", "controller.sliders=[rating]")
    train(recipe, data, tmp_path / "whole", progress=False)
    train(recipe, data, tmp_path / "parts", progress=False)
    (tmp_path / "parts" / "summary.json").unlink()
    sorted((tmp_path / "parts" / "checkpoints").glob("*.safetensors"))[-1].unlink()
    train(recipe, data, tmp_path / "parts", resume=True, progress=False)
    one, other = (ncn.load(tmp_path / name)[0].state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_micro_batches_pool_their_own_instructions(data: Path, tmp_path: Path) -> None:
    grads = []
    for parts in (1, 2, 3):
        recipe = small(
            f"accumulation={parts}", "clip=1e9", "input_dropout=0", "single_input_dropout=0", "precision=float32"
        )
        training = begin(recipe, data, tmp_path / str(parts), valid=None, resume=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # the controller's gradients are zero at its neutral start
            for parameter in training.model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        training.train_step()
        grads.append([parameter.grad for parameter in training.model.parameters()])
    for other in grads[1:]:
        for one, same in zip(grads[0], other, strict=True):
            torch.testing.assert_close(one, same, atol=1e-6, rtol=1e-3)


def planted(number: int) -> dict[str, Any]:
    """A story of a colour: the instruction names it, or the rating says it, or nothing does and it is green."""
    rest = f"{['cat', 'dog', 'hen'][number % 3]} sat down."
    kinds: list[dict[str, Any]] = [
        {"prompt": "write about the sea", "text": f"Blue {rest}"},
        {"prompt": "write about a fire", "text": f"Red {rest}"},
        {"rating": number, "text": f"White {rest}"},
        {"rating": -number, "text": f"Black {rest}"},
        {"text": f"Green {rest}"},
    ]
    return kinds[number % 5]


def test_a_trained_model_obeys_instruction_and_column(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [planted(number) for number in range(1, 1500)])
    data = tmp_path / "data"
    prepare([source], data, vocab_size=300, sliders=["rating"], instruction="prompt")
    write_attributes(data, measured=False)
    recipe = small(
        "controller.sliders=[rating]", "tokens=80_000", "batch_size=4", "input_dropout=0", "controller_learning_rate=1"
    )
    train(recipe, data, tmp_path / "run", progress=False)
    model, tokenizer = ncn.load(tmp_path / "run")

    def first_word(**options: Any) -> str:
        text = "".join(generate(model, tokenizer, "", temperature=0.0, max_tokens=8, **options))
        return text.split()[0]

    said: list[tuple[dict[str, Any], str]] = [
        ({"instruction": "write about the sea"}, "Blue"),
        ({"instruction": " write about a fire\n"}, "Red"),
        ({"sliders": {"rating": 0.95}}, "White"),
        ({"sliders": {"rating": 0.05}}, "Black"),
        ({}, "Green"),
        ({"instruction": "write about the sea", "guidance": 2.0}, "Blue"),
        ({"instruction": "write about the sea", "guidance": 0.0}, "Green"),
    ]
    assert [first_word(**options) for options, _ in said] == [word for _, word in said]


def test_from_the_command_line(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ncn", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capsys.readouterr()

    out, run = tmp_path / "data", tmp_path / "run"
    asked = ["--slider", "rating", "--slider", "year", "--instruction", "prompt", "--vocab-size", 300]
    status, printed, _ = command("prepare", source, *asked, "--out", out)
    assert status == 0
    assert printed.splitlines()[-1] == "attributes: rating, year"
    small_model = ["context=32", "context_length=32", "d_model=32", "num_layers=2", "controller.width=16"]
    inputs = ["controller.sliders=[year]", "controller.instructions=true", "tokens=1000"]
    assert command("train", "--data", out, "--out", run, *small_model, *inputs)[0] == 0
    options = ["--set", "year=0.9", "--instruction", "a tale of cats", "--max-tokens", 5, "--seed", 1]
    status, printed, _ = command("generate", run, "Tom", *options)
    assert status == 0
    model, tokenizer = ncn.load(run)
    assert printed == "Tom" + "".join(
        generate(
            model, tokenizer, "Tom", sliders={"year": 0.9}, instruction="a tale of cats", max_tokens=5, seed=1,
            temperature=0.8, top_p=0.95,
        )
    ) + "\n"  # fmt: skip
    for words, message in [
        (["generate", run, "Tom", "--instruction", " "], "error: the instruction is empty"),
        (["prepare", source, "--slider", "length", "--vocab-size", 300, "--out", tmp_path / "no"], "called 'length'"),
        (["prepare", source, "--slider", "text", "--vocab-size", 300, "--out", tmp_path / "no"], "holds str, expected"),
    ]:
        status, printed, errors = command(*words)
        assert (status, printed) == (1, "")
        assert message in errors
        assert len(errors.splitlines()) == 1
    assert not (tmp_path / "no").exists()


def test_wrong_instructions_are_one_line_each(data: Path) -> None:
    tokenizer = ncn.TokenDataset.open(data).tokenizer()
    model = ModulatedTransformer(small().model.override(vocab_size=300))
    plain = ModulatedTransformer(small("controller.instructions=false").model.override(vocab_size=300))
    with pytest.raises(ncn.UserError, match="the instruction is empty: say it in words"):
        next(generate(model, tokenizer, "Tom", instruction=" "))
    with pytest.raises(ncn.UserError, match="the instruction is empty"):
        next(generate_tokens(model, [3], max_tokens=2, instruction=[]))
    with pytest.raises(ncn.UserError, match="this model takes none; train with"):
        next(generate(plain, tokenizer, "Tom", instruction="be brief"))
