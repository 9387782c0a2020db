"""From raw files to one clean file: filters, decontamination, deduplication, and a report.

The input is read twice, so that only verdicts, no texts, are kept in between: the first pass
judges every record and indexes those that pass; the second writes what stays. A record of prompt
and response is judged by both together.
"""

from __future__ import annotations

import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optlm.checkpoint.save import atomic_file
from optlm.data.c4_lines import keep_c4_lines
from optlm.data.card import REPORT_ENDING
from optlm.data.dedup import DuplicateIndex
from optlm.data.inputs import InputFile
from optlm.data.lines import Progress
from optlm.data.overlap import HeldOut
from optlm.data.packed import sha256_of
from optlm.data.records import Record, read_records
from optlm.data.report import CorpusError, ReadReport
from optlm.data.rules import Document, Rule
from optlm.data.tally import Tally
from optlm.data.writing import check_ending, jsonl_file
from optlm.errors import ConfigError

__all__ = ["CleanConfig", "clean"]

_KEPT = 255  # the verdict of a record that passed; the others are numbers of rules
_OVERLAP, _EXACT, _NEAR = "held-out-overlap", "exact-duplicates", "near-duplicates"


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """What is left out.

    Raises:
        ConfigError: a value out of range.
    """

    rules: tuple[Rule, ...] = ()
    c4_lines: bool = False  # also drop the lines that C4 drops; texts change
    exact: bool = True  # drop what equals an earlier document
    near: float | None = 0.8  # drop what resembles an earlier one at least so much; None: nothing
    overlap: int = 0  # n-grams that a document may share with held-out files
    split: str = "file"  # what a document of a text file is
    max_broken: int | None = None  # broken lines that are borne
    memory: int = 2**28  # bytes for finding duplicates

    def __post_init__(self) -> None:
        if self.near is not None and not 0 < self.near <= 1:
            raise ConfigError(
                f"the similarity of near duplicates is {self.near}; it must lie above 0 and up to 1"
            )
        if self.near is not None and not self.exact:
            raise ConfigError("near duplicates include exact ones; ask for both or for none")
        if self.overlap < 0:
            raise ConfigError(f"the shared n-grams allowed are {self.overlap}; use 0 or more")
        if self.memory < 2**20:
            raise ConfigError(f"memory is {self.memory} bytes; deduplication needs at least 2^20")


