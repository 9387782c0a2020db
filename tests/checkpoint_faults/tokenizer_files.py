"""Broken tokenizer files, and tokenizers that contradict the model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint_faults.base import BREAKS, breaks


def edit_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    change(values)
    (folder / "tokenizer.json").write_text(json.dumps(values))


def _tokenizer_breaks() -> None:
    def one(code: str, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        BREAKS.append((code, name, lambda folder: edit_tokenizer(folder, change)))

    one("tokenizer-merges", "json", lambda v: v["model"].pop("merges"))
    one("tokenizer-vocab", "json", lambda v: v["model"].pop("vocab"))
    one("tokenizer-type", "unigram", lambda v: v["model"].update(type="Unigram"))
    one("tokenizer-id", "negative", lambda v: v["model"]["vocab"].update(a=-1))
    one("tokenizer-id", "text", lambda v: v["model"]["vocab"].update(a="5"))
    one("tokenizer-duplicate-id", "two", lambda v: v["model"]["vocab"].update(a=40, b=40))
    one("tokenizer-id-range", "beyond", lambda v: v["model"]["vocab"].update(zzz=300))
    one("tokenizer-merge-unknown", "merge", lambda v: v["model"]["merges"].append("q zzz"))
    one("tokenizer-added", "kind", lambda v: v.update(added_tokens=["x"]))
    one(
        "tokenizer-added",
        "million",
        lambda v: v.update(added_tokens=[{"content": f"x{i}", "id": i} for i in range(100_001)]),
    )
    one(
        "tokenizer-regex",
        "backtracking",
        lambda v: v.update(
            normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
        ),
    )
    one("special-token-missing", "bos", _without_end)


def _without_end(values: dict[str, Any]) -> None:
    values["model"]["vocab"].pop("</s>")
    values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] != "</s>"]


_tokenizer_breaks()


@breaks("tokenizer-missing")
def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@breaks("tokenizer-json")
def tokenizer_garbage(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe")


def _fifos() -> None:
    def one(name: str) -> None:
        def function(folder: Path) -> None:
            (folder / name).unlink(missing_ok=True)
            os.mkfifo(folder / name)

        BREAKS.append(("tokenizer-json", f"fifo-{name}", function))

    one("tokenizer.json")
    one("tokenizer_config.json")
    one("special_tokens_map.json")
    one("added_tokens.json")


_fifos()


@breaks("tokenizer-size")
def tokenizer_small(folder: Path) -> None:
    def shrink(values: dict[str, Any]) -> None:
        model = values["model"]
        model["vocab"] = {token: number for token, number in model["vocab"].items() if number < 99}
        model["merges"] = []
        model["merges"] = [["!", '"']]
        model["vocab"]['!"'] = 99

    edit_tokenizer(folder, shrink)


def _slow_tokenizer(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


@breaks("tokenizer-merges", "txt")
def merges_missing(folder: Path) -> None:
    _slow_tokenizer(folder)
    (folder / "merges.txt").unlink()


@breaks("tokenizer-vocab", "vocab.json")
def vocab_missing(folder: Path) -> None:
    _slow_tokenizer(folder)
    (folder / "vocab.json").unlink()


@breaks("tokenizer-duplicate-token")
def token_twice(folder: Path) -> None:
    _slow_tokenizer(folder)
    text = (folder / "vocab.json").read_text()
    (folder / "vocab.json").write_text(text.replace("{", '{"<pad>": 7, ', 1))


@breaks("tokenizer-merge-unknown", "txt")
def merge_unknown(folder: Path) -> None:
    _slow_tokenizer(folder)
    with (folder / "merges.txt").open("a") as file:
        file.write("q zzz\n")


def _special_breaks() -> None:
    def one(code: str, **settings: Any) -> None:
        def function(folder: Path) -> None:
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))

        BREAKS.append((code, "-".join(settings), function))

    one("bos-disagrees", bos_token="<s>")
    one("eos-disagrees", eos_token={"content": "<unk>"})
    one("pad-disagrees", pad_token="</s>")
    one("special-token-unknown", bos_token="<|endoftext|>")
    one("special-token-unknown", eos_token=5)


_special_breaks()


@breaks("generation-config")
def generation(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": 50118}')
