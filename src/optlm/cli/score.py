"""Tell how likely texts are: by token, word, sentence, byte and document.

FILE is plain text, scored as a whole or by --lines, or a table (.jsonl, .tsv,
.parquet) of texts, of minimal pairs (--pairs) or of contexts with endings to
rank (--endings). The convention says what is scored and how long texts are
read; it is printed with the results. Logarithms are natural, in nats.
"""

from __future__ import annotations

import hashlib
import json
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optlm.cli import score_show
from optlm.cli.common import (
    add_adapter_options,
    add_engine_options,
    add_json_option,
    load_model,
    read_text,
    say,
    text_argument,
    usage_error,
)
from optlm.cli.progress import byte_bar

if TYPE_CHECKING:
    from optlm.score import Scorer
    from optlm.score.items import Item, Kind

USAGE = "FILE...|- [options]"
_BATCH_ITEMS, _BATCH_CHARACTERS = 64, 200_000  # scored together


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", metavar="FILE", help="- reads text from standard input")
    parser.add_argument("-t", "--text", type=text_argument, help="score this text")
    parser.add_argument("--lines", action="store_true", help="score every line by itself")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--pairs", action="store_true", help="minimal pairs: which is likelier?")
    kinds.add_argument("--endings", action="store_true", help="rank the endings of contexts")
    parser.add_argument(
        "--fields", metavar="A,B", help="of tables (text; good,bad; context,endings)"
    )
    parser.add_argument("--group", metavar="FIELD", help="sum up by this field of a table")
    parser.add_argument("--context", type=text_argument, help="score the texts after this one")
    add_convention_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--by", metavar="LEVEL", help="token, word, sentence, byte or document")
    group.add_argument(
        "--tokens", action=BooleanOptionalAction, help="list every token (not with --json)"
    )
    add_json_option(group)  # type: ignore[arg-type]
    group.add_argument(
        "-o", "--out", type=Path, metavar="FILE",
        help="write records there: .jsonl, which the same command resumes, or .csv",
    )  # fmt: skip
    add_engine_options(parser)
    add_adapter_options(parser)


def add_convention_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("convention")
    group.add_argument(
        "--convention", metavar="NAME", default="optlm",
        help="optlm, lm-eval, transformers, minicons or gptq (optlm)",
    )  # fmt: skip
    group.add_argument("--window", type=int, metavar="N", help="tokens read at once (the context)")
    group.add_argument("--stride", type=int, metavar="N", help="new tokens of each window")
    group.add_argument(
        "--correct-words", action=BooleanOptionalAction, help="condition words on word ends"
    )
    group.add_argument(
        "--normalize", metavar="HOW", default="sum",
        help="of endings: sum, tokens, bytes or information (sum)",
    )  # fmt: skip


def run(options: Namespace) -> None:
    kind: Kind = "pairs" if options.pairs else "endings" if options.endings else "texts"
    level = _level(options, kind)
    _check(options, kind)
    from optlm.score import Scorer

    items, total = _items(options, kind)
    scorer = Scorer(
        load_model(options),
        convention=options.convention,
        window=options.window,
        stride=options.stride,
        corrects_words=options.correct_words,
    )
    job = _Job(options, scorer, kind, level)
    if options.context is not None:
        job.score = job.continuations
    with byte_bar("scoring", total) as advance:
        job.run(items, advance)


def _level(options: Namespace, kind: Kind) -> Any:
    from optlm.errors import did_you_mean
    from optlm.score.records import LEVELS

    if options.by is not None and options.tokens is not None:
        raise usage_error("--by and --tokens both say what is listed; give one")
    if options.by is not None and options.by not in LEVELS:
        known = ", ".join(LEVELS)
        hint = did_you_mean(options.by, LEVELS)
        raise usage_error(f"--by is {options.by!r}; use one of {known}{hint}")
    if options.by is not None and kind != "texts":
        raise usage_error("--by goes with texts, not with --pairs or --endings")
    if options.by is not None:
        return options.by
    listed = not (options.json or options.out) if options.tokens is None else options.tokens
    return "token" if listed else "document"


def _check(options: Namespace, kind: Kind) -> None:
    from optlm.score.items import is_table

    if bool(options.files) == (options.text is not None):
        raise usage_error("give a FILE, - for standard input, or --text")
    tables = [is_table(name) for name in options.files]
    if kind != "texts" and not (tables and all(tables)):
        raise usage_error(f"--{kind} reads tables: files ending in .jsonl, .tsv or .parquet")
    if any(tables) and (options.lines or options.context is not None or not all(tables)):
        raise usage_error("tables go with no other input, nor with --lines or --context")
    if not any(tables) and (options.fields or options.group):
        raise usage_error("--fields and --group are of tables: .jsonl, .tsv or .parquet")
    if options.context is not None and options.by not in (None, "token", "document"):
        raise usage_error("--context lists tokens or nothing; use --by token or document")
    if options.out is not None and options.out.suffix not in (".jsonl", ".csv"):
        raise usage_error(f"the output {options.out} must end in .jsonl or .csv")


