"""Documents from JSON Lines files, and the byte-level BPE trained on them.

A corpus file holds one JSON object a line with at least ``text``; ``source`` is used to pick parts
of a file. Lines that cannot be used are counted and reported, never silently lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import zstandard
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from optlm.errors import ConfigError, OptlmError

__all__ = [
    "END",
    "SPECIAL_TOKENS",
    "CorpusError",
    "ReadReport",
    "read_documents",
    "train_tokenizer",
]

# fairseq's ids: every OPT has these four in this order.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
END = SPECIAL_TOKENS.index("</s>")  # starts every document, ends every text

_KEPT_EXAMPLES = 5
_ZSTD_WINDOW = 2**31  # files may be written with long-distance matching
_READ_TOGETHER = 2**20  # compressed bytes


class CorpusError(OptlmError):
    """Training text that is missing, damaged or empty."""


@dataclass
class ReadReport:
    """What happened to the lines of one file."""

    documents: int = 0
    text_bytes: int = 0
    not_wanted: int = 0  # another source than asked for
    broken: int = 0
    examples: list[str] = field(
        default_factory=list
    )  # the first few broken lines: place and reason

    def add_broken(self, place: str, reason: str) -> None:
        self.broken += 1
        if len(self.examples) < _KEPT_EXAMPLES:
            self.examples.append(f"{place}: {reason}")


def read_documents(
    path: Path, report: ReadReport, *, sources: tuple[str, ...] = (), max_bytes: int | None = None
) -> Iterator[str]:
    """Yield the texts of a ``.jsonl`` or ``.jsonl.zst`` file in order, and count into `report`.

    Args:
        sources: keep documents whose ``source`` begins with one of these; empty keeps all.
        max_bytes: stop before the document that would pass this many UTF-8 bytes.

    Raises:
        CorpusError: the file is missing or its compression is damaged.
    """
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path.name}:{number}"
        try:
            document = json.loads(line)
            text = document["text"]
            size = len(text.encode("utf-8"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            report.add_broken(place, f"{type(error).__name__}: {error}"[:200])
            continue
        if size == 0:
            report.add_broken(place, "the text is empty")
        elif sources and not str(document.get("source", "")).startswith(sources):
            report.not_wanted += 1
        elif max_bytes is not None and report.text_bytes + size > max_bytes:
            return
        else:
            report.documents += 1
            report.text_bytes += size
            yield text


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file if path.suffix != ".zst" else _decompressed_lines(file)
    except (OSError, zstandard.ZstdError) as error:
        raise CorpusError(f"cannot read {path}: {error}") from error


def _decompressed_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of one or more zstd frames; a file that ends inside a frame is an error."""
    library = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    frame, begun = library.decompressobj(), False
    rest = b""
    while data := file.read(_READ_TOGETHER):
        while data:
            begun = True
            *lines, rest = (rest + frame.decompress(data)).split(b"\n")
            yield from lines
            data = frame.unused_data
            if frame.eof:
                frame, begun = library.decompressobj(), False
    if begun:
        raise zstandard.ZstdError("it ends in the middle of its compressed data")
    yield rest


_SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of exactly `vocab_size` entries with OPT's four special tokens.

    The tokenizer prepends ``</s>`` when special tokens are asked for, as every OPT expects.

    Raises:
        ConfigError: `vocab_size` leaves no room for the 256 bytes.
        CorpusError: the text holds too few different pairs for so many entries.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise ConfigError(
            f"vocab_size is {vocab_size}; bytes and special tokens need {_SMALLEST_VOCABULARY}"
        )
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise CorpusError(
            f"the text yields only {tokenizer.get_vocab_size()} vocabulary entries, "
            f"not {vocab_size}; give more text or ask for a smaller vocabulary"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", END)]
    )
    return tokenizer
