"""The loss curve of a run as a picture."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["draw_curve", "held_out_lines"]

# Names in the picture for the figures of an evaluation that has no domains.
_TITLES = {"score": "held-out loss", "kl_to_base": "KL to the base, neutral text"}


def draw_curve(events: list[dict[str, Any]]) -> bytes:
    """PNG of the training loss, and of what the evaluations found on held-out text."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    train = [event for event in events if event["kind"] == "train"]
    left.plot([e["tokens"] for e in train], [e["loss"] for e in train], linewidth=0.8)
    left.set(xlabel="tokens", ylabel="nats per token", title="training loss")
    unit, lines = held_out_lines(events)
    for label, (tokens, values) in lines.items():
        right.plot(tokens, values, marker=".", label=label)
    right.set(xlabel="tokens", ylabel=unit, title="validation")
    if lines:
        right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()


def held_out_lines(
    events: list[dict[str, Any]],
) -> tuple[str, dict[str, tuple[list[int], list[float]]]]:
    """The unit of a run's evaluations and, by name, the tokens and values of each line.

    Bits per byte of every domain where there are domains; else the held-out loss, and how far the
    model went from its base.
    """
    valid = [event for event in events if event["kind"] == "valid"]
    domains = valid[0].get("bits_per_byte", {}) if valid else {}
    if domains or not valid:
        unit = "bits per byte"
        found = {name: [(e["tokens"], e["bits_per_byte"][name]) for e in valid] for name in domains}
    else:
        unit = "nats per token"
        found = {
            title: [(e["tokens"], e[key]) for e in valid if e.get(key) is not None]
            for key, title in _TITLES.items()
        }
    lines = {name: pairs for name, pairs in found.items() if pairs}
    return unit, {
        name: ([tokens for tokens, _ in pairs], [value for _, value in pairs])
        for name, pairs in lines.items()
    }
