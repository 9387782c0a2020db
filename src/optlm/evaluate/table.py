"""Results as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from optlm.evaluate.run import Measure, TaskResult

__all__ = ["table"]

_HEAD = ("task", "items", "shots", "metric", "value", "95 %", "chance", "published")


def table(results: Sequence[TaskResult], *, groups: bool = True) -> str:
    """One line a task with the protocol's metric first, then its other metrics and its parts.

    Args:
        groups: also list the parts of sets that have them.
    """
    rows: list[Sequence[str]] = [_HEAD]
    for result in results:
        names = [result.metric, *(name for name in result.measures if name != result.metric)]
        for name in names:
            rows.append(_row(result, name, result.measures[name], first=name == result.metric))
        if groups:
            for part, measure in result.groups.items():
                rows.append(("", "", "", f"  {part}", *_figures(measure), "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    notes = [f"{result.task}: {note}" for result in results for note in _notes(result)]
    return "\n".join(line.rstrip() for line in [*lines, *notes])


def _row(result: TaskResult, name: str, measure: Measure, *, first: bool) -> Sequence[str]:
    printed = [
        f"{row.value:.4f}"
        for row in result.published
        if row.metric == name and row.shots == result.num_fewshot
    ]
    chance = result.chance if first else None
    head = (result.task, str(result.items), str(result.num_fewshot)) if first else ("", "", "")
    return (
        *head,
        name,
        *_figures(measure),
        "" if chance is None else f"{chance:.4f}",
        ", ".join(printed),
    )


def _figures(measure: Measure) -> tuple[str, str]:
    known = measure.low is not None and measure.high is not None
    return f"{measure.value:.4f}", f"{measure.low:.4f}-{measure.high:.4f}" if known else ""


def _notes(result: TaskResult) -> list[str]:
    notes = [result.note] if result.note else []
    if result.shots_fewest < result.num_fewshot:
        notes.append(
            f"the context has no room for {result.num_fewshot} shots everywhere: "
            f"{result.shots_fewest} at the fewest, {result.shots_mean:.1f} on average"
        )
    if result.cut:
        notes.append(f"{result.cut} questions lost their beginning")
    sources = dict.fromkeys(
        row.source + (f" ({row.note})" if row.note else "")
        for row in result.published
        if row.shots == result.num_fewshot
    )
    return notes + [f"published: {source}" for source in sources]
