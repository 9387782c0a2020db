r"""OpenAI's `logprobs` object, with what it loses put back.

OpenAI keys alternatives by their text, and in a byte-level vocabulary some hundreds of tokens share
a text or have none of their own. Here a token that is no UTF-8 by itself reads "bytes:\xe2\x80", as
OpenAI writes it; a second token of the same text reads "token_id:123", so none overwrites another;
and beside the text stand the token's id and its bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optlm.engine.outputs import TokenLogprobs
from optlm.tokenizer import Tokenizer

__all__ = ["TokenReports", "token_name"]


def token_name(token_id: int, tokenizer: Tokenizer | None, *, names_ids: bool = False) -> str:
    """How a token reads: its text, "bytes:..." or "token_id:..."."""
    if names_ids or tokenizer is None:
        return f"token_id:{token_id}"
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class TokenReports:
    """Reports on the tokens of one choice, in order; knows where in the text each begins."""

    def __init__(self, tokenizer: Tokenizer | None, count: int, *, names_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._count = count
        self._names_ids = names_ids
        self._decoder = None if tokenizer is None else tokenizer.decoder()
        self._offset = 0  # characters certain so far

    def report(
        self, tokens: Sequence[int], reports: Sequence[TokenLogprobs | None]
    ) -> dict[str, Any]:
        """The object for the next tokens; a report is None where nothing precedes the token."""
        offsets = [self._advance(token) for token in tokens]
        return {
            "tokens": [self._name(token) for token in tokens],
            "token_logprobs": [None if r is None else r.logprob for r in reports],
            "top_logprobs": [None if r is None else self.alternatives(r) for r in reports],
            "text_offset": offsets,
            "token_ids": list(tokens),
            "bytes": [self._bytes(token) for token in tokens],
            "top_ids": [None if r is None else self._ranked(r)[0] for r in reports],
        }

    def alternatives(self, report: TokenLogprobs) -> dict[str, float]:
        """Name -> log-probability: the likeliest, best first, and the token itself in any case."""
        found: dict[str, float] = {}
        ids, logprobs = self._ranked(report)
        mine = self._name(report.token_id)
        for token, logprob in zip(ids, logprobs, strict=True):
            name = self._name(token)
            if name in found or (name == mine and token != report.token_id):
                name = f"token_id:{token}"
            found[name] = logprob
        return found

    def entry(self, report: TokenLogprobs) -> dict[str, Any]:
        """One token as chats report it: a list of alternatives, so nothing collides."""
        ids, logprobs = report.top_ids[: self._count].tolist(), report.top_logprobs.tolist()
        return {
            **self._entry(report.token_id, report.logprob),
            "top_logprobs": [self._entry(*pair) for pair in zip(ids, logprobs, strict=False)],
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        name, raw = self._name(token), self._bytes(token)
        return {"token": name, "token_id": token, "logprob": logprob, "bytes": raw}

    def _ranked(self, report: TokenLogprobs) -> tuple[list[int], list[float]]:
        ids = report.top_ids[: self._count].tolist()
        logprobs = report.top_logprobs[: self._count].tolist()
        if report.token_id not in ids:
            ids.append(report.token_id)
            logprobs.append(report.logprob)
        return ids, logprobs

    def _advance(self, token: int) -> int:
        start = self._offset
        if self._decoder is not None:
            self._offset += len(self._decoder.push(token))
        return start

    def _name(self, token: int) -> str:
        return token_name(token, self._tokenizer, names_ids=self._names_ids)

    def _bytes(self, token: int) -> list[int]:
        return [] if self._tokenizer is None else list(self._tokenizer.token_bytes(token))
