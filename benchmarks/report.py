"""Results: a table on the screen, one JSON line, dated files with the hardware they hold for."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import checkpoints
from common import Spread

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")
OURS_COLOR, PEER_COLOR = "#1f5fa8", "#b9bec6"


@dataclasses.dataclass(kw_only=True)
class Report:
    """One run of one benchmark.

    Attributes:
        rows: one measurement each, flat: numbers and words.
        headline: the few figures the run was made for.
        columns: keys of `rows` in the table, with their titles.
    """

    name: str
    title: str
    method: str
    rows: list[dict[str, Any]]
    columns: dict[str, str]
    headline: dict[str, Any]
    packages: dict[str, str]
    bandwidths: Sequence[float] = ()
    failures: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "date": today(),
            "headline": self.headline,
            "rows": self.rows,
            "machine": machine(self.bandwidths),
            "packages": {**own_packages(), **self.packages},
            "method": self.method,
            "failures": dict(self.failures),
        }

    def publish(self, wanted: argparse.Namespace, plot: Any = None) -> None:
        """Print the table and the JSON line; write the dated files, `plot(path)` beside them."""
        values = self.as_dict()
        console = Console(width=None if os.isatty(1) else 140)
        console.print(self._rich_table())
        for name, value in self.headline.items():
            console.print(f"{name}: [bold]{show(value)}[/bold]")
        folder = Path(wanted.results)
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{today()}-{wanted.name or self.name}"  # names may hold dots, as in 1.3b
        line = json.dumps(values)
        (folder / f"{stem}.json").write_text(json.dumps(values, indent=1) + "\n")
        if plot is not None:
            plot(folder / f"{stem}.png")
        (folder / f"{stem}.md").write_text(self.markdown(values, stem if plot else None))
        if wanted.json:
            Path(wanted.json).write_text(line + "\n")
        print(line)

    def _rich_table(self) -> Table:
        table = Table(title=self.title)
        for key, title in self.columns.items():
            words = any(isinstance(row.get(key), str) for row in self.rows)
            table.add_column(title, justify="left" if words else "right")
        for row in self.rows:
            style = "bold" if str(row.get("engine", "")).startswith("optlm") else None
            table.add_row(*(show(row.get(key)) for key in self.columns), style=style)
        return table

    def markdown(self, values: Mapping[str, Any], picture: str | None) -> str:
        """The results as a page; `picture` is the plot's name without its ending."""
        lines = [f"# {self.title}", "", f"{values['date']}. {self.method}", ""]
        lines += [f"- {name}: **{show(value)}**" for name, value in self.headline.items()]
        lines += ["", "| " + " | ".join(self.columns.values()) + " |"]
        lines.append("|" + "---|" * len(self.columns))
        for row in self.rows:
            lines.append("| " + " | ".join(show(row.get(key)) for key in self.columns) + " |")
        if picture:
            lines += ["", f"![{self.title}]({picture}.png)"]
        lines += ["", "## Machine and versions", ""]
        lines += [f"- {key}: {show(value)}" for key, value in values["machine"].items()]
        lines += [f"- {key} {value}" for key, value in values["packages"].items()]
        if self.failures:
            lines += ["", "## Left out", ""]
            lines += [f"- {key}: {value}" for key, value in self.failures.items()]
        return "\n".join(lines) + "\n"


def show(value: Any) -> str:
    """A number with three or four figures that mean something; None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(value) if isinstance(value, list) else str(value)


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def machine(bandwidths: Sequence[float] = ()) -> dict[str, Any]:
    """The hardware, without a name that tells whose it is."""
    info = _cpuinfo()
    flags = info.get("flags", "").split()
    found: dict[str, Any] = {
        "cpu": info.get("model name", platform.machine()),
        "family and model": f"{info.get('cpu family', '?')}, {info.get('model', '?')}",
        "cores used": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "memory GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
    }
    if bandwidths:
        spread = Spread.of(bandwidths)
        found["memory read GB/s (median)"] = spread.median / 1e9
        found["memory read GB/s (least, most)"] = (
            f"{spread.least / 1e9:.1f} to {spread.most / 1e9:.1f}"
        )
    return found


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    first = path.read_text().split("\n\n")[0] if path.exists() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def own_packages() -> dict[str, str]:
    """Versions of Python, numpy and this repository's state."""
    git = ["git", "-C", str(checkpoints.ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
        "optlm commit": commit or "unknown",
    }


def ratio_to_best_peer(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[float, str] | None:
    """How many times more of `key` our int8 reaches than the best peer, and which that is."""
    ours = [row[key] for row in rows if row["engine"] == "optlm int8"]
    others = [row for row in rows if not row["engine"].startswith("optlm")]
    if not ours or not others:
        return None
    best = max(others, key=lambda row: row[key])
    return ours[0] / best[key], best["engine"]


def plot_bars(
    path: Path, title: str, panels: Mapping[str, Mapping[str, float]], unit: str, columns: int = 3
) -> None:
    """Write one panel of horizontal bars for each entry of `panels`: engine -> value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(panels) // columns)
    columns = min(columns, len(panels))
    most = max(len(bars) for bars in panels.values())
    size = (4.2 * columns, rows * (0.9 + 0.3 * most) + 0.5)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(title, fontsize=12)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, bars) in zip(axes.flat, panels.items(), strict=False):
        _draw_bars(axis, name, bars, unit)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_bars(axis: Any, name: str, bars: Mapping[str, float], unit: str) -> None:
    names = list(bars)[::-1]
    values = [bars[engine] for engine in names]
    colors = [OURS_COLOR if engine.startswith("optlm") else PEER_COLOR for engine in names]
    drawn = axis.barh(names, values, color=colors, height=0.7)
    axis.bar_label(drawn, labels=[show(float(value)) for value in values], padding=3, fontsize=8)
    axis.set_title(f"{name}, {unit}", fontsize=9, loc="left")
    axis.set_xlim(0, 1.18 * max(values))
    axis.tick_params(axis="y", length=0, labelsize=8)
    axis.set_xticks([])
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)
