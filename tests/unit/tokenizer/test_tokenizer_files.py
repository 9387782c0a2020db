"""Tokenizer files that are missing, damaged, or contradict each other."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from jsonfiles import edit, write

from optlm.config import OPTConfig
from optlm.errors import TokenizerError
from optlm.tokenizer import Tokenizer


def _duplicate_id(values: dict[str, Any]) -> None:
    values["model"]["vocab"]["twin"] = 2


def _huge_id(values: dict[str, Any]) -> None:
    values["model"]["vocab"]["far"] = 2**40


def _text_id(values: dict[str, Any]) -> None:
    values["model"]["vocab"]["far"] = "7"


def _no_merges(values: dict[str, Any]) -> None:
    values["model"]["merges"] = []


def _foreign_merge(values: dict[str, Any]) -> None:
    values["model"]["merges"].append(["qqqq", "zzzz"])


def _crooked_merge(values: dict[str, Any]) -> None:
    values["model"]["merges"].append(["a", "b", "c"])


def _many_added(values: dict[str, Any]) -> None:
    token = values["added_tokens"][0]
    values["added_tokens"] = [token | {"id": n, "content": f"<{n}>"} for n in range(2**16 + 1)]


def _clashing_added(values: dict[str, Any]) -> None:
    values["added_tokens"][0] |= {"id": 40, "content": "<other>"}


def _long_token(values: dict[str, Any]) -> None:
    values["model"]["vocab"]["x" * 20_000] = 299


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_duplicate_id, "id 2 is given to both '</s>' and 'twin'"),
        (_huge_id, "must lie between 0 and"),
        (_text_id, "the id of 'far' is '7'"),
        (_no_merges, "out of reach"),
        (_foreign_merge, "qqqq"),
        (_crooked_merge, "a merge must be two tokens"),
        (_many_added, "adds 65537 tokens; the limit is 65536"),
        (_clashing_added, "id 40 is both"),
        (_long_token, "20000 characters"),
        (lambda values: values.pop("model"), "no model"),
        (lambda values: values["model"].update(vocab={}, merges=[]), "vocabulary is empty"),
        (lambda values: values.update(added_tokens=5), "must be a list"),
        (lambda values: values.update(decoder={"type": "Nonsense"}), "tokenizer.json: "),
    ],
)
def test_broken_tokenizer_json(json_folder: Path, change: Any, message: str) -> None:
    edit(json_folder / "tokenizer.json", change)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(json_folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "cannot read"),
        (b"[1]", "holds a list"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"model": 1, "model": 2}', "'model' appears twice"),
    ],
)
def test_files_that_are_no_json_object(json_folder: Path, content: bytes, message: str) -> None:
    (json_folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(json_folder)


def test_oversized_file_is_refused_unread(
    json_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optlm.tokenizer.files.MAX_FILE_BYTES", 100)
    with pytest.raises(TokenizerError, match="the limit is 100"):
        Tokenizer.from_folder(json_folder)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"],
)
def test_files_that_are_none_are_not_waited_for(json_folder: Path, name: str) -> None:
    (json_folder / name).unlink(missing_ok=True)
    os.mkfifo(json_folder / name)
    with pytest.raises(TokenizerError, match="not a regular file"):
        Tokenizer.from_folder(json_folder)
    (json_folder / name).unlink()
    (json_folder / name).symlink_to("/dev/zero")
    with pytest.raises(TokenizerError, match="not a regular file"):
        Tokenizer.from_folder(json_folder)
    (json_folder / name).unlink()
    (json_folder / name).symlink_to("nowhere")
    with pytest.raises(TokenizerError, match="cannot read"):
        Tokenizer.from_folder(json_folder)


def test_missing_files_are_named(pair_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer; looked for tokenizer\.json"):
        Tokenizer.from_folder(tmp_path / "nowhere")
    (pair_folder / "merges.txt").unlink()
    with pytest.raises(TokenizerError, match=r"vocab\.json but no merges\.txt"):
        Tokenizer.from_folder(pair_folder)


def test_cut_off_merges_are_noticed(opt_folder: Path, tmp_path: Path) -> None:
    shutil.copy(opt_folder / "vocab.json", tmp_path)
    merges = (opt_folder / "merges.txt").read_bytes()
    (tmp_path / "merges.txt").write_bytes(merges[: merges.rindex(b"\n", 0, 200_000)])
    with pytest.raises(TokenizerError, match="cut off"):
        Tokenizer.from_folder(tmp_path)


def test_ids_beyond_the_model_are_refused(json_folder: Path) -> None:
    with pytest.raises(TokenizerError, match="the model has 260 token embeddings"):
        Tokenizer.from_folder(json_folder, OPTConfig(vocab_size=260))


def test_special_token_outside_the_vocabulary(json_folder: Path) -> None:
    write(json_folder / "tokenizer_config.json", {"bos_token": "<|start|>"})
    with pytest.raises(TokenizerError, match=r"bos_token .* is not in the vocabulary"):
        Tokenizer.from_folder(json_folder)
    write(json_folder / "tokenizer_config.json", {"bos_token": 5})
    with pytest.raises(TokenizerError, match="bos_token is 5; it must be a string"):
        Tokenizer.from_folder(json_folder)


def test_added_token_whose_place_is_taken(pair_folder: Path) -> None:
    write(pair_folder / "added_tokens.json", {"<far>": 5000})
    with pytest.raises(TokenizerError, match="'<far>' wants id 5000"):
        Tokenizer.from_folder(pair_folder)


def test_vocabulary_without_any_start_token(json_folder: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["added_tokens"] = []
        values["post_processor"] = None
        for name in ("<s>", "<pad>", "</s>"):
            values["model"]["vocab"][name[::-1]] = values["model"]["vocab"].pop(name)

    edit(json_folder / "tokenizer.json", change)
    with pytest.raises(TokenizerError, match="no bos_token"):
        Tokenizer.from_folder(json_folder)
