"""How `optlm score` shows its results: on a page, and as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LISTS = {
    "token_logprobs": "token",
    "word_logprobs": "text",
    "sentence_logprobs": "text",
    "byte_logprobs": "text",
}


def record(scored: dict[str, Any], level: str) -> None:
    """A text: what is listed of it, then its sums."""
    for entry in scored.get(f"{level}_logprobs", ()):
        shown = "-" if entry["logprob"] is None else f"{entry['logprob']:.4f}"
        print(f"{shown:>10}  {json.dumps(entry[_LISTS[f'{level}_logprobs']], ensure_ascii=False)}")
    print(_totals(scored))


def groups(found: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """A line a group; right answers as a share with its 95 per cent interval."""
    width = max(len(name) for name, _ in found)
    for name, figures in found:
        if "texts" in figures:
            told = f"{figures['texts']:,} texts: {_totals(figures)}"
        else:
            told = _accuracy(figures)
        print(f"{name:<{width}}  {told}")


def convention(told: dict[str, Any], *, words: bool) -> None:
    """All that the figures depend on."""
    stride = "" if told["stride"] is None else f", stride {told['stride']}"
    print(f"convention {told['convention']}: window {told['window']}{stride}; {told['logarithm']}")
    print(f"  tokens: {told['windows']}")
    print(f"  perplexity: {told['perplexity']}")
    if words:
        print(f"  words: {told['words']}")


@contextmanager
def csv_file(path: Path, told: dict[str, Any]) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Yield a function that writes records; the file appears when all of them are there.

    A record with a list has a row for each of its entries. The first line is a comment with the
    convention.
    """
    from optlm.checkpoint.save import atomic_file

    with atomic_file(path) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8", newline="", write_through=True)
        text.write("# " + json.dumps(told, ensure_ascii=False) + "\n")
        table: csv.DictWriter[str] | None = None

        def write(records: list[dict[str, Any]]) -> None:
            nonlocal table
            for row in (row for one in records for row in _rows(one)):
                if table is None:
                    table = csv.DictWriter(text, list(row), extrasaction="ignore")
                    table.writeheader()
                table.writerow(row)

        yield write
        text.flush()
        text.detach()


def _rows(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    listed = next((name for name in _LISTS if name in record), None)
    if listed is None:
        yield {k: json.dumps(v) if isinstance(v, list) else v for k, v in record.items()}
        return
    for entry in record[listed]:
        yield {"place": record["place"], **entry}


def _totals(figures: dict[str, Any]) -> str:
    return (
        f"log-probability {-figures['nll']:.4f} nats, {figures['tokens']} tokens, "
        f"{figures['bytes']} bytes, perplexity {_number(figures.get('perplexity'))}, "
        f"bits per byte {_number(figures['bits_per_byte'])}"
    )


def _accuracy(figures: dict[str, Any]) -> str:
    count = figures.get("pairs", figures.get("items"))
    if figures["accuracy"] is None:
        return f"{count:,} items, none with a known answer"
    low, high = figures["accuracy_low"], figures["accuracy_high"]
    told = f"{figures['accuracy']:.1%} right ({low:.1%} to {high:.1%}) of {count:,}"
    if "mean_margin" in figures:
        told += f", {figures['ties']} ties, mean margin {figures['mean_margin']:.3f} nats"
    return told


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
