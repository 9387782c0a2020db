"""The logbook of a run: what happened out of the ordinary, for people to read.

Rendered from the events in ``log.jsonl``, so the two never disagree and a resumed run's logbook is
that of one that was never stopped, but for the starts.
"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["NOTED", "render_logbook"]

NOTED = frozenset({"start", "changed", "spike", "overflow", "stopped"})  # kinds of events
_SHOWN_ROWS = 64


def render_logbook(events: list[dict[str, Any]]) -> str:
    """Markdown: one section for every event that is worth a note."""
    parts = ["# Logbook\n"]
    for event in events:
        if event["kind"] in NOTED:
            parts.append(f"## After step {event['step']}: {_TITLES[event['kind']]}\n")
            parts.append(_RENDER[event["kind"]](event))
    return "\n".join(parts)


_TITLES = {
    "start": "started",
    "changed": "settings changed",
    "spike": "the loss spiked",
    "overflow": "a gradient overflowed",
    "stopped": "stopped early",
}


def _start(event: dict[str, Any]) -> str:
    lines = [f"- {name}: {value}" for name, value in event["environment"].items()]
    differs = [f"**changed** {text}" for text in event.get("differs", ())]
    return "\n".join([*lines, *differs]) + "\n"


def _changed(event: dict[str, Any]) -> str:
    return (
        "\n".join(f"- `{n}`: {old} -> {new}" for n, (old, new) in event["changes"].items()) + "\n"
    )


def _overflow(event: dict[str, Any]) -> str:
    return f"The step was lost; the loss scale is now {event['scale']:g}.\n"


def _stopped(event: dict[str, Any]) -> str:
    return f"{event['reason']}\n"


def _spike(event: dict[str, Any]) -> str:
    distance = event["deviations"]
    text = (
        f"Step {event['batch_step']} had loss {event['loss']:.4f} and gradient norm "
        f"{event['norm']:.4g}"
    )
    if distance is not None:
        text += f", {distance:.1f} deviations above the median"
    text += f". {_ACTIONS[event['action']].format(**event)}\n"
    if event.get("batch") is not None:
        text += f"\nBatch: `{_batch(event['batch'])}`\n"
    return text + "\n" + _norms(event["before"])


_ACTIONS = {
    "record": "Noted only.",
    "lower_rate": "The learning rate is multiplied by {factor:.4g} from here on.",
    "skip": "Its batch was left out.",
}


def _batch(batch: dict[str, Any]) -> str:
    rows = batch.get("rows", [])
    shown = {**batch, "rows": rows[:_SHOWN_ROWS]} if rows else batch
    more = f" ... {len(rows) - _SHOWN_ROWS} more" if len(rows) > _SHOWN_ROWS else ""
    return json.dumps(shown, ensure_ascii=False) + more


def _norms(records: list[dict[str, Any]]) -> str:
    """Two tables of the steps up to the spike: gradient norms and activation sizes."""
    if not records:
        return ""
    layers = list(dict.fromkeys(name for record in records for name in record["gradients"]))
    head = ["step", "loss", "norm", "rate", "outcome", *layers]
    rows = [
        [
            str(r["step"]),
            f"{r['loss']:.4f}",
            f"{r['norm']:.3g}",
            f"{r['rate']:.3g}",
            r["outcome"],
            *(f"{r['gradients'].get(name, 0.0):.3g}" for name in layers),
        ]
        for r in records
    ]
    text = "Gradient norms by layer:\n\n" + _table(head, rows)
    depth = max(len(r["activations"]) for r in records)
    if depth:
        head = ["step", *(f"before layer {i}" for i in range(depth - 1)), "after the last"]
        rows = [[str(r["step"]), *(f"{x:.4g}" for x in r["activations"])] for r in records]
        text += "\nRoot mean square of the activations:\n\n" + _table(head, rows)
    return text


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


_RENDER = {
    "start": _start,
    "changed": _changed,
    "spike": _spike,
    "overflow": _overflow,
    "stopped": _stopped,
}
