"""Tokens coloured by doubt: for a terminal, and as a page that opens with no network."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optlm.uncertainty.measures import TokenMeasures
from optlm.uncertainty.reading import Float64

__all__ = ["COLOURED_BY", "coloured", "doubt", "html_page", "token_table"]

# name -> what it is and what full colour means
COLOURED_BY: Mapping[str, str] = {
    "logprob": "surprisal of the token; full colour from 10 nats",
    "entropy": "entropy of the distribution; full colour at the logarithm of the vocabulary",
    "margin": "lead of the likeliest token over the second; full colour at none",
    "self-certainty": "divergence from uniform; full colour at 0, none at this text's highest",
}

_FULL_SURPRISAL = 10.0  # nats
_SHADES = (None, 230, 223, 222, 216, 209, 202)  # of a terminal of 256 colours, pale to strong
_RESET = "\x1b[0m"


def doubt(measures: TokenMeasures, by: str, vocab_size: int) -> Float64:
    """A number from 0 (sure) to 1 for every token, as `COLOURED_BY` says."""
    if by == "logprob":
        values = -measures.logprob / _FULL_SURPRISAL
    elif by == "entropy":
        values = measures.entropy / math.log(vocab_size)
    elif by == "margin":
        values = 1 - measures.margin
    else:
        highest = max(float(measures.self_certainty.max()), 1e-9)
        values = 1 - measures.self_certainty / highest
    return np.clip(values, 0, 1)


def coloured(texts: Sequence[str], doubts: Float64) -> str:
    """Tokens on backgrounds of a 256-colour terminal; a line break shows as a sign too."""
    out = []
    for text, value in zip(texts, doubts, strict=True):
        shade = _SHADES[min(int(value * len(_SHADES)), len(_SHADES) - 1)]
        if shade is None:
            out.append(text)
            continue
        start = f"\x1b[30;48;5;{shade}m"
        out.append(start + text.replace("\n", f"\u23ce{_RESET}\n{start}") + _RESET)
    return "".join(out)


def token_table(texts: Sequence[str], measures: TokenMeasures) -> list[dict[str, Any]]:
    """One object a token, for JSON."""
    columns = {name: value.tolist() for name, value in vars(measures).items()}
    return [
        {"token": text, **{name: column[i] for name, column in columns.items()}}
        for i, text in enumerate(texts)
    ]


def html_page(texts: Sequence[Mapping[str, Any]], *, title: str, note: str) -> str:
    """A whole page in one file, with a policy under which nothing is loaded.

    Args:
        texts: for each text ``first`` (what stands before the first scored token), ``tokens`` as
            `token_table` gives them, each with ``top`` (the likeliest token's text) and ``doubt``
            (one number for each of `COLOURED_BY`), and ``summary``.
        note: how the numbers were made.
    """
    folder = Path(__file__).parent
    style = (folder / "page.css").read_text(encoding="utf-8")
    script = (folder / "page.js").read_text(encoding="utf-8")
    data = json.dumps({"title": title, "note": note, "by": COLOURED_BY, "texts": list(texts)})
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    template = (folder / "page.html").read_text(encoding="utf-8")
    for name, value in {
        "POLICY": policy,
        "STYLE": style,
        "DATA": data.replace("<", "\\u003c"),  # no text can end the element
        "SCRIPT": script,
    }.items():
        template = template.replace(f"@@{name}@@", value, 1)
    return template


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
