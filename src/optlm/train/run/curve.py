"""The loss curve of a run as a picture."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["draw_curve"]


def draw_curve(events: list[dict[str, Any]]) -> bytes:
    """PNG of the training loss (nats a token) and the validation bits per byte of every domain."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    train = [event for event in events if event["kind"] == "train"]
    left.plot([e["tokens"] for e in train], [e["loss"] for e in train], linewidth=0.8)
    left.set(xlabel="tokens", ylabel="nats per token", title="training loss")
    valid = [event for event in events if event["kind"] == "valid"]
    for domain in valid[0].get("bits_per_byte", {}) if valid else ():
        values = [event["bits_per_byte"][domain] for event in valid]
        right.plot([e["tokens"] for e in valid], values, marker=".", label=domain)
    right.set(xlabel="tokens", ylabel="bits per byte", title="validation")
    if right.lines:
        right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()