def clean(
    files: Sequence[InputFile],
    out: Path,
    config: CleanConfig,
    *,
    held_out: Sequence[InputFile] = (),
    reference: Sequence[InputFile] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the records of `files` that stay to `out`, and a report beside it; return the report.

    Args:
        out: ends in .jsonl, .jsonl.gz or .jsonl.zst. Its report is `out` and ``.report.json``.
        held_out: evaluation files; what shares n-grams with them goes.
        reference: documents that count as read before the others but are not written: what
            resembles them goes.
        progress: told how many bytes were read; `files` are read twice, `reference` once or twice.

    Raises:
        ConfigError: `out` has another ending or is an input, or C4's line filter meets a prompt.
        CorpusError: a file is missing, damaged or changes meanwhile, too much is broken, nothing
            stays, or the disk is full.
    """
    check_ending(out)
    if out.resolve() in {file.path.resolve() for file in (*files, *held_out, *reference)}:
        raise ConfigError(f"{out} is an input; write to another file")
    try:
        run = _Run(config, HeldOut(held_out) if held_out else None, progress)
        # Beside the output: where the result fits, the index likely does too.
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            run.judge(files, reference, Path(folder))
        for file in (*files, *reference):
            file.check_unchanged()
        run.write(files, reference, out)
        report = {"out": str(out), "sha256": sha256_of(out), **run.report([*files, *reference])}
        with atomic_file(out.with_name(out.name + REPORT_ENDING)) as target:
            target.write(json.dumps(report, indent=1).encode())
    except OSError as error:
        raise CorpusError(f"cannot write {out}: {error}") from error
    return report


class _Run:
    """The two passes over the input, and what they count."""

    def __init__(
        self, config: CleanConfig, held_out: HeldOut | None, progress: Progress | None
    ) -> None:
        self._config, self._held_out, self._progress = config, held_out, progress
        self._read = ReadReport(max_broken=config.max_broken)
        self._tally = Tally(_limits(config, held_out is not None))
        self._lines: Counter[str] = Counter()  # dropped by C4's line filter, by reason
        self._verdicts = array("B")  # of every record, in order
        self._referred = 0  # documents of the reference; they come first in the index
        self._gone = bytearray()  # of every indexed document: whether it is a duplicate
        self._kept = self._kept_bytes = 0

    # ---- first pass ----

    def judge(
        self, files: Sequence[InputFile], reference: Sequence[InputFile], folder: Path
    ) -> None:
        config = self._config
        with DuplicateIndex(folder, threshold=config.near, memory=config.memory) as index:
            for record in self._records(reference, ReadReport(max_broken=config.max_broken)):
                index.add(record.text, Document(record.text).words)
            self._referred = index.documents
            for record in self._records(files, self._read):
                self._read.documents += 1
                self._read.text_bytes += len(record.text.encode())
                document = Document(self._edited(record, self._lines))
                verdict = self._verdict(document, record.place)
                self._verdicts.append(verdict)
                if verdict == _KEPT:
                    index.add(document.text, document.words)
            self._gone = bytearray(index.documents)
            if config.exact:
                self._find(index)

    def _find(self, index: DuplicateIndex) -> None:
        for found in index.find():
            if found.document >= self._referred:
                self._gone[found.document] = True
                self._tally.add_duplicate(_EXACT if found.exact else _NEAR, found)

    def _verdict(self, document: Document, place: str) -> int:
        rules = self._config.rules
        for number, rule in enumerate(rules):
            value = rule.value_if_broken(document)
            if value is not None:
                self._tally.add(rule.name, place, value, document.text)
                return number
        if self._held_out is not None:
            shared = self._held_out.count(document.words, place)
            if shared > self._config.overlap:
                self._tally.add(_OVERLAP, place, shared, document.text)
                return len(rules)
        return _KEPT

    # ---- second pass ----

    def write(self, files: Sequence[InputFile], reference: Sequence[InputFile], out: Path) -> None:
        if self._tally.waits_for(self._referred):
            for number, record in enumerate(self._records(reference, ReadReport())):
                self._tally.show(number, record.place, record.text)
        number = self._referred - 1
        with jsonl_file(out) as write:
            records = self._records(files, ReadReport())
            for verdict, record in zip(self._verdicts, records, strict=True):
                if verdict != _KEPT:
                    continue
                number += 1
                text = self._edited(record, Counter())
                self._tally.show(number, record.place, text)
                if not self._gone[number]:
                    write(record.fields if record.is_pair else {**record.fields, "text": text})
                    self._kept += 1
                    self._kept_bytes += len(text.encode())
            if not self._kept:
                raise CorpusError(
                    f"nothing stays of {len(self._verdicts):,} documents ({self._dropped()}; "
                    f"{self._read.broken:,} broken lines); are the rules made for such text?"
                )

    def _records(self, files: Sequence[InputFile], report: ReadReport) -> Iterator[Record]:
        return read_records(files, report, split=self._config.split, progress=self._progress)

    def _edited(self, record: Record, dropped: Counter[str]) -> str:
        if not self._config.c4_lines:
            return record.text
        if record.is_pair:
            raise ConfigError(
                f"{record.place} is a prompt with its response, of which c4-lines would drop "
                "lines; clean such files without c4-lines"
            )
        return keep_c4_lines(record.text, dropped)

    # ---- result ----

    def _dropped(self) -> str:
        rows = [row for row in self._tally.rows() if row["dropped"]]
        return ", ".join(f"{row['name']} {row['dropped']:,}" for row in rows) or "none read"

    def report(self, inputs: Sequence[InputFile]) -> dict[str, Any]:
        return {
            "inputs": [{"file": str(file.path), "bytes": file.size} for file in inputs],
            "read": self._read.documents,
            "read_bytes": self._read.text_bytes,
            "kept": self._kept,
            "kept_bytes": self._kept_bytes,
            "broken": self._read.broken,
            "broken_examples": self._read.examples,
            "lines_dropped": dict(self._lines),
            "rules": self._tally.rows(),
            "held_out": self._held_out.report() if self._held_out else [],
        }


def _limits(config: CleanConfig, held_out: bool) -> dict[str, str]:
    limits = {r.name: f"at {'least' if r.at_least else 'most'} {r.limit:g}" for r in config.rules}
    if held_out:
        limits[_OVERLAP] = f"at most {config.overlap} shared n-grams"
    if config.exact:
        limits[_EXACT] = "none"
    if config.near is not None:
        limits[_NEAR] = f"similarity below {config.near:g}"
    return limits
