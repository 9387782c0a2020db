"""`TextStream` against the definition: the text ends before the first stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from optlm.engine.text import TextStream

letters = st.text("ab", max_size=4)


@given(
    pieces=st.lists(letters, max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    min_pieces=st.integers(0, 5),
    include=st.booleans(),
)
def test_cut_at_the_first_stop_string(
    pieces: list[str], stops: list[str], min_pieces: int, include: bool
) -> None:
    stream = TextStream(stops, include)
    shown, stopped = "", False
    for index, piece in enumerate(pieces):
        stopped = stream.push(piece, may_stop=index >= min_pieces)
        shown += stream.take(last=stopped)
        if stopped:
            break
    shown += stream.take(last=True)
    assert shown == stream.text
    assert (shown, stopped) == slow(pieces, stops, min_pieces, include)


def slow(pieces: list[str], stops: list[str], min_pieces: int, include: bool) -> tuple[str, bool]:
    text = ""
    for index, piece in enumerate(pieces):
        before, text = len(text), text + piece
        if index < min_pieces:
            continue
        matches = [
            (start, start + len(stop))
            for stop in stops
            for start in range(len(text))
            if text.startswith(stop, start) and start + len(stop) > before
        ]
        if matches:
            start, end = min(matches)
            return text[: end if include else start], True
    return text, False
