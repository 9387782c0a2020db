"""`Tokenizer`: encoding, decoding, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonfiles import edit, write
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from optlm.config import OPTConfig
from optlm.errors import RequestError, TokenizerError
from optlm.tokenizer import Tokenizer
from variants import VARIANTS

TEXT = "Once upon a time the cat 🐈 said: «naïve» 日本\n"


# ---- encoding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world! cécé herlolip", [2, 31414, 232, 328, 740, 1140, 12695, 69, 46078, 1588]),
        (
            "Hello, I'm am conscious and aware of my surroundings.",
            [2, 31414, 6, 38, 437, 524, 13316, 8, 2542, 9, 127, 18386, 4],
        ),
        ("", [2]),
        ("</s>Hi", [2, 2, 30086]),
    ],
)
def test_known_ids_of_the_published_vocabulary(opt: Tokenizer, text: str, ids: list[int]) -> None:
    assert opt.encode(text) == ids
    assert (opt.bos_id, opt.eos_id, opt.pad_id, opt.vocab_size) == (2, 2, 1, 50265)


@pytest.mark.parametrize("variant", VARIANTS)
def test_start_token_comes_first_once_for_every_variant(json_folder: Path, variant: str) -> None:
    config = VARIANTS[variant]
    tokenizer = Tokenizer.from_folder(json_folder, config)
    assert tokenizer.encode("the cat").count(config.bos_token_id) == 1
    assert tokenizer.encode("the cat")[0] == config.bos_token_id
    assert tokenizer.encode("the cat", add_bos=False) == tokenizer.encode("the cat")[1:]


def test_both_file_forms_give_the_same_ids(json_folder: Path, pair_folder: Path) -> None:
    from_json = Tokenizer.from_folder(json_folder)
    from_pair = Tokenizer.from_folder(pair_folder)
    assert from_pair.encode(TEXT) == from_json.encode(TEXT)
    alone = Tokenizer.from_file(json_folder / "tokenizer.json")
    assert alone.encode(TEXT) == from_json.encode(TEXT)


def test_truncation_and_padding_in_the_file_lose_no_token(json_folder: Path) -> None:
    backend = Backend.from_file(str(json_folder / "tokenizer.json"))
    expected = Tokenizer.from_folder(json_folder).encode(TEXT)
    backend.enable_truncation(4)
    backend.enable_padding(length=200)
    backend.save(str(json_folder / "tokenizer.json"))
    assert Tokenizer.from_folder(json_folder).encode(TEXT) == expected


def test_special_tokens_in_text_are_parsed_unless_told_not_to(opt: Tokenizer) -> None:
    text = "a</s>b<pad>"
    assert opt.encode(text, add_bos=False) == [102, 2, 428, 1]
    literal = opt.encode(text, add_bos=False, parse_special=False)
    assert not {1, 2} & set(literal)
    assert opt.decode(literal) == text


def test_batch_equals_one_by_one(json_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(json_folder)
    texts = ["", "the cat", TEXT, " a"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize(
    ("settings", "adds"),
    [
        ({}, True),
        ({"add_bos_token": False}, False),
        ({"add_bos_token": True, "tokenizer_class": "PreTrainedTokenizerFast"}, True),
        ({"tokenizer_class": "GPT2Tokenizer"}, True),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, True),  # its post-processor does
    ],
)
def test_who_decides_about_the_start_token(
    json_folder: Path, settings: dict[str, Any], adds: bool
) -> None:
    write(json_folder / "tokenizer_config.json", settings)
    tokenizer = Tokenizer.from_folder(json_folder)
    assert tokenizer.adds_bos is adds
    assert (tokenizer.encode("a")[0] == 2) is adds


def test_galactica_files_add_no_start_token(json_folder: Path) -> None:
    edit(json_folder / "tokenizer.json", lambda values: values.update(post_processor=None))
    write(json_folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    assert not Tokenizer.from_folder(json_folder).adds_bos


def test_galactica_keeps_the_tokens_that_are_text(json_folder: Path) -> None:
    """Citations and work are between special tokens; none of them frames the text."""
    new = [{"content": c, "special": True} for c in ("[START_REF]", "<work>", "<|listed|>")]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{**token, **flags, "id": 290 + i} for i, token in enumerate(new)]

    def change(values: dict[str, Any]) -> None:
        vocabulary = values["model"]["vocab"]
        kept = {token for token, number in vocabulary.items() if number < 290}
        values["model"]["vocab"] = {token: vocabulary[token] for token in kept}
        merges = [m.split(" ") if isinstance(m, str) else m for m in values["model"]["merges"]]
        values["model"]["merges"] = [m for m in merges if "".join(m) in kept]
        values["added_tokens"] += added

    edit(json_folder / "tokenizer.json", change)
    for key in ("additional_special_tokens", "extra_special_tokens"):
        write(json_folder / "tokenizer_config.json", {key: ["<|listed|>"]})
        tokenizer = Tokenizer.from_folder(json_folder)
        ids = tokenizer.encode("a[START_REF]b<work>c<|listed|></s>")
        assert {290, 291, 292} <= set(ids)
        assert tokenizer.decode(ids) == "a[START_REF]b<work>c"
        decoder = tokenizer.decoder()
        assert "".join(map(decoder.push, ids)) == "a[START_REF]b<work>c"
        assert tokenizer.decode(ids, False) == "</s>a[START_REF]b<work>c<|listed|></s>"
    for wrong in (5, "x", [5], [{"content": None}], {"a": []}):
        write(json_folder / "tokenizer_config.json", {"additional_special_tokens": wrong})
        with pytest.raises(TokenizerError, match="additional_special_tokens"):
            Tokenizer.from_folder(json_folder)


def test_special_ids_come_from_the_files_then_the_config(json_folder: Path) -> None:
    config = OPTConfig(vocab_size=300, bos_token_id=0, eos_token_id=3, pad_token_id=1)
    tokenizer = Tokenizer.from_folder(json_folder, config)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 3)
    bos = {"content": "</s>", "lstrip": False, "normalized": True}
    write(json_folder / "special_tokens_map.json", {"bos_token": bos, "eos_token": "<s>"})
    write(json_folder / "tokenizer_config.json", {"eos_token": "</s>", "pad_token": "[nowhere]"})
    tokenizer = Tokenizer.from_folder(json_folder, config)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 2, 1)


@pytest.mark.parametrize("form", ["added_tokens.json", "added_tokens_decoder"])
def test_added_tokens_beside_a_plain_vocabulary(pair_folder: Path, form: str) -> None:
    new = Tokenizer.from_folder(pair_folder).vocab_size
    if form == "added_tokens.json":
        write(pair_folder / form, {"[WORK]": new + 1, "<|new one|>": new})
    else:
        tokens = {str(new): {"content": "<|new one|>"}, str(new + 1): {"content": "[WORK]"}}
        write(pair_folder / "tokenizer_config.json", {form: tokens})
    tokenizer = Tokenizer.from_folder(pair_folder)
    ids = tokenizer.encode("the<|new one|>[WORK]", add_bos=False)
    assert ids[-2:] == [new, new + 1]
    assert tokenizer.vocab_size == new + 2
    assert tokenizer.decode(ids) == "the<|new one|>[WORK]"


# ---- decoding -----------------------------------------------------------------------------------


def test_decode_is_the_inverse_and_skips_special_tokens(opt: Tokenizer) -> None:
    ids = opt.encode(TEXT)
    assert opt.decode(ids) == TEXT
    assert opt.decode(ids, skip_special=False) == "</s>" + TEXT
    assert opt.decode([50271, *ids, 10**12]) == TEXT  # ids without a token


def test_stream_never_shows_half_a_character(opt: Tokenizer) -> None:
    ids = opt.encode("a 🐈 b", add_bos=False)
    decoder = opt.decoder()
    pieces = [decoder.push(token_id) for token_id in ids]
    assert "".join(pieces) == "a 🐈 b"
    assert decoder.finish() == ""
    assert all("\ufffd" not in piece for piece in pieces)
    assert any(piece == "" for piece in pieces)  # the cat takes several tokens


def test_finish_gives_the_broken_end_once(opt: Tokenizer) -> None:
    half = opt.encode("🐈", add_bos=False)[:1]
    decoder = opt.decoder()
    assert decoder.push(half[0]) == ""
    assert decoder.finish() == opt.decode(half) == "\ufffd"
    assert decoder.finish() == ""


def test_bytes_and_display_text_of_one_token(opt: Tokenizer) -> None:
    assert opt.token_bytes(232) == b" world"
    assert opt.token_text(232) == " world"
    assert b"".join(map(opt.token_bytes, opt.encode("🐈", add_bos=False))) == "🐈".encode()
    assert opt.token_text(opt.encode("🐈", add_bos=False)[0]).count("\\x") == 2
    assert opt.token_text(2) == "</s>"
    assert opt.is_special(2)
    assert not opt.is_special(232)
    assert opt.token_bytes(50271) == b""


def test_added_tokens_decode_as_text_even_in_byte_letters(pair_folder: Path) -> None:
    new = Tokenizer.from_folder(pair_folder).vocab_size
    write(pair_folder / "added_tokens.json", {"éé": new})
    tokenizer = Tokenizer.from_folder(pair_folder)
    assert tokenizer.decode([new]) == "éé"


def test_vocabularies_that_are_not_byte_level(tmp_path: Path) -> None:
    """A sentencepiece-like vocabulary: visible spaces and bytes as tokens."""
    pieces = [
        "</s>",
        "<pad>",
        "\u2581the",
        "\u2581cat",
        "\u2581",
        *(f"<0x{n:02X}>" for n in range(256)),
    ]
    backend = Backend(
        models.Unigram([(piece, -n / 1000) for n, piece in enumerate(pieces)], 0, True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("the cat 🐈 cat", add_bos=False)
    decoder = tokenizer.decoder()
    pieces = [decoder.push(token_id) for token_id in ids]
    assert "".join(pieces) + decoder.finish() == tokenizer.decode(ids) == "the cat 🐈 cat"
    assert "\ufffd" not in "".join(pieces)
    assert tokenizer.token_bytes(2) == b" the"
    assert b"".join(map(tokenizer.token_bytes, ids)) == " the cat 🐈 cat".encode()


# ---- bad text and bad ids -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ab\ud800c", "lone surrogate U\\+D800 at character 2"),
        (b"bytes", "must be a string, not bytes"),
        (None, "must be a string"),
    ],
)
def test_bad_text_is_refused(json_folder: Path, text: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Tokenizer.from_folder(json_folder).encode(text)


def test_endless_text_is_refused(json_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optlm.tokenizer.MAX_TEXT", 10)
    with pytest.raises(RequestError, match="11 characters; the limit is 10"):
        Tokenizer.from_folder(json_folder).encode("a" * 11)


@pytest.mark.parametrize("token_id", [-1, 1.5, "2", None])
def test_bad_ids_are_refused(json_folder: Path, token_id: Any) -> None:
    tokenizer = Tokenizer.from_folder(json_folder)
    with pytest.raises(RequestError, match="token id"):
        tokenizer.decode([token_id])


def test_runaway_pattern_ends_in_an_error(
    json_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    split |= {"invert": False}
    edit(json_folder / "tokenizer.json", lambda values: values.update(pre_tokenizer=split))
    tokenizer = Tokenizer.from_folder(json_folder)
    with pytest.raises(TokenizerError, match="failed on this text"):
        tokenizer.encode("a" * 60 + "b")
    capfd.readouterr()  # the library prints its own trace
