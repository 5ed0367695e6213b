import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncn.data.tokenizer import SEPARATOR, Tokenizer
from ncn.errors import UserError

TEXTS = ["Once upon a time, there was a tiny dragon.", "The dragon saw a café and a 🐉.", "The end."] * 5
GPT2 = Tokenizer.load("gpt2")
TRAINED = Tokenizer.train(TEXTS, 300)


def word_definition(tokens: list[str], **extra: object) -> dict[str, object]:
    """A whole-word tokenizer in the format of tokenizer.json."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {token: i for i, token in enumerate(tokens)}, "unk_token": tokens[0]},
    } | extra


def test_gpt2_gives_the_published_ids() -> None:
    assert GPT2.encode("Hello world") == [15496, 995]
    assert (GPT2.vocab_size, GPT2.separator, GPT2.separator_id) == (50257, SEPARATOR, 50256)


@given(st.text())
def test_decoding_gives_the_text_back(text: str) -> None:
    for tokenizer in (GPT2, TRAINED):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(), st.text())
def test_text_never_becomes_the_separator(before: str, after: str) -> None:
    text = before + SEPARATOR + after
    for tokenizer in (GPT2, TRAINED):
        ids = tokenizer.encode(text)
        assert tokenizer.separator_id not in ids
        assert tokenizer.encode_batch([text, after]) == [ids, tokenizer.encode(after)]


def test_training_gives_the_same_tokenizer_each_time_with_the_separator_first() -> None:
    assert Tokenizer.train(iter(TEXTS), 300).fingerprint == TRAINED.fingerprint
    assert Tokenizer.train(TEXTS, 290).fingerprint != TRAINED.fingerprint
    assert TRAINED.separator_id == 0
    assert TRAINED.vocab_size == 300
    assert len(TRAINED.encode(TEXTS[0])) < len(TEXTS[0])


def test_too_little_text_gives_a_smaller_vocabulary() -> None:
    assert Tokenizer.train(["ab"], 5000).vocab_size < 300


def test_a_vocabulary_below_the_bytes_and_the_separator_is_refused() -> None:
    with pytest.raises(UserError, match=r"a vocabulary of 256 is too small.* need 257"):
        Tokenizer.train(TEXTS, 256)
    assert Tokenizer.train(TEXTS, 257).vocab_size == 257


def test_labels_are_readable() -> None:
    assert GPT2.token_labels(GPT2.encode("The café\n saw")) == ["The", " café", "\\n", " saw"]
    assert "".join(GPT2.token_labels(GPT2.encode("🐉"))) == "\\xf0\\x9f\\x90\\x89"
    assert GPT2.token_labels([GPT2.separator_id, 60000]) == [SEPARATOR, "<unknown 60000>"]


@given(st.text(st.characters(codec="ascii", categories=["L", "N", "P", "Zs"])))
def test_labels_of_printable_text_join_to_the_text(text: str) -> None:
    assert "".join(GPT2.token_labels(GPT2.encode(text))) == text


def test_labels_of_other_tokenizers() -> None:
    tokenizer = Tokenizer(word_definition(["<unk>", "▁dog", "<0x0A>", "</s>"]))
    assert tokenizer.token_labels([1, 2, 3]) == [" dog", "\\n", "</s>"]
    assert tokenizer.separator == "</s>"


def test_saving_and_loading_keeps_everything(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "saved")
    for source in (tmp_path / "saved", str(tmp_path / "saved" / "tokenizer.json")):
        loaded = Tokenizer.load(source)
        assert loaded.fingerprint == TRAINED.fingerprint
        assert loaded.encode(TEXTS[1]) == TRAINED.encode(TEXTS[1])


def test_transformers_opens_a_saved_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    TRAINED.save(tmp_path)
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert opened(TEXTS[1])["input_ids"] == [TRAINED.separator_id, *TRAINED.encode(TEXTS[1])]
    assert (opened.padding_side, opened.pad_token) == ("left", "<|endoftext|>")
    assert opened.eos_token_id == TRAINED.separator_id


def test_the_end_token_of_a_hugging_face_folder_separates(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(word_definition(["a", "b", "[STOP]"])))
    with pytest.raises(UserError, match=r"no token to separate documents: add <\|endoftext\|>"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "[STOP]"}}))
    assert Tokenizer.load(tmp_path).separator_id == 2
    Tokenizer.load(tmp_path).save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").separator_id == 2


def test_truncation_and_padding_of_a_file_do_not_reach_the_text() -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    tokenizer = Tokenizer(word_definition(["a", "b", "</s>"], truncation=truncation))
    assert tokenizer.encode("a b a b") == [0, 1, 0, 1]
    assert tokenizer.fingerprint == Tokenizer(word_definition(["a", "b", "</s>"])).fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is not a tokenizer.json"),
        (b"[]", "expected an object, found list"),
        (b'{"model": 3}', "is not a tokenizer.json of the tokenizers library"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='no tokenizer at gpt3: give "gpt2"'):
        Tokenizer.load("gpt3")
    with pytest.raises(UserError, match=r"holds no tokenizer\.json: save a fast tokenizer"):
        Tokenizer.load(tmp_path)
