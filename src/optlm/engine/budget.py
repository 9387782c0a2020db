"""`Budget`: how the tokens and logit rows of a step are divided among prompts.

Prompts are served in order, but a long one leaves up to half of a step to short ones behind it: a
short prompt that comes after a long one is read within a step or two, and the long one takes at
most twice as many steps as it takes alone. A prompt is short if half of a step's budget holds all
that is left of it.
"""

from __future__ import annotations

from collections.abc import Iterable

from optlm.engine.request import Request

__all__ = ["Budget", "rows_of", "tokens_left"]


class Budget:
    """What is left of a step.

    Args:
        tokens, rows: of the step, without those of decoding requests.
        prompts: what may take part in the step.
    """

    def __init__(self, tokens: int, rows: int, prompts: Iterable[Request]) -> None:
        self.tokens = tokens
        self.rows = rows
        self._half = tokens // 2, rows // 2
        self._kept_tokens = self._kept_rows = 0  # for short prompts
        for request in prompts:
            if self._is_short(request):
                self._keep(tokens_left(request), rows_of(request, tokens_left(request)))
            if (self._kept_tokens, self._kept_rows) == self._half:
                break

    @property
    def is_spent(self) -> bool:
        return self.tokens <= 0 or self.rows <= 0

    def allows(self, request: Request) -> bool:
        """Whether the request may have any token."""
        if self._is_short(request):
            return not self.is_spent
        return self.tokens > self._kept_tokens and self.rows > self._kept_rows

    def take(self, request: Request) -> int:
        """Return how many tokens of a prompt run in this step, and subtract them."""
        if self._is_short(request):
            count = self._chunk(request, 0, self.tokens, self.rows)
            self._keep(-count, -rows_of(request, count))
        else:
            tokens, rows = self.tokens - self._kept_tokens, self.rows - self._kept_rows
            count = self._chunk(request, 0, tokens, rows)
        self.tokens -= count
        self.rows -= rows_of(request, count)
        return count

    def take_more(self, request: Request, most: int) -> int:
        """Return how many further tokens run, at most `most`, when nobody else wants them."""
        done = request.num_scheduled
        before = rows_of(request, done)
        count = min(self._chunk(request, done, self.tokens, self.rows), most)
        self.tokens -= count
        self.rows -= rows_of(request, done + count) - before
        return count

    def _is_short(self, request: Request) -> bool:
        left = tokens_left(request)
        return left <= self._half[0] and rows_of(request, left) <= self._half[1]

    def _keep(self, tokens: int, rows: int) -> None:
        self._kept_tokens = min(max(self._kept_tokens + tokens, 0), self._half[0])
        self._kept_rows = min(max(self._kept_rows + rows, 0), self._half[1])

    def _chunk(self, request: Request, done: int, tokens: int, rows: int) -> int:
        """Tokens of the request after the `done` ones of this step that budgets allow."""
        count = max(min(tokens_left(request) - done, tokens), 0)
        if request.reads_hidden:
            return count
        without_rows = max(request.next_row - request.num_computed - done, 0)
        return max(min(count, without_rows + rows), 0)


def tokens_left(request: Request) -> int:
    """Tokens that are not in the cache; a decoding request has one."""
    return len(request.tokens) - request.num_computed


def rows_of(request: Request, count: int) -> int:
    """Logit rows of the next `count` tokens of a request."""
    if request.reads_hidden:
        return 0
    return max(request.num_computed + count - max(request.num_computed, request.next_row), 0)
