"""A folder of packed tokens: what its files are called, and whether they are what they should be.

tokenizer.json          the byte-level BPE
<part>.tokens           uint16, every document as ``</s>`` and its tokens, back to back
<part>.starts           uint64, index of each document's ``</s>``
manifest.json           the configuration, counts and sha256 of every file
README.md               the data card
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optlm.data.report import CorpusError

__all__ = [
    "CARD",
    "END",
    "MANIFEST",
    "SPECIAL_TOKENS",
    "TOKENIZER",
    "read_manifest",
    "sha256_of",
    "verify",
]

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
CARD = "README.md"

# fairseq's ids: every OPT has these four in this order.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
END = SPECIAL_TOKENS.index("</s>")  # starts every document, ends every text

_TOGETHER = 2**22  # tokens checked at once


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        CorpusError: there is none, or it lacks what every manifest has.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        manifest["config"], manifest["tokenizer_sha256"]
        for part in manifest["parts"].values():
            part["tokens"], part["documents"], part["sha256"]
    except OSError as error:
        raise CorpusError(
            f"{folder} holds no finished packed data: {error.strerror}: {MANIFEST}"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CorpusError(f"{folder / MANIFEST} is damaged: {error!r}") from error
    return manifest


def verify(folder: Path, *, sources: bool = False) -> list[str]:
    """Compare packed data with its manifest and with itself; return the faults found.

    Args:
        sources: also compare the files the data was packed from.

    Raises:
        CorpusError: there is no manifest, or it is damaged.
    """
    manifest = read_manifest(folder)
    faults = list(_wrong_hash(folder / TOKENIZER, manifest["tokenizer_sha256"]))
    vocab_size = manifest["config"].get("vocab_size")
    for name, part in manifest["parts"].items():
        faults += _check_part(folder, name, part, vocab_size)
        for source in part.get("files", []) if sources else []:
            faults += _wrong_hash(Path(source["file"]), source["sha256"])
    return faults


def _wrong_hash(path: Path, wanted: str | None) -> Iterator[str]:
    try:
        found = sha256_of(path)
    except OSError as error:
        yield f"{path.name}: {error.strerror}"
        return
    if wanted is not None and found != wanted:
        yield f"{path.name}: its sha256 is {found[:16]}..., not {wanted[:16]}... as packed"


def _check_part(
    folder: Path, name: str, part: dict[str, Any], vocab_size: int | None
) -> Iterator[str]:
    files = {"tokens": part["sha256"], "starts": part.get("starts_sha256")}
    for kind, sha256 in files.items():
        yield from _wrong_hash(folder / f"{name}.{kind}", sha256)
    try:
        tokens = np.memmap(folder / f"{name}.tokens", dtype="<u2", mode="r")
        starts = np.fromfile(folder / f"{name}.starts", dtype="<u8")
    except (OSError, ValueError):  # missing: told above; of no size
        return
    for kind, count, wanted in (
        ("tokens", len(tokens), part["tokens"]),
        ("starts", len(starts), part["documents"]),
    ):
        if count != wanted:
            yield f"{name}.{kind}: it holds {count:,} numbers, the manifest says {wanted:,}"
    yield from _check_numbers(name, tokens, starts, vocab_size)


def _check_numbers(
    name: str, tokens: NDArray[np.uint16], starts: NDArray[np.uint64], vocab_size: int | None
) -> Iterator[str]:
    """The index is exactly the places of ``</s>``, and every id is in the vocabulary."""
    ends, largest = 0, 0
    for begin in range(0, len(tokens), _TOGETHER):
        block = tokens[begin : begin + _TOGETHER]
        ends += int(np.count_nonzero(block == END))
        largest = max(largest, int(block.max()))
    if vocab_size is not None and largest >= vocab_size:
        yield f"{name}.tokens: id {largest} is beyond the vocabulary of {vocab_size}"
    if ends != len(starts):
        yield f"{name}.tokens: {ends:,} </s> for {len(starts):,} documents"
    if len(starts) and (starts[0] != 0 or (starts[1:] <= starts[:-1]).any()):
        yield f"{name}.starts: the index does not ascend from 0"
    elif len(starts) and (starts[-1] >= len(tokens) or (tokens[starts] != END).any()):
        yield f"{name}.starts: a document does not begin with </s>"
