"""Documents for training, and the byte-level BPE trained on them.

A document has a ``text``; ``source`` is used to pick parts of a file. Lines that cannot be used are
counted and reported, never silently lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from optlm.data.inputs import find_inputs
from optlm.data.lines import Progress
from optlm.data.packed import END, SPECIAL_TOKENS
from optlm.data.records import read_records
from optlm.data.report import CorpusError, ReadReport
from optlm.errors import ConfigError

__all__ = [
    "END",
    "SPECIAL_TOKENS",
    "CorpusError",
    "ReadReport",
    "read_documents",
    "train_tokenizer",
]


def read_documents(
    path: Path,
    report: ReadReport,
    *,
    sources: tuple[str, ...] = (),
    max_bytes: int | None = None,
    progress: Progress | None = None,
) -> Iterator[str]:
    """Yield the texts of a file, folder or pattern in order, and count into `report`.

    Args:
        sources: keep documents whose ``source`` begins with one of these; empty keeps all.
        max_bytes: stop before the document that would pass this many UTF-8 bytes.
        progress: told how many bytes of the files were read.

    Raises:
        CorpusError: a file is missing, its compression is damaged, or more lines are broken than
            `report` allows.
        ConfigError: a file's ending tells no format.
    """
    files = find_inputs([str(path)])
    for record in read_records(files, report, pairs=False, progress=progress):
        size = len(record.text.encode("utf-8"))
        if sources and not str(record.fields.get("source", "")).startswith(sources):
            report.not_wanted += 1
        elif max_bytes is not None and report.text_bytes + size > max_bytes:
            return
        else:
            report.documents += 1
            report.text_bytes += size
            report.licenses[str(record.fields.get("license", "not stated"))] += 1
            yield record.text


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
            f"not {vocab_size}; give more text, or set data.vocab_size to that or less"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", END)]
    )
    return tokenizer
