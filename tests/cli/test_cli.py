"""The `ncn` command: every verb end to end on real files, and one line on standard error for every mistake."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from ncn.cli import main
from ncn.config.model import ControllerConfig, NCNConfig
from ncn.config.presets import presets
from ncn.config.training import TrainConfig
from ncn.data.dataset import TokenDataset
from ncn.inference.evaluate import evaluate
from ncn.models.saved import load, save_model
from ncn.scans.recording import scan
from ncn.scans.scan import Scan
from ncn.training.run_folder import RunFolder
from tiny import prepare_text, recipe, stories


class Result(NamedTuple):
    status: int
    printed: str
    errors: str


Command = Callable[..., Result]


@pytest.fixture
def ncn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Runs the command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["ncn", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return Result(int(stop.value.code or 0), *capsys.readouterr())

    return run


def refused(result: Result) -> str:
    """The one line that a mistake ends in."""
    assert result.status in (1, 2)
    assert result.printed == ""
    (line,) = result.errors.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.json"
    path.write_text(recipe().model_dump_json())
    return path


# Every verb


def test_prepare(ncn: Command, tmp_path: Path) -> None:
    text = stories(0, 3000)
    (tmp_path / "a.txt").write_text(text)
    result = ncn("prepare", "a.txt", "--out", "made", "--vocab-size", 280)
    assert result.status == 0
    dataset = TokenDataset.open(tmp_path / "made")
    assert dataset.vocab_size == 280
    assert f"{dataset.tokens:,} tokens, {dataset.text_bytes:,} bytes of text, vocabulary 280" in result.printed


def test_train_resumes_and_prints_its_summary(
    ncn: Command, tmp_path: Path, data: Path, valid: Path, finished: Path, recipe_file: Path
) -> None:
    words = ["train", "--config", recipe_file, "--data", data, "--valid", valid, "--out", tmp_path / "run"]
    result = ncn(*words)
    assert result.status == 0
    summary, expected = RunFolder.open(tmp_path / "run").summary(), RunFolder.open(finished).summary()
    assert summary["validation_loss"] == expected["validation_loss"]
    assert f"{summary['validation_loss']:.4f}" in result.printed

    again = ncn(*words, "--resume")
    assert again.status == 0
    assert "is finished already" in again.printed
    assert f"{summary['validation_loss']:.4f}" in again.printed


def test_train_takes_settings_and_flags(ncn: Command, tmp_path: Path, data: Path, recipe_file: Path) -> None:
    words = ["--config", recipe_file, "--data", data, "tokens=256"]
    settings = ["train.learning_rate=3e-3", "controller.taps=[0,1]", "optimizer=muon"]
    assert ncn("train", *words, "--out", "one", *settings).status == 0
    one = RunFolder.open(tmp_path / "one").recipe()
    assert (one.train.learning_rate, one.train.optimizer, one.train.tokens) == (3e-3, "muon", 256)
    assert one.model.controller is not None
    assert one.model.controller.taps == (0, 1)

    assert ncn("train", *words, "--out", "two", "--baseline").status == 0
    assert RunFolder.open(tmp_path / "two").recipe().model.controller is None


def test_generate(ncn: Command, finished: Path) -> None:
    words = ["generate", finished, "Once upon", "--max-tokens", 8, "--seed", 3]
    result = ncn(*words)
    assert result.status == 0
    assert result.printed.startswith("Once upon")
    assert len(result.printed) > len("Once upon\n")
    assert ncn(*words) == result
    assert ncn("generate", finished / "model", "Once upon", "--max-tokens", 8, "--seed", 3) == result
    assert ncn("generate", finished, "", "--max-tokens", 3, "--temperature", 0).status == 0


def test_evaluate(ncn: Command, tmp_path: Path, finished: Path, valid: Path) -> None:
    result = ncn("evaluate", finished, "--data", valid, "--json", "figures.json")
    assert result.status == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    expected = evaluate(load(finished)[0], TokenDataset.open(valid))
    assert figures["evaluation"] == expected.as_dict()
    assert list(figures["frozen"]) == ["all", "gain", "precision", "ffn_gate", "head_gate"]
    assert f"loss {expected.loss:.4f} nats a token" in result.printed
    assert f"{expected.bits_per_byte:.4f} bits per byte" in result.printed
    for position in expected.by_position:
        assert f"\n{position:>13s} " in result.printed
    assert f"{figures['frozen']['gain']['mean']['loss']:.4f}" in result.printed


def test_evaluate_says_how_far_it_is(
    ncn: Command, monkeypatch: pytest.MonkeyPatch, finished: Path, valid: Path
) -> None:
    monkeypatch.setattr("ncn.machine.progress._LINE_SECONDS", 0.0)
    lines = ncn("evaluate", finished, "--data", valid).errors.splitlines()
    assert all(line.startswith("evaluate: ") and "s left" in line and "tokens/s" in line for line in lines)
    shares = [float(line.split()[1].rstrip("%,")) for line in lines]
    assert shares == sorted(shares)
    assert shares[0] < 10
    assert shares[-1] == 100  # of all its passes


def test_evaluate_prepares_a_text_with_the_models_own_tokenizer(
    ncn: Command, tmp_path: Path, finished: Path, valid: Path
) -> None:
    (tmp_path / "valid.txt").write_text(stories(20_000, 23_000), "utf-8")
    from_text = ncn("evaluate", finished, "--data", "valid.txt").printed.splitlines()
    prepared = ncn("evaluate", finished, "--data", valid).printed.splitlines()
    assert from_text[1:] == prepared[1:]


def test_evaluate_a_baseline_freezes_nothing(ncn: Command, tmp_path: Path, finished: Path, valid: Path) -> None:
    from ncn.core.model import ModulatedTransformer

    model, tokenizer = load(finished)
    save_model(ModulatedTransformer(model.config.override(controller=None)), tmp_path / "baseline", tokenizer)
    result = ncn("evaluate", "baseline", "--data", valid)
    assert result.status == 0
    assert "frozen" not in result.printed


def test_scan(ncn: Command, tmp_path: Path, finished: Path) -> None:
    text = "Timmy saw a dog."
    (tmp_path / "text.txt").write_text(text)
    result = ncn("scan", finished, text, "--out", "a.json", "--out", "a.png", "--out", "a.html")
    assert result.status == 0
    assert result.printed.split() == ["a.json", "a.png", "a.html"]
    assert ncn("scan", finished, "--file", "text.txt", "--out", "b.json").status == 0
    expected = scan(*load(finished), text, name="finished").to_json()
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text() == expected
    assert Scan.from_json(expected).text == text
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (tmp_path / "a.html").read_text()


@pytest.mark.parametrize("name", presets())
def test_info(ncn: Command, name: str) -> None:
    result = ncn("info", name)
    assert result.status == 0
    rows = [line.split() for line in result.printed.splitlines() if " parameters " in line and "MFLOPs" in line]
    counts = [int(row[row.index("parameters") - 1].replace(",", "")) for row in rows]
    assert sum(counts[:-1]) == counts[-1]
    assert f"{counts[-1]:,} parameters" in result.printed.splitlines()[0]
    assert "of the parameters" in result.printed


def test_info_of_a_run_and_of_a_changed_preset(ncn: Command, finished: Path) -> None:
    assert f"{RunFolder.open(finished).summary()['parameters']:,} parameters" in ncn("info", finished).printed
    assert ncn("info", "mini", "num_layers=2").printed != ncn("info", "mini").printed
    assert "settings can only be changed in a preset" in refused(ncn("info", finished, "num_layers=2"))


def test_info_knows_the_optimiser_of_a_recipe_and_of_a_run(ncn: Command, finished: Path) -> None:
    def told(*words: str | Path) -> str:
        (line,) = (line for line in ncn("info", *words).printed.splitlines() if line.startswith("optimiser"))
        return line

    assert told("mini").endswith(" (Muon for the layers' matrices, AdamW for the rest)")
    assert told("mini", "optimizer=adamw").endswith(" (AdamW)")
    assert told("mini").split()[1] != told("mini", "optimizer=adamw").split()[1]
    used = RunFolder.open(finished).recipe().train.optimizer
    assert told(finished).endswith("(AdamW)" if used == "adamw" else "for the rest)")
    assert told(finished / "model").endswith("(AdamW)")  # how it was trained is not known here


# Help


def test_help_lists_the_verbs(ncn: Command) -> None:
    result = ncn("--help")
    assert result.status == 0
    for verb in ("prepare", "train", "generate", "evaluate", "scan", "info", "demo"):
        assert f"\n  {verb} " in result.printed


def test_help_of_train_explains_every_setting(ncn: Command) -> None:
    printed = ncn("train", "--help").printed
    words = " ".join(printed.split())
    for section, config in (("model.", NCNConfig), ("controller.", ControllerConfig), ("train.", TrainConfig)):
        for name, field in config.model_fields.items():
            assert f" {section}{name}" in words, name
            assert field.description, name
            assert " ".join(field.description.split()) in words, name
    for values in (
        "(one of: rope, learned)",
        "(one of: cosine, linear)",
        "(any of: gain, precision, ffn_gate, head_gate, norm_film, residual_mix)",
        "(any of: tensorboard, trackio, wandb)",
    ):
        assert values in words


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys\nsys.argv = ['ncn', 'train', '--help']\n"
        "from ncn.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "learning_rate" in done.stdout
    heavy = {"torch", "numpy", "transformers", "matplotlib", "tokenizers", "safetensors", "datasets", "pyarrow"}
    assert set(done.stderr.split()).isdisjoint(heavy)


# Mistakes


def test_mistakes_on_a_real_command_line() -> None:
    """Exit status and standard error as a shell sees them."""
    for words, status in ((["info", "mnii"], 1), (["train", "--dat", "x"], 2), (["nothing"], 2)):
        done = subprocess.run([sys.executable, "-m", "ncn", *words], capture_output=True, text=True, check=False)
        assert done.returncode == status
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        assert done.stderr.strip()


def test_unknown_settings_name_the_nearest(ncn: Command, data: Path, recipe_file: Path) -> None:
    words = ["train", "--config", recipe_file, "--data", data, "--out", "run"]
    assert "unknown setting 'learning_rat'; did you mean 'learning_rate'?" in refused(ncn(*words, "learning_rat=1"))
    assert "did you mean 'taps'?" in refused(ncn(*words, "controller.tapz=[0]"))
    assert "an override is written key=value, got 'muon'" in refused(ncn(*words, "muon"))
    assert "train.batch_size" in refused(ncn(*words, "batch_size=none"))
    assert "train.optimizer" in refused(ncn(*words, "optimizer=sgd"))
    assert "must be a multiple of num_heads" in refused(ncn(*words, "d_model=15"))


def test_unknown_options_name_the_nearest(ncn: Command, data: Path) -> None:
    result = ncn("train", "--data", data, "--out", "run", "--preste", "mini")
    assert result.status == 2
    assert "--preset" in result.errors


def test_unknown_presets_list_those_there_are(ncn: Command, data: Path) -> None:
    line = refused(ncn("train", "--preset", "mnii", "--data", data, "--out", "run"))
    assert "unknown preset 'mnii'; did you mean 'mini'?" in line
    assert "no folder 'mnii'" in refused(ncn("info", "mnii"))


def test_recipe_files_that_cannot_be_read(ncn: Command, tmp_path: Path, data: Path, recipe_file: Path) -> None:
    words = ["train", "--data", data, "--out", "run", "--config"]
    assert "give --preset or --config, not both" in refused(ncn(*words, recipe_file, "--preset", "mini"))
    assert "no configuration file" in refused(ncn(*words, "none.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [")
    assert "is not valid yaml" in refused(ncn(*words, "broken.yaml"))
    (tmp_path / "list.json").write_text("[]")
    assert "must hold a mapping" in refused(ncn(*words, "list.json"))


def test_data_that_cannot_be_used(ncn: Command, tmp_path: Path, data: Path, recipe_file: Path) -> None:
    words = ["train", "--config", recipe_file, "--out", "run", "--data"]
    assert "holds no prepared data: make it with ncn prepare" in refused(ncn(*words, "nowhere"))
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    shard = broken / "shard-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-10])
    assert "is truncated" in refused(ncn(*words, broken))
    other = prepare_text(tmp_path / "other", stories(0, 3000), vocab_size=270).folder
    line = refused(ncn(*words, data, "--valid", other))
    assert "prepared with different tokenizers" in line
    assert not (tmp_path / "run").exists()


def test_sources_that_cannot_be_prepared(ncn: Command, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Zoë".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "a.txt").write_text("a story")
    (tmp_path / "file").write_text("")
    assert "UTF-8" in refused(ncn("prepare", "latin.txt", "--out", "made", "--vocab-size", 270))
    assert "empty.txt" in refused(ncn("prepare", "empty.txt", "--out", "made", "--vocab-size", 270))
    assert "none.txt" in refused(ncn("prepare", "none.txt", "--out", "made", "--vocab-size", 270))
    assert "too small" in refused(ncn("prepare", "a.txt", "--out", "made", "--vocab-size", 5))
    assert "file/made" in refused(ncn("prepare", "a.txt", "--out", "file/made", "--vocab-size", 270))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("verb", ["generate", "evaluate", "scan"])
def test_models_that_cannot_be_loaded(ncn: Command, tmp_path: Path, finished: Path, valid: Path, verb: str) -> None:
    words = {"generate": ["a"], "evaluate": ["--data", valid], "scan": ["a"]}[verb]
    assert "no folder 'stories-mnii', and no bundled model" in refused(ncn(verb, "stories-mnii", *words))
    broken = tmp_path / "broken"
    shutil.copytree(finished / "model", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "is damaged or not a safetensors file" in refused(ncn(verb, "broken", *words))
    shutil.copy(finished / "model" / "model.safetensors", weights)
    prepare_text(tmp_path / "more", stories(0, 9000), vocab_size=320)
    shutil.copy(tmp_path / "more" / "tokenizer.json", broken)
    assert "the tokenizer has 320 entries, but the model's vocabulary only 300" in refused(ncn(verb, "broken", *words))


def test_an_unfinished_run_has_no_model(ncn: Command, tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    assert "has saved no model yet" in refused(ncn("generate", "run", "a"))


def test_data_of_another_tokenizer_is_refused(ncn: Command, tmp_path: Path, finished: Path) -> None:
    larger = prepare_text(tmp_path / "larger", stories(0, 9000), vocab_size=320).folder
    assert "prepare the data with the model's own tokenizer" in refused(ncn("evaluate", finished, "--data", larger))


def test_prompts_that_do_not_fit(ncn: Command, finished: Path) -> None:
    assert "the model's context is 32; shorten it" in refused(ncn("generate", finished, "long " * 100))
    assert "the model's context is 32; shorten it" in refused(ncn("scan", finished, "long " * 100))
    assert "the text is empty" in refused(ncn("scan", finished, ""))
    assert "temperature must be 0 or more" in refused(ncn("generate", finished, "a", "--temperature", -1))
    assert "put quotes around the text" in refused(ncn("generate", finished, "two", "words"))


def test_texts_that_cannot_be_read(ncn: Command, tmp_path: Path, finished: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Zoë".encode("latin-1"))
    assert "latin.txt is not UTF-8 text: byte 2 does not fit" in refused(ncn("scan", finished, "--file", "latin.txt"))
    assert "no file none.txt" in refused(ncn("scan", finished, "--file", "none.txt"))
    assert "give a text or --file, not both" in refused(ncn("scan", finished, "a", "--file", "latin.txt"))
    assert "cannot read ." in refused(ncn("scan", finished, "--file", "."))


def test_places_that_cannot_be_written(
    ncn: Command, tmp_path: Path, data: Path, finished: Path, valid: Path, recipe_file: Path
) -> None:
    (tmp_path / "file").write_text("")
    line = refused(ncn("train", "--config", recipe_file, "--data", data, "--out", "file/run"))
    assert "cannot write to file/run: Not a directory" in line
    result = ncn("evaluate", finished, "--data", valid, "--max-tokens", 50, "--json", "nowhere/x.json")
    assert (result.status, len(result.errors.splitlines())) == (1, 1)
    assert "nowhere/x.json" in result.errors
    assert "nowhere" in refused(ncn("scan", finished, "a", "--out", "nowhere/x.json"))
    assert "cannot save a scan as '.gif'" in refused(ncn("scan", finished, "a", "--out", "x.gif"))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a").write_text("")
    line = refused(ncn("train", "--config", recipe_file, "--data", data, "--out", "letters"))
    assert "already exists and is not empty" in line


def test_a_reader_that_goes_away_is_no_mistake(finished: Path) -> None:
    command = [sys.executable, "-m", "ncn", "generate", str(finished), "Once upon"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    process.wait()
    assert errors == b""
