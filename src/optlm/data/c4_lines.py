"""The lines of a page that C4 keeps: Raffel et al. 2020, section 2.2."""

from __future__ import annotations

import re
from collections import Counter

__all__ = ["keep_c4_lines"]

_LEAST_WORDS = 5
_TERMINAL = (".", "!", "?", '"', "”")
_POLICIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")


def keep_c4_lines(text: str, dropped: Counter[str]) -> str:
    """Return the lines of `text` that end a sentence; count the others by reason into `dropped`.

    A line stays if it ends in a terminal punctuation mark, has five words or more, and does not
    speak of Javascript, cookies or terms of use. Wikipedia's citation marks are cut out.
    """
    kept = []
    for line in text.split("\n"):
        line = _CITATION.sub("", line).strip()
        if not line:
            continue
        reason = _reason(line)
        if reason is None:
            kept.append(line)
        else:
            dropped[reason] += 1
    return "\n".join(kept)


def _reason(line: str) -> str | None:
    low = line.lower()
    if not line.endswith(_TERMINAL) or line.endswith("..."):
        return "no terminal punctuation"
    if len(line.split()) < _LEAST_WORDS:
        return f"fewer than {_LEAST_WORDS} words"
    if "javascript" in low:
        return "javascript"
    if any(policy in low for policy in _POLICIES):
        return "policy notice"
    return None