def _items(options: Namespace, kind: Kind) -> tuple[Iterator[Item], int]:
    """What is to be scored, and its size for the progress bar."""
    from optlm.score.items import FIELDS, Item, is_table, read_items

    if options.files and is_table(options.files[0]):
        fields = options.fields.split(",") if options.fields else list(FIELDS[kind])
        if len(fields) != len(FIELDS[kind]) or not all(fields):
            raise usage_error(f"--fields names {len(FIELDS[kind])} fields: {FIELDS[kind]}")
        total = sum(Path(name).stat().st_size for name in options.files)
        return read_items(options.files, kind, fields), total
    named = [(n, read_text(n)) for n in options.files] or [("--text", options.text)]
    parts: list[Item] = []
    for name, whole in named:
        lines = whole.split("\n") if options.lines else [whole]
        if not whole:
            raise usage_error(f"{name} is empty; there is nothing to score")
        parts += [
            Item((line,), {}, f"{name}:{number}" if options.lines else name)
            for number, line in enumerate(lines, start=1)
        ]
    return iter(parts), sum(len(whole.encode()) for _, whole in named)


class _Job:
    """Items in, records out, and what they sum up to."""

    def __init__(self, options: Namespace, scorer: Scorer, kind: Kind, level: Any) -> None:
        from optlm.score.records import Summary, score_batch

        self._options = options
        self._kind = kind
        self._scorer = scorer
        self._summary = Summary(kind, options.group)
        self._level = level
        self._listed = options.out is None and (kind == "texts" or options.json)
        self.score: Callable[[list[Item]], list[dict[str, Any]]] = lambda batch: score_batch(
            scorer, kind, batch, level=level, normalize=options.normalize
        )

    def continuations(self, batch: list[Item]) -> list[dict[str, Any]]:
        """Each text given the context."""
        from optlm.score.records import continuation_record

        context = self._options.context
        scored = self._scorer.conditional([(context, item.values[0]) for item in batch])
        tokenizer = self._scorer.tokenizer
        return [
            {"place": item.place, **continuation_record(result, tokenizer, self._level)}
            for item, result in zip(batch, scored, strict=True)
        ]

    def run(self, items: Iterator[Item], advance: Callable[[int], None]) -> None:
        out = self._options.out
        with ExitStack() as stack:
            write: Callable[[list[dict[str, Any]]], None] = self._show
            if out is not None and out.suffix == ".jsonl":
                from optlm.score.journal import Journal

                journal = stack.enter_context(Journal(out, self._header()))
                self._skip(items, journal.records(), journal.num_done, advance)
                write = journal.add
            elif out is not None:
                write = stack.enter_context(score_show.csv_file(out, self._told()))
            for batch in _batches(items):
                records = self.score(batch)
                for record in records:
                    self._summary.add(record)
                write(records)
                advance(sum(_size(item) for item in batch))
        self._sum_up()

    def _skip(
        self,
        items: Iterator[Item],
        records: Iterable[dict[str, Any]],
        count: int,
        advance: Callable[[int], None],
    ) -> None:
        """Pass over what an earlier run has scored."""
        for record in records:
            item = next(items, None)
            if item is None or item.place != record["place"]:
                raise usage_error(f"{self._options.out} does not fit the input; remove it")
            self._summary.add(record)
            advance(_size(item))
        if count:
            say(f"{self._options.out}: {count:,} records are there; going on after them")

    def _told(self) -> dict[str, Any]:
        return self._scorer.convention.told()

    def _header(self) -> dict[str, Any]:
        """All that the records depend on."""
        from optlm.assets import bundled_model
        from optlm.checkpoint import open_checkpoint
        from optlm.checkpoint.fingerprint import fingerprint

        options = self._options
        checkpoint = open_checkpoint(options.model or bundled_model())
        sources = {name: _digest(Path(name)) for name in options.files if name != "-"}
        text = "" if options.text is None else options.text
        return {
            "optlm_score": 1,
            "kind": self._kind,
            "level": self._level,
            "lines": options.lines,
            "fields": options.fields,
            "normalize": options.normalize,
            "context": options.context,
            "model": fingerprint(checkpoint.config, checkpoint.tensors),
            "dtype": options.dtype,
            "kv_dtype": options.kv_dtype,
            "adapter": options.adapter,
            "inputs": {Path(name).name: digest for name, digest in sources.items()},
            "text": hashlib.sha256(text.encode()).hexdigest() if text else None,
            **self._told(),
        }

    def _show(self, records: list[dict[str, Any]]) -> None:
        for record in records if self._listed else ():
            if self._options.json:
                print(json.dumps(record | {"convention": self._told()}, ensure_ascii=False))
            else:
                score_show.record(record, self._level)
        sys.stdout.flush()

    def _sum_up(self) -> None:
        groups = list(self._summary.groups())
        several = self._options.out is not None or self._kind != "texts"
        if self._options.json and not several:
            return
        if self._options.json:
            for name, figures in groups:
                told = {"convention": self._told()} if name == "all" else {}
                print(json.dumps({"group": name, **figures, **told}))
            return
        if several or groups[0][1]["texts"] > 1 or len(groups) > 1:
            score_show.groups(groups)
        score_show.convention(self._told(), words=self._level == "word")


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += _size(item)
        if len(batch) == _BATCH_ITEMS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(item: Item) -> int:
    """About the bytes it took to write it down."""
    return sum(len(str(value)) for value in (*item.values, *item.others.values()))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
