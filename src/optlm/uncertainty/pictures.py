"""Reliability diagrams and risk-coverage curves as SVG, without a plotting library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from optlm.uncertainty.calibration import Reliability
from optlm.uncertainty.reading import Float64

__all__ = ["reliability_svg", "risk_coverage_svg"]

_SIDE, _LEFT, _TOP, _GAP = 260, 56, 44, 84
_COLOURS = ("#0b57d0", "#b3261e", "#1e7a3c", "#7b3fb8", "#b06000", "#00696f", "#5b6270", "#c2185b")
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1b1d22}"
    ".bar{fill:#e86e14;fill-opacity:.75}.axis{stroke:#8a909c;fill:none}"
    ".even{stroke:#1b1d22;stroke-dasharray:4 4}.line{fill:none;stroke-width:1.8}"
)


def reliability_svg(panels: Mapping[str, Reliability]) -> str:
    """Accuracy against confidence, one panel for each title; bars on the diagonal are calibrated.

    The strip below each panel shows how many items a bin has. Two panels stand side by side.
    """
    width = _LEFT + min(len(panels), 2) * (_SIDE + _GAP)
    height = _TOP + _SIDE + 104
    parts = []
    for number, (title, each) in enumerate(panels.items()):
        left = _LEFT + number % 2 * (_SIDE + _GAP)
        parts.append(f'<g transform="translate(0 {number // 2 * height})">')
        parts += [_frame(left, "confidence", "accuracy", ["0", "0.5", "1"])]
        interval = f"{each.ece:.4f} ({each.low:.4f} to {each.high:.4f})"
        parts += [_text(left, 16, title, bold=True), _text(left, 32, f"ECE {interval}")]
        most = max(int(each.counts.max()), 1)
        for low, high, count, accuracy in zip(
            each.edges, each.edges[1:], each.counts, each.accuracy, strict=False
        ):
            x, wide = left + low * _SIDE, (high - low) * _SIDE - 1
            parts.append(_bar(x, _TOP + _SIDE, wide, accuracy * _SIDE))
            parts.append(_bar(x, _TOP + _SIDE + 76, wide, 30 * count / most))
        parts.append(
            f'<line class="even" x1="{left}" y1="{_TOP + _SIDE}" x2="{left + _SIDE}" y2="{_TOP}"/>'
        )
        told = f"{each.items:,} items by confidence, most in a bin {most:,}"
        parts.append(_text(left, _TOP + _SIDE + 92, told) + "</g>")
    return _svg(width, (len(panels) + 1) // 2 * height, parts)


def risk_coverage_svg(curves: Mapping[str, Float64], title: str) -> str:
    """Error rate against coverage, one curve for each name; lower is better.

    The first twentieth of a curve, where few items make it jump, is cut at the frame's top.
    """
    settled = [curve[len(curve) // 20 :] for curve in curves.values()]
    highest = max(max(float(curve.max()) for curve in settled), 1e-9)
    parts = [
        _text(_LEFT, 16, title, bold=True),
        _frame(_LEFT, "coverage", "error rate", ["0", f"{highest / 2:.2f}", f"{highest:.2f}"]),
    ]
    for number, (name, curve) in enumerate(curves.items()):
        kept = np.unique(np.linspace(0, len(curve) - 1, 200).astype(int))
        points = " ".join(
            f"{_LEFT + (i + 1) / len(curve) * _SIDE:.1f},"
            f"{_TOP + _SIDE - min(curve[i] / highest, 1) * _SIDE:.1f}"
            for i in kept
        )
        colour = _COLOURS[number % len(_COLOURS)]
        dash = _DASHES[number // len(_COLOURS) % len(_DASHES)]
        look = f'style="stroke:{colour}" stroke-dasharray="{dash}"'
        parts.append(f'<polyline class="line" {look} points="{points}"/>')
        y = _TOP + 14 + 18 * number
        x = _LEFT + _SIDE + 20
        parts.append(f'<polyline class="line" {look} points="{x},{y - 4} {x + 24},{y - 4}"/>')
        parts.append(_text(x + 30, y, name))
    height = max(_TOP + _SIDE + 44, _TOP + 24 + 18 * len(curves))
    return _svg(_LEFT + _SIDE + 240, height, parts)


def _frame(left: float, across: str, up: str, ticks: Sequence[str]) -> str:
    """Axes with marks at 0, 0.5 and 1 across, and `ticks` at the same places upwards."""
    bottom = _TOP + _SIDE
    parts = [f'<rect class="axis" x="{left}" y="{_TOP}" width="{_SIDE}" height="{_SIDE}"/>']
    for place, label, tick in zip((0, 0.5, 1), ("0", "0.5", "1"), ticks, strict=True):
        parts.append(_text(left + place * _SIDE, bottom + 15, label, anchor="middle"))
        parts.append(_text(left - 6, bottom - place * _SIDE + 4, tick, anchor="end"))
    parts.append(_text(left + _SIDE / 2, bottom + 32, across, anchor="middle"))
    turn = f"rotate(-90 {left - 38} {_TOP + _SIDE / 2})"
    parts.append(
        f'<text x="{left - 38}" y="{_TOP + _SIDE / 2}" text-anchor="middle" '
        f'transform="{turn}">{up}</text>'
    )
    return "".join(parts)


def _bar(x: float, bottom: float, width: float, height: float) -> str:
    return (
        f'<rect class="bar" x="{x:.1f}" y="{bottom - height:.1f}" width="{max(width, 0.5):.1f}" '
        f'height="{height:.1f}"/>'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", bold: bool = False) -> str:
    weight = ' style="font-weight:600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}"><style>{_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
