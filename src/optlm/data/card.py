"""The data card: what is in packed data, in Markdown, for whoever uses the model trained on it.

After Gebru et al. 2021, "Datasheets for Datasets": where it comes from, how much it is, what was
left out and why, and under which licences.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["REPORT_ENDING", "data_card"]

REPORT_ENDING = ".report.json"  # `optlm data clean` leaves such a file beside its output


def data_card(manifest: dict[str, Any]) -> str:
    """The card of the packed data that `manifest` describes."""
    parts: dict[str, dict[str, Any]] = manifest["parts"]
    total = {key: sum(p[key] for p in parts.values()) for key in ("documents", "tokens")}
    total["text_bytes"] = sum(p["text_bytes"] for p in parts.values())
    per_token = total["text_bytes"] / max(1, total["tokens"] - total["documents"])
    lines = [
        "# Data card",
        "",
        f"{total['documents']:,} documents, {total['text_bytes']:,} bytes of UTF-8 text, "
        f"{total['tokens']:,} tokens (one `</s>` before each document included). "
        f"The tokenizer has {manifest['config']['vocab_size']:,} entries and writes "
        f"{per_token:.2f} bytes a token.",
        "",
        "## Parts",
        "",
        "The weight is the share of a training batch's rows, not of the text.",
        "",
        "| part | weight | documents | bytes | tokens | broken lines left out |",
        "|---|---:|---:|---:|---:|---:|",
        *[_part_row(part, parts[part["name"]], manifest) for part in manifest["config"]["parts"]],
        "",
        "## Sources",
        "",
        *[line for p in manifest["config"]["parts"] for line in _sources(p, parts[p["name"]])],
        "",
        "## What cleaning left out",
        "",
        *_cleaning(parts),
        "",
        "## Licences, as the records state them",
        "",
        *_licenses(parts),
        "",
        "## Hashes",
        "",
        "Of the packed files; `optlm data verify` compares them.",
        "",
        f"* `tokenizer.json` {manifest['tokenizer_sha256']}",
        *[f"* `{name}.tokens` {p['sha256']}" for name, p in parts.items()],
        *[f"* `{name}.starts` {p['starts_sha256']}" for name, p in parts.items()],
        "",
    ]
    return "\n".join(lines)


def _part_row(part: dict[str, Any], packed: dict[str, Any], manifest: dict[str, Any]) -> str:
    whole = sum(p["weight"] for p in manifest["config"]["parts"])
    return (
        f"| {part['name']} | {part['weight'] / whole:.1%} | {packed['documents']:,} | "
        f"{packed['text_bytes']:,} | {packed['tokens']:,} | {packed['broken_lines']:,} |"
    )


def _sources(part: dict[str, Any], packed: dict[str, Any]) -> list[str]:
    chosen = []
    if part["sources"]:
        chosen.append("sources beginning with " + ", ".join(f"`{s}`" for s in part["sources"]))
    if part["max_bytes"] is not None:
        chosen.append(f"the first {part['max_bytes']:,} bytes of text")
    note = f" ({'; '.join(chosen)})" if chosen else ""
    return [
        f"* {part['name']}{note}: `{file['file']}`, {file['bytes']:,} bytes, "
        f"sha256 {file['sha256']}"
        for file in packed["files"]
    ]


def _cleaning(parts: dict[str, dict[str, Any]]) -> list[str]:
    """What the reports beside the source files say, each once."""
    files = dict.fromkeys(file["file"] for packed in parts.values() for file in packed["files"])
    lines: list[str] = []
    for file in files:
        report = _report_beside(Path(file))
        if report is not None:
            lines += [f"`{file}`: {report['kept']:,} of {report['read']:,} documents kept."]
            lines += ["", "| rule | limit | documents dropped |", "|---|---|---:|"]
            lines += [
                f"| {rule['name']} | {rule['limit']} | {rule['dropped']:,} |"
                for rule in report["rules"]
            ]
            lines += [""]
    return lines or ["No report of `optlm data clean` stands beside the sources."]


def _report_beside(file: Path) -> dict[str, Any] | None:
    try:
        report: dict[str, Any] = json.loads(Path(f"{file}{REPORT_ENDING}").read_text("utf-8"))
        return report if {"kept", "read", "rules"} <= report.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _licenses(parts: dict[str, dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for p in parts.values() for name in p["licenses"]))
    counts = {name: sum(p["licenses"].get(name, 0) for p in parts.values()) for name in names}
    ordered = sorted(counts, key=lambda name: (-counts[name], name))
    return [
        "| licence | documents |",
        "|---|---:|",
        *[f"| {name} | {counts[name]:,} |" for name in ordered],
    ]
